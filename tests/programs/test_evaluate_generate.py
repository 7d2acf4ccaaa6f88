"""`mlm-mpi evaluate` and `generate`: the run's own numbers, texts that repeat, and no MPI anywhere."""

import contextlib
import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from programs import SOON_S, Ended, ended, make_text
from terminal import Terminal

from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.generation import Sampling, continue_prompt
from mlm_mpi.plug import Plugins
from mlm_mpi.train import checkpoint
from mlm_mpi.train.trained import load

# a model that writes in red and gives the terminal a title
ESCAPES = """
from mlm_mpi import generation
from mlm_mpi.__main__ import entry

generation.continue_prompt = lambda *words, **more: iter(b"\\x1b[31mx\\x1b]0;y\\x07")
entry()
"""


@contextlib.contextmanager
def away(folder: Path) -> Iterator[Path]:
    """A folder under another name while the block runs."""
    elsewhere = folder.with_name("elsewhere")
    folder.rename(elsewhere)
    try:
        yield elsewhere
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        elsewhere.rename(folder)


@pytest.fixture(scope="module")
def without_mpi(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `import mpi4py` fails and no program can be found."""
    package = tmp_path_factory.mktemp("no_mpi") / "mpi4py"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('there is no MPI here')\n")
    return {"PYTHONPATH": str(package.parent), "PATH": "/nowhere"}


def test_evaluate_says_what_the_run_said(home, straight, without_mpi):
    done = home.program("evaluate", "straight", "--json", "--baselines", **without_mpi)
    assert done.code == 0, done.err
    numbers = json.loads(done.out)
    last = home.losses("straight")[-1][1]
    assert abs(numbers["loss"] - last) < 1e-6
    assert numbers["step"] == 6
    assert math.isclose(numbers["perplexity"], math.exp(last), rel_tol=1e-6)
    assert numbers["tokens"] == numbers["characters"]  # one document: its end is a target, its first token is none
    assert math.isclose(
        numbers["bits_per_character"], last / math.log(2) * numbers["tokens"] / numbers["characters"], rel_tol=1e-6
    )
    assert 1 < numbers["unigram_bits_per_character"] < 4
    assert 1 < numbers["xz_bits_per_character"] < 4


def test_evaluate_in_words(home, straight):
    done = home.program("evaluate", "straight", "--baselines")
    assert (done.code, done.err) == (0, "")
    assert f"loss                {home.losses('straight')[-1][1]:.4f} nats per token" in done.out
    assert "unigram" in done.out and "xz" in done.out


def test_generate_repeats_by_seed_and_needs_no_mpi(home, straight, say, without_mpi):
    words = ("generate", "straight", "--prompt", "abc ", "--tokens", "60")
    first = home.program(*words, "--seed", "5", **without_mpi)
    assert (first.code, first.err) == (0, "")
    assert first.out.startswith("abc ")
    assert home.program(*words, "--seed", "5").out == first.out
    here = ("generate", home.folder / "straight", *words[2:])
    assert say(*here, "--seed", "6").out != first.out
    greedy = say(*here, "--temperature", "0", "--seed", "1")
    assert greedy.out.startswith("abc ") and say(*here, "--temperature", "0", "--seed", "2").out == greedy.out
    assert say(*here, "--top-k", "1").out == greedy.out


def test_ranks_that_share_a_model_say_what_one_says(home, straight, say):
    """Its tokens, 257, have no factor that tp could be: stages do."""
    run = home.folder / "straight"
    two = ("run", "-n", "2", "--")
    text = ("generate", "straight", "--prompt", "abc ", "--tokens", "20", "--seed", "5")
    assert home.program(*two, *text, "--pp", "2") == Ended(0, say(text[0], run, *text[2:]).out, "")
    assert home.program(*two, "evaluate", "straight", "--json", "--pp", "2") == say("evaluate", run, "--json")
    home.program(*two, "evaluate", "straight", "--tp", "2").refused(
        "--tp 2 does not divide the 257 heads, features or tokens of embed.tokens: set --tp 1"
    )
    say("generate", run, "--tp", 4).refused("need 4 ranks, the launcher gave 1: start 4 (mlm-mpi run -n 4 -- …), or")
    say("evaluate", run, "--pp", 2).refused("need a multiple of 2 ranks, the launcher gave 1: start 2 (mlm-mpi run")
    say("evaluate", run, "--tp", 0).refused("--tp 0 must be at least 1")


@pytest.mark.slow
def test_generate_sends_no_control_character_to_a_terminal(home, straight):
    """A pipe gets what the model wrote."""
    command = [sys.executable, "-P", "-c", ESCAPES, "generate", "straight", "--tokens", "12", "--prompt", "a\x1b[1mb"]
    terminal = Terminal(command, home.folder)
    assert terminal.end(60) == 0 and terminal.lines == ["a[1mb[31mx]0;y"], terminal.lines
    assert b"\x1b" not in terminal.raw and b"\x07" not in terminal.raw
    plain = ended(home.popen(command))
    assert plain.out == "a\x1b[1mb\x1b[31mx\x1b]0;y\x07\n"


def test_generate_takes_any_bytes_and_a_reader_that_leaves(home, straight):
    done = home.program("generate", "straight", "--prompt", os.fsdecode(b"ab\xff"), "--tokens", "3")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("ab\ufffd")
    process = home.start("generate", "straight", "--prompt", "abc", "--tokens", str(10**12))
    assert process.stdout is not None
    assert process.stdout.read(3) == "abc"
    process.stdout.close()
    assert process.wait(timeout=SOON_S) == 141
    assert process.stderr is not None and process.stderr.read() == ""


def test_train_alone_needs_no_mpi(place, without_mpi):
    run = place.program(*place.words("run", None, "train.steps=2"), **without_mpi)
    assert run.weights


@pytest.mark.parametrize("prompt", ["", "a", "abcde fgh", "a prompt that is longer than the sixteen tokens of context"])
def test_the_cache_changes_no_text_past_the_end_of_the_context(home, straight, prompt):
    trained = load(Path(home.folder, "straight"), Plugins())
    ids = [trained.tokenizer.eot, *trained.tokenizer.encode(prompt)]
    greedy = Sampling(temperature=0)
    texts = []
    for cached in (True, False):
        continuation = continue_prompt(trained.chain, trained.config.model.context, ids, greedy, cached)
        texts.append([next(continuation) for _ in range(50)])
    assert texts[0] == texts[1]


ALTERED = {
    "model.norm_epsilon": ("norm_epsilon = 1e-05", "norm_epsilon = 0.125"),
    "model.heads": ("heads = 2", "heads = 4"),
    "model.context": ("context = 16", "context = 8"),
    "model.layers": ("layers = 1", "layers = 2"),
    "model.feed_forward": ("feed_forward = 128", "feed_forward = 64"),
    "train.dtype": ('dtype = "float32"', 'dtype = "float64"'),
    "data.dir": ('dir = "', 'dir = "/nowhere'),
    "eval.rows": ("rows = 16", "rows = 15"),
    "model.layerz": ("layers", "layerz"),
    "model.width": ("heads = 2", "heads = 3"),
    "is not TOML": ("[model]", "[model"),
    "No such file or directory": ("", None),
}


@pytest.mark.parametrize("named", ALTERED)
def test_settings_come_from_the_checkpoint_and_a_file_that_differs_is_named(place, home, straight, say, named):
    said = say("evaluate", home.folder / "straight", "--json")
    assert (said.code, said.err) == (0, "")
    path = place.copy_of(home, "straight") / "config.toml"
    old, new = ALTERED[named]
    if new is None:
        path.unlink()
    else:
        text = path.read_text()
        assert text.count(old) >= 1
        path.write_text(text.replace(old, new))
    altered = say("evaluate", path.parent, "--json")
    assert altered.out == said.out
    assert altered.err.startswith("note: the settings are those of step-00000006, not of ") and named in altered.err
    assert altered.err.count("\n") == 1


def test_no_flipped_bit_of_the_configuration_changes_a_figure(place, home, straight, say):
    said = say("evaluate", home.folder / "straight", "--json").out
    path = place.copy_of(home, "straight") / "config.toml"
    sound = path.read_bytes()
    draw = random.Random(8)
    for _ in range(12):
        content = bytearray(sound)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        flipped = say("evaluate", path.parent, "--json")
        assert flipped.out == said, content
        assert flipped.err.count("\n") <= 1


def test_an_average_of_weights_is_what_is_measured_and_generated_with(place, home, straight, say):
    """Training goes on with the weights themselves, whose hash ends it."""
    done, run = place.train("run", None, "optim.average=0.5"), place.folder / "run"
    assert done.out.splitlines()[-1] == straight.out.splitlines()[-1], done.err
    assert ", average of weights 0." in done.out
    assert "held-out text is measured with the moving average of weights, decay 0.5" in done.out
    (*_, (_, raw)), (*_, (_, averaged)) = home.losses("straight"), place.losses("run")
    assert [loss for loss, _ in place.losses("run")] == [loss for loss, _ in home.losses("straight")]
    numbers = json.loads(say("evaluate", run, "--json").out)
    assert abs(numbers["loss"] - averaged) < 1e-6 < abs(averaged - raw) and numbers["weights"] == "average"
    assert "; checkpoint of step 6, moving average of its weights\n" in say("evaluate", run).out
    generated = say("generate", run, "--tokens", 5)
    assert (generated.code, generated.err) == (0, "note: checkpoint of step 6, moving average of its weights\n")
    place.train("run", None, "train.steps=7").refused("optim.average: 0.5 → 0.0")


def test_a_model_outlives_its_corpus(place, home, straight, say):
    run = place.copy_of(home, "straight")
    words = ("generate", run, "--prompt", "abc ", "--tokens", 40)
    text, figures = say(*words).out, say("evaluate", run, "--json").out
    catalog = Catalog.open(home.corpus)
    size = f"corpus {catalog.digest[:12]} (20 documents, {catalog.tokens('train') + catalog.tokens('heldout'):,} tokens"
    with away(home.corpus) as elsewhere:
        assert say(*words) == Ended(0, text, "")
        say("evaluate", run).refused("No such file or directory", size, f"no corpus at {home.corpus}", "--data DIR")
        assert say("evaluate", run, "--json", "--data", elsewhere) == Ended(0, figures, "")
        place.train("straight", None).refused("no corpus at", f"straight was trained on {size}")


def test_a_corpus_is_made_again_by_the_command_that_the_model_names(place, say):
    words = ["prepare", "text", "--out", "corpus", "--tokenizer", "bytes", "--heldout", "0.1", "--shard-mib", "0.01"]
    make_text(place.folder / "text")
    assert place.program(*words).code == 0
    corpus = place.folder / "corpus"
    assert place.train("run", None, "data.dir=corpus", "--max-steps", "1").code == 0
    figures = say("evaluate", place.folder / "run", "--json")
    assert (figures.code, figures.err) == (0, "")  # from another working directory
    shutil.rmtree(corpus)
    lost = say("evaluate", place.folder / "run")
    lost.refused("make it again there")
    command = re.search(r"made with Python 3\.\d+\.\d+ by: mlm-mpi (.*)\): make it again there", lost.err)[1]
    assert place.program(*shlex.split(command)).code == 0
    assert say("evaluate", place.folder / "run", "--json") == figures


def test_figures_of_another_text_are_not_mistaken(place, home, straight, say, tmp_path):
    other = Path(shutil.copytree(home.corpus, tmp_path / "other"))
    with (other / "catalog.json").open("a") as file:
        file.write(" ")
    own, another = Catalog.open(home.corpus).digest, Catalog.open(other).digest
    run = place.copy_of(home, "straight")
    numbers = json.loads(say("evaluate", run, "--json").out)
    assert numbers["catalog"] == numbers["trained_on"] == own
    told = f"note: the figures are of another text, corpus {another[:12]} in "
    with away(home.corpus):
        shutil.copytree(other, home.corpus)
        for words in ((), ("--data", other)):
            noted = say("evaluate", run, "--json", *words)
            assert json.loads(noted.out)["catalog"] == another and json.loads(noted.out)["trained_on"] == own
            assert noted.err.startswith(told) and f"trained on corpus {own[:12]} (20 documents" in noted.err
            assert noted.err.count("\n") == 1
        place.train("straight", None).refused("trained on another catalog", f"corpus {own[:12]} (20 documents")


def test_a_checkpoint_may_be_copied_anywhere(place, home, straight, say):
    saved = home.folder / "straight" / "checkpoints" / "step-00000004"
    copy = shutil.copytree(saved, place.folder / "best")
    evaluated = say("evaluate", copy, "--json")
    assert json.loads(evaluated.out)["step"] == 4 and evaluated.err == ""
    assert say("generate", copy, "--tokens", 5).code == 0
    (copy / "part-0000.h5").unlink()
    say("evaluate", copy).refused("part-0000.h5 cannot be read")


def test_a_checkpoint_without_its_tokenizer_takes_the_one_of_its_corpus(place, home, straight, say):
    run = place.copy_of(home, "straight")
    text = say("generate", run, "--temperature", 0).out
    for path in run.glob("checkpoints/*/tokenizer.json"):
        path.unlink()
    lost = say("generate", run)
    assert lost.code == 2 and lost.err.count("copy its corpus' tokenizer there") == 4
    catalog = Catalog.open(home.corpus)
    shutil.copy(
        catalog.folder / catalog.manifest.tokenizer.file, run / "checkpoints" / "step-00000006" / "tokenizer.json"
    )
    assert say("generate", run, "--temperature", 0) == Ended(0, text, "")


def seal(folder: Path, **changes: object) -> None:
    """Changes a checkpoint's manifest, and seals it anew."""
    body = msgspec.json.encode(msgspec.structs.replace(checkpoint.read_manifest(folder), **changes))
    sealed = {"sha256": hashlib.sha256(body).hexdigest(), "manifest": msgspec.Raw(body)}
    (folder / "manifest.json").write_bytes(msgspec.json.encode(sealed))


@pytest.mark.parametrize(
    ("section", "changes"),
    [("model", {"layers": 10**6}), ("model", {"context": 1 << 40}), ("model", {"width": 1 << 40, "heads": 1})],
)
def test_settings_that_ask_for_more_than_the_checkpoint_holds(place, home, straight, say, section, changes):
    folder = place.copy_of(home, "straight") / "checkpoints" / "step-00000006"
    config = checkpoint.read_manifest(folder).config
    seal(folder, config=config | {section: config[section] | changes})
    say("generate", folder).refused("its parameters are not those of its settings")


def test_the_rows_of_an_evaluation_are_bounded(place, home, straight, say):
    folder = place.copy_of(home, "straight") / "checkpoints" / "step-00000006"
    loss = json.loads(say("evaluate", folder, "--json").out)["loss"]
    config = checkpoint.read_manifest(folder).config
    seal(folder, config=config | {"eval": config["eval"] | {"rows": 10**11}})
    assert json.loads(say("evaluate", folder, "--json").out)["loss"] == pytest.approx(loss, rel=1e-6)


def test_what_a_checkpoint_says_of_its_corpus_stays_one_plain_line(place, home, straight, say):
    folder = place.copy_of(home, "straight") / "checkpoints" / "step-00000006"
    seal(folder, corpus="\x1b[2J\nmlm-mpi: all is well" + "x" * 10**6)
    with away(home.corpus):
        lost = say("evaluate", folder)
    lost.refused("\ufffd[2J\ufffdmlm-mpi: all is well", "xx): make it again there, or give its folder by --data DIR")
    assert len(lost.err) < 2000 and "\x1b" not in lost.err


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(place, home, straight, say):
    """Sealed, but not by us."""
    folder = place.copy_of(home, "straight") / "checkpoints" / "step-00000006"
    other = Tokenizer.train(["a text of few words, of few words"], 260)
    other.save(folder / "tokenizer.json")
    seal(folder, tokenizer=other.hash)
    say("generate", folder).refused(f"its tokenizer has {other.vocab_size} tokens, its model 257")


@pytest.mark.parametrize(
    "words",
    [("--top-k", 2**70), ("--seed", -1), ("--seed", 2**70), ("--temperature", 1e-320), ("--temperature", 1e308)],
)
def test_generate_with_numbers_that_are_only_unusual(home, straight, say, words):
    done = say("generate", home.folder / "straight", "--prompt", "abc ", "--tokens", 5, *words)
    assert (done.code, done.err) == (0, "") and done.out.startswith("abc ")


def test_a_long_prompt_and_an_odd_one(home, straight, say):
    long = "abc def\x00 é" * 10_000
    assert say("generate", home.folder / "straight", "--tokens", 1, "--prompt", long).out.startswith(long)


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_path_that_is_no_run(place, say, command):
    folder = place.folder
    say(command, "").refused("RUN is empty")
    say(command, place.config).refused(f"{place.config} is no run folder", "give the --run folder of a training run")
    say(command, "x" * 300).refused("File name too long")
    (folder / "new" / "checkpoints").mkdir(parents=True)
    say(command, folder / "new").refused("holds no checkpoint: train first")
    (folder / "new" / "checkpoints").chmod(0o600)
    with unprivileged():
        closed = say(command, folder / "new")
    closed.refused(f"cannot read {folder}/new/checkpoints: Permission denied: give a run folder that you may read")


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Root, who may search every folder, is nobody while the block runs."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_numbers_that_nothing_can_be_made_of(say):
    say("generate", "nowhere", "--tokens", 10**20).refused("--tokens 100000000000000000000 must be at least 1 and at")
    for word in ("inf", "nan", "-0.5"):
        say("generate", "nowhere", "--temperature", word).refused(f"--temperature {word} must be finite")
    say("evaluate", "nowhere", "--data", "").refused("nowhere is no run folder")
    needless = say("generate", "nowhere", "--data", "corpus")
    assert needless.code == 2 and "unknown arguments: --data corpus" in needless.err
