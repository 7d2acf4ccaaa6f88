"""What a user gets wrong, or a disk: one line that says what to do, exit code 2, nothing half-made, nobody hangs."""

import re
import subprocess
from pathlib import Path

import pytest
from programs import Place, ended, make_text, prepare, seen

from mlm_mpi.backend.cpu import library

slow = pytest.mark.slow
SEVERAL = pytest.mark.parametrize("ranks", [None, 3])
# one rank always, three where `make test-all` runs: they fail by the same mechanism as another test here
ALSO_SEVERAL = pytest.mark.parametrize("ranks", [None, pytest.param(3, marks=slow)])


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with another tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    return prepare(make_text(folder / "text", seed=2), folder / "corpus", "--vocab", "300", "--heldout", "0.1")


@pytest.fixture
def own(tmp_path: Path) -> Place:
    """A place with a corpus of its own, to be damaged."""
    return Place(tmp_path, prepare(make_text(tmp_path / "text"), tmp_path / "corpus", "--tokenizer", "bytes"))


def shards(place: Place) -> list[Path]:
    return sorted(place.corpus.glob("train-*.h5"))


SETTINGS = {
    "unknown key": (("model.layerz=2",), ("unknown key model.layerz", "did you mean 'layers'?")),
    "heads": (("model.heads=3",), ("model.width = 32 is not a multiple of model.heads = 3", "set model.width = 33")),
    "lanes": (("train.micro_batches=12",), ("train.micro_batches = 12 is not a multiple of train.lanes = 8", "set")),
    "small": (
        ("train.rows=1000",),
        ("windows, one step takes train.micro_batches * train.rows = 16000: prepare more",),
    ),
    "bf16 in float64": (
        ("numerics.products=bf16", "train.dtype=float64"),
        ('numerics.products = "bf16" needs train.dtype = "float32"',),
    ),
    "nowhere": (("data.dir=nowhere",), ("no corpus at nowhere", "run mlm-mpi prepare, or set data.dir")),
    "a million layers": (("model.layers=1000000",), ("a rank needs at least", "parameters", "lower model.width")),
    "evaluation": (("eval.rows=100000000000",), ("evaluation", "lower eval.rows")),
    "prefetch": (("data.prefetch=100000000000",), ("prefetch", "lower data.prefetch")),
    "time": (("--max-time", "soon"), ("--max-time 'soon' is no time: write 90s",)),
    "steps": (("--max-steps", "0"), ("--max-steps 0 must be at least 1",)),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_a_setting_that_cannot_work(place, what):
    words, said = SETTINGS[what]
    place.train("run", None, *words).refused(*said)
    assert not (place.folder / "run").exists()


def test_an_empty_name_is_not_the_current_folder(place):
    before = sorted(place.folder.iterdir())
    place.train("", None).refused("--run '' is empty, which would be the current folder: name a folder")
    assert sorted(place.folder.iterdir()) == before


@pytest.mark.parametrize("junk", ["x", "-1", ""])
def test_junk_from_a_launcher(place, junk):
    words = place.words("run", None)
    place.program(*words, OMPI_COMM_WORLD_RANK=junk, OMPI_COMM_WORLD_SIZE="2").refused(
        f"OMPI_COMM_WORLD_RANK = {junk!r} in the environment is not a whole number"
    )
    assert not (place.folder / "run").exists()


@pytest.mark.skipif(library.runs(library.BF16_LEVEL), reason="this CPU has AVX512-BF16")
def test_bf16_products_on_a_cpu_without_them(place):
    place.train("run", None, "numerics.products=bf16").refused(
        'numerics.products = "bf16" needs a CPU with AVX512-BF16', 'set numerics.products = "float32"'
    )
    assert not (place.folder / "run").exists()


@pytest.mark.parametrize("what", ["unknown key", *(pytest.param(w, marks=slow) for w in ("lanes", "small", "time"))])
def test_a_setting_that_cannot_work_is_said_once_by_three_ranks(place, what):
    words, said = SETTINGS[what]
    place.train("run", 3, *words).refused(*said)
    assert not (place.folder / "run").exists()


@ALSO_SEVERAL
def test_a_missing_configuration(place, ranks):
    place.config.unlink()
    place.train("run", ranks).refused("cannot read the configuration", "tiny.toml: No such file or directory")
    assert not (place.folder / "run").exists()


def test_more_ranks_than_lanes(place):
    place.train("run", 3, "train.lanes=2").refused(
        "gave 3 ranks, but train.lanes = 2 allows at most 2", "set train.lanes"
    )
    assert not (place.folder / "run").exists()


@ALSO_SEVERAL
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_shard_that_is_missing_or_short_is_found_at_the_start(own, damage, ranks):
    shard = shards(own)[1]
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-9])
    own.train("run", ranks).refused(str(shard), "run mlm-mpi prepare again")
    assert not (own.folder / "run").exists()


