"""A model, a task, an objective, an optimiser, a rate, a schedule, a reduction, a format: one file each, in a folder.

The files are those of docs/tutorial.md. More of `prepare` and its formats: serial/test_plug_formats.py.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from programs import Place, ended, make_text, prepare

from mlm_mpi.plug import ROOMS
from mlm_mpi.train.checkpoint import read_manifest

MINE = Path(__file__).parents[2] / "docs" / "mine"
ALL = sorted(str(path.relative_to(MINE)) for path in MINE.rglob("*.py"))
FILES = [name for name in ALL if not name.startswith("formats/")]  # which a training reads
CONFIG = """
[model]
kind = "bag"
layers = 1
width = 24
context = 16
[task]
kind = "fill_in"
[data]
dir = "{corpus}"
[train]
steps = 4
micro_batches = 8
lanes = 4
rows = 2
schedule = "ahead"
[optim]
name = "signs"
schedule = "root"
learning_rate = 1e-3
[comm]
reduction = "left"
[checkpoint]
every = 2
[log]
curve = false
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    corpus = prepare(make_text(folder / "text"), folder / "corpus", "--tokenizer", "bytes", "--heldout", "0.04")
    place = Place(folder, corpus)
    place.config.write_text(CONFIG.format(corpus=corpus))
    shutil.copytree(MINE, folder / "mine")
    return place


@pytest.fixture(scope="module")
def whole(home):
    return home.train("whole", None, "--plugins", "mine")


def norms(home, run):
    lines = (home.folder / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["gradient_norm"] for line in lines]


def test_every_room_has_a_file_here():
    assert [name.split("/")[0] for name in ALL] == sorted(ROOMS)


def test_a_file_of_each_room_trains_the_same_bits_on_any_number_of_ranks(home, whole):
    three = home.train("three", 3, "--plugins", "mine", "train.schedule=gpipe")  # which does not enter the bits
    assert three.weights == whole.weights
    assert home.train("usual", None, "--plugins", "mine", "comm.reduction=canonical", "train.schedule=single").code == 0
    assert norms(home, "usual") != norms(home, "whole") == norms(home, "three"), "the order of additions is the file's"


def test_digests_stand_in_manifest_and_fingerprint(home, whole):
    assert whole.code == 0, whole.err
    digests = {name: hashlib.sha256((MINE / name).read_bytes()).hexdigest() for name in FILES}
    manifest = read_manifest(home.folder / "whole" / "checkpoints" / "step-00000004")
    assert manifest.plugins == manifest.fingerprint["plugins"] == digests


def test_evaluate_and_generate_take_the_files_too(home, whole, say):
    assert whole.code == 0, whole.err
    here = ("evaluate", home.folder / "whole", "--plugins", home.folder / "mine")
    one = json.loads(say(*here, "--json").out)
    two = home.program("run", "-n", "2", "--", "evaluate", "whole", "--plugins", "mine", "--json")
    assert two.code == 0, two.err
    assert json.loads(two.out) == one and one["perplexity of hidden tokens"] > 1
    assert "perplexity of hidden tokens" in say(*here).out
    words = ("generate", "whole", "--plugins", "mine", "--prompt", "ab", "--tokens", "40", "--temperature", "0")
    assert home.program(*words).out.startswith("ab")


def test_a_resume_without_the_files_or_with_others_is_one_line(home, whole, say):
    first = home.program(*home.words("resumed", None, "--plugins", "mine"), "--max-steps", "2")
    assert first.code == 0, first.err
    home.train("resumed", None).refused('model.kind = "bag" is none of bert, encoder_decoder')
    resumed, other = home.folder / "resumed", home.folder / "other"
    say("evaluate", resumed).refused('model.kind = "bag" is none of bert, encoder_decoder')
    shutil.copytree(MINE, home.folder / "other")
    with (home.folder / "other" / "optim" / "signs.py").open("a") as file:
        file.write("# changed\n")
    home.train("resumed", 2, "--plugins", "other").refused("optim/signs.py", "give the folder that it was trained with")
    assert say("evaluate", resumed, "--plugins", other).code == 0, "no optimiser is asked"
    (home.folder / "other" / "models" / "bag.py").open("a").write("# changed\n")
    say("evaluate", resumed, "--plugins", other).refused("models/bag.py")
    assert home.train("resumed", 2, "--plugins", "mine").weights == whole.weights


def test_prepare_reads_the_format(home):
    (home.folder / "a.fortune").write_text("one\n%\ntwo,\nand more\n%\none\n%\n")
    words = ("prepare", "a.fortune", "--out", "fortunes", "--tokenizer", "bytes", "--heldout", "0", "--plugins", "mine")
    done = home.program(*words)
    assert done.code == 0 and "4 read, 2 kept" in done.out, done.out + done.err


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("", "", "are right"),
        ("/ positions(dy))[:, ::-1]", "/ positions(dy))[:, ::+1]", "backward says"),
        ("ctx.cache is not None", "False", "with a cache"),
    ],
)
def test_the_check_of_a_model(home, tmp_path, right, wrong, said):
    source = (MINE / "models" / "bag.py").read_text()
    assert right in source
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "bag.py").write_text(source.replace(right, wrong) if right else source)
    words = [sys.executable, str(MINE.parent / "check_model.py"), str(tmp_path), "bag"]
    done = ended(home.popen(words, OPENBLAS_NUM_THREADS="1"))
    assert done.code == bool(right) and said in done.out, done.out + done.err


def test_the_current_folder_is_never_searched(home):
    shutil.copytree(MINE / "models", home.folder / "models", dirs_exist_ok=True)
    home.train("here", None).refused('model.kind = "bag" is none of bert, encoder_decoder')


def test_a_file_that_does_not_load_is_one_line(home, tmp_path):
    shutil.copytree(MINE, tmp_path / "broken")
    (tmp_path / "broken" / "rates" / "root.py").write_text("def rate(progress) return 1\n")
    home.train("broken", 2, "--plugins", str(tmp_path / "broken")).refused("root.py does not load: SyntaxError")
    (tmp_path / "broken" / "rates" / "root.py").write_text("def rating(progress):\n    return 1\n")
    home.train("broken", 2, "--plugins", str(tmp_path / "broken")).refused("root.py has no function rate")
    home.train("empty", None, "--plugins", "").refused("--plugins '' names no folder")


def test_ranks_with_different_files_end_with_one_line(home, tmp_path):
    shutil.copytree(MINE, tmp_path / "other")
    (tmp_path / "other" / "optim" / "signs.py").open("a").write("# changed\n")
    second = "os.environ.get('OMPI_COMM_WORLD_RANK') == '1'"
    change = f"if {second}: sys.argv[sys.argv.index('mine')] = {str(tmp_path / 'other')!r}"
    ended = home.faulty(change, "differ", 2, "--plugins", "mine")
    ended.refused("--plugins differ between ranks: optim/signs.py is ", "give all ranks the same folder")