@SEVERAL
def test_a_flipped_bit_in_a_shard_is_found_before_a_token_is_used(own, ranks):
    """The rank that meets it names itself and ends the job; another may meet it in the same moment."""
    shard = shards(own)[-1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(bytes(content))
    found = own.train("run", ranks, "train.steps=100")
    assert found.code == 2
    who = "mlm-mpi: " if ranks is None else r"mlm-mpi: rank \d: "
    for line in found.err.splitlines():
        assert re.fullmatch(rf"{who}shard {shard} is damaged: SHA-256 .*: run mlm-mpi prepare again", line)
    assert found.err
    assert not (own.folder / "run" / "DONE").exists()


UNLINK = """
from pathlib import Path
from mlm_mpi.data.stream import TokenStream
reader = TokenStream._reader

def _reader(self, number):
    if self.split == "heldout":
        self._folder = Path("gone")
    return reader(self, number)

def before_step(rank, step):
    if rank == 1 and step == 2:
        TokenStream._reader = _reader
"""


def test_a_shard_that_one_rank_loses_in_mid_run_names_rank_and_file(place, straight):
    lost = place.faulty(UNLINK, "run", 3, "checkpoint.every=2", "checkpoint.background=false")
    lost.refused("mlm-mpi: rank 1: shard gone/heldout-", "is missing", "run mlm-mpi prepare again")
    assert "step-00000002" in place.checkpoints("run")
    assert place.train("run", None).weights == straight.weights


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}


CHANGES = {
    "model": (("model.width=64",), ("model.width: 32 → 64",)),
    "optimiser": (("optim.name=sgd",), ("optim.name: adamw → sgd",)),
    "lanes": (("train.lanes=4",), ("train.lanes: 8 → 4",)),
    "fewer steps": (("train.steps=4",), ("stands at step 6", "train.steps = 4: raise train.steps")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_resume_with_a_change_that_makes_another_run(place, home, straight, what):
    words, said = CHANGES[what]
    run = place.copy_of(home, "straight")
    before = contents(run)
    place.train("straight", 3 if what == "model" else None, *words).refused("step-00000006", *said)
    assert contents(run) == before


def test_a_corpus_of_another_tokenizer(place, home, straight, other, say):
    run = place.copy_of(home, "straight")
    before = contents(run)
    place.train("straight", None, f"data.dir={other}").refused(
        "trained on another tokenizer", "set data.dir to its own"
    )
    say("evaluate", run, "--data", other).refused("another tokenizer", "prepare it with --tokenizer")
    assert contents(run) == before


def test_a_run_folder_in_use(place):
    job = place.start(*place.words("run", None, "train.steps=4000", "eval.windows=16"))
    seen(job, "step    2/4000")
    place.train("run", 2).refused("run is in use by a live run (pid ", "give another --run")
    job.terminate()  # a rank without a launcher saves and leaves too
    stopped = ended(job)
    assert stopped.said_weights and "stopped after step" in stopped.out


def test_a_run_folder_that_is_a_file(place):
    (place.folder / "run").write_text("")
    place.train("run", None).refused("cannot use run as run folder", "give another --run")


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_folder_that_is_no_run(place, say, command):
    place.program(command, "nowhere").refused("nowhere is no run folder", "give the --run folder of a training run")
    (place.folder / "empty").mkdir()
    say(command, place.folder / "empty").refused("empty is no run folder")


@pytest.mark.parametrize("words", [("--tokens", "0"), ("--temperature", "-1"), ("--top-p", "0"), ("--top-k", "-2")])
def test_generate_with_a_number_that_makes_no_sense(say, words):
    say("generate", "nowhere", *words).refused(" ".join(words))


@ALSO_SEVERAL
def test_a_learning_rate_that_breaks_the_loss(place, say, ranks):
    """Step 1 is sound, its update is not: step 2 stops before it changes anything, and step 1's checkpoint stands."""
    broken = place.train("run", ranks, "optim.learning_rate=1e20", "optim.warmup_steps=0", "checkpoint.every=1")
    broken.refused(
        "step 2, micro-batch 0: loss nan", "gradient of embed.tokens is not finite", "lower optim.learning_rate"
    )
    assert place.checkpoints("run") == ["step-00000001"]
    assert say("evaluate", place.folder / "run").code == 0
    assert len(place.losses("run")) == 1


def test_weights_that_are_not_finite_are_not_saved(place):
    broken = place.train(
        "run", None, "optim.learning_rate=1e39", "optim.warmup_steps=0", "train.steps=1", "eval.windows=1"
    )
    broken.refused("weights of embed.tokens are not finite after step 1, which is not saved: lower optim.learning_rate")
    assert place.checkpoints("run") == []


def test_a_full_disk(place):
    """A file system of 300 KiB: no checkpoint fits, training goes on, and the final save says so in one line."""
    full = place.folder / "full"
    full.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(full)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        run = place.train("full/run", None, "checkpoint.every=2", "model.width=64")
        run.refused("the final checkpoint (step 6) was not saved", "No space left on device", "free space there")
        assert run.out.count("ALARM checkpoint not saved, training goes on") == 2
        assert len(place.losses("full/run")) == 6
        assert place.checkpoints("full/run") == []
    finally:
        subprocess.run(["umount", str(full)], check=True)
