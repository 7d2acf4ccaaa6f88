"""Every rule of the configuration, and that its errors name the value, the bound and the remedy."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlm_mpi import config
from mlm_mpi.config import reference
from mlm_mpi.config.sections import KINDS
from mlm_mpi.errors import ConfigError
from mlm_mpi.plug import ROOMS, Plugins

ROOT = Path(__file__).parents[2]


def refused(*overrides: str, plugins: Plugins | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(None, overrides, plugins)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_complete() -> None:
    c = config.load(None)
    assert c.model.feed_forward == 4 * c.model.width
    assert c.train.lanes == min(c.train.micro_batches, 8)


def test_an_unknown_key_names_the_nearest_one() -> None:
    message = refused("train.micro_batch=4")
    assert "train.micro_batch" in message and "did you mean 'micro_batches'?" in message
    assert "did you mean 'train'?" in refused("trian.steps=4")
    assert "known:" in refused("train.qqqqqq=1") and "steps" in refused("train.qqqqqq=1")


def test_an_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[optim]\nlearning_rat = 0.1\n")
    with pytest.raises(ConfigError, match=r"run\.toml.*optim\.learning_rat.*learning_rate"):
        config.load(path)


def test_width_must_be_a_multiple_of_heads() -> None:
    message = refused("model.width=100", "model.heads=3")
    assert "100" in message and "3" in message and "model.width = 102" in message
    config.load(None, ["model.width=102", "model.heads=3"])


def test_micro_batches_must_be_a_multiple_of_lanes() -> None:
    message = refused("train.micro_batches=6", "train.lanes=4")
    assert "train.micro_batches = 6" in message and "train.micro_batches = 8" in message
    config.load(None, ["train.micro_batches=8", "train.lanes=4"])


@pytest.mark.parametrize(("micro_batches", "lanes"), [(1, 1), (4, 4), (8, 8), (12, 6), (16, 8), (7, 7), (11, 1)])
def test_default_lanes_divide_the_micro_batches(micro_batches: int, lanes: int) -> None:
    assert config.load(None, [f"train.micro_batches={micro_batches}"]).train.lanes == lanes


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=many", "train.steps=1.5", "train.steps=true", "optim.learning_rate=fast", "train.dtype=float16",
        "comm.overlap=1", "comm.reduction=ring", "optim.name=lyon", "model.kind=rnn", "data.dir=7", "log.every=[1]",
    ],
)  # fmt: skip
def test_wrong_types_are_refused_by_name(override: str) -> None:
    section, _, key = override.partition("=")[0].partition(".")
    message = refused(override)
    assert section in message and key in message


@pytest.mark.parametrize(
    "override",
    [
        "model.layers=0", "train.steps=0", "train.rows=-1", "train.lanes=-2", "numerics.threads=0", "log.every=0",
        "eval.every=-1", "optim.clip=-1.0", "optim.weight_decay=-0.1", "optim.learning_rate=nan",
        "optim.learning_rate=inf", "comm.timeout_s=inf", "model.dropout=1.0",
        "model.dropout=-0.1", "optim.beta2=1", "optim.epsilon=0", "model.norm_epsilon=0", "optim.final_fraction=2",
        "optim.decay_fraction=1.5", "optim.decay_fraction=-0.1", "optim.average=1",
        "comm.bucket_mib=0", "comm.timeout_s=-1", "optim.warmup_steps=1000", "train.seed=-1", "checkpoint.keep=0",
        "comm.timeout_s=1e10", "comm.bucket_mib=1e-12", "model.init_std=1e30", "numerics.threads=100000",
    ],
)  # fmt: skip
def test_bounds(override: str) -> None:
    assert override.partition("=")[0] in refused(override)


@pytest.mark.parametrize("text", ["train.steps", "steps=3", ".steps=3", "train.=3", "=3", ""])
def test_an_override_must_be_section_key_value(text: str) -> None:
    assert "section.key=value" in refused(text)


def test_overrides_are_toml_values_or_bare_words() -> None:
    c = config.load(
        None,
        ["train.steps=7", "optim.learning_rate=3e-4", "comm.overlap=false", "data.dir=/a/b=c", 'data.dir="x y"']
        + ["comm.reduction=allreduce", " train.rows = 3 ", "optim.clip=2"],
    )
    assert (c.train.steps, c.train.rows, c.optim.learning_rate, c.optim.clip) == (7, 3, 3e-4, 2.0)
    assert (c.comm.overlap, c.comm.reduction, c.data.dir) == (False, "allreduce", "x y")
    assert config.load(None, ["data.dir=/a/b=c"]).data.dir == "/a/b=c"


def test_an_override_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[train]\nsteps = 3\nrows = 2\n")
    c = config.load(path, ["train.steps=5"])
    assert (c.train.steps, c.train.rows) == (5, 2)


def test_a_round_trip_through_toml_and_tables_is_exact(tmp_path: Path) -> None:
    c = config.load(
        None,
        ["model.dropout=0.1", "optim.learning_rate=0.00030000000000000003", 'data.dir="a \\"b\\" \\\\ é\\n"']
        + ["comm.timeout_s=1e9", "optim.epsilon=1e-300", "train.seed=9007199254740993", "model.width=512"],
    )
    path = tmp_path / "saved.toml"
    path.write_text(config.to_toml(c), encoding="utf-8")
    assert config.load(path) == c
    assert config.from_table(config.to_table(c), "a table") == c


def test_a_file_that_cannot_be_read_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such.toml"):
        config.load(tmp_path / "no-such.toml")
    (tmp_path / "bad.toml").write_text("[train\nsteps")
    with pytest.raises(ConfigError, match="not TOML"):
        config.load(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b'[data]\ndir = "\xe9"\n')
    with pytest.raises(ConfigError, match="not TOML"):
        config.load(tmp_path / "latin.toml")
    (tmp_path / "flat.toml").write_text("train = 3\n")
    with pytest.raises(ConfigError, match="train is a section"):
        config.load(tmp_path / "flat.toml")


def test_more_ranks_than_lanes_are_refused_with_the_remedy() -> None:
    c = config.load(None, ["train.micro_batches=4", "train.lanes=2"])
    config.check_ranks(c, 1)
    config.check_ranks(c, 2)
    with pytest.raises(ConfigError, match=r"3 ranks.*train\.lanes = 2.*start 2 ranks"):
        config.check_ranks(c, 3)


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(AttributeError):
        config.load(None).train.steps = 4  # type: ignore[misc]


# ---- what each key must be


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=many", '--set: train.steps = "many" must be a whole number (in [1, 4294967296]), not a string'),
        ("train.rows=1.5", "--set: train.rows = 1.5 must be a whole number (at least 1), not a number"),
        ("train.rows=true", "--set: train.rows = true must be a whole number (at least 1), not true or false"),
        ("optim.clip=[1]", "--set: optim.clip = [1] must be a number (not negative), not an array"),
        ("comm.overlap=1", "--set: comm.overlap = 1 must be true or false, not a whole number: write true"),
        ("data.dir=2020-01-01", "--set: data.dir = 2020-01-01 must be a string, not a date"),
        ("train.dtype=float16", '--set: train.dtype = "float16" must be "float32" or "float64"'),
        ("train.dtype=1", '--set: train.dtype = 1 must be "float32" or "float64"'),
        ("model.kind=3", "--set: model.kind = 3 must be a string, not a whole number"),
        ("train.rows=0", "--set: train.rows = 0 must be at least 1"),
        ("eval.every=-1", "--set: eval.every = -1 must not be negative"),
        ("optim.epsilon=0", "--set: optim.epsilon = 0.0 must be positive"),
        ("model.dropout=1.0", "--set: model.dropout = 1.0 must be in [0, 1)"),
        ("optim.clip=inf", "--set: optim.clip = inf must be a finite number"),
        ("comm.bucket_mib=0", "--set: comm.bucket_mib = 0.0 must be at least 0.001: every bucket is a message"),
        ("train.seed=18446744073709551616", "--set: train.seed = 18446744073709551616 must fit into 64 bits"),
        ("comm.reduction=ring", '--set: comm.reduction = "ring" is none of allreduce, canonical, naive, nccl (a '),
    ],
)  # fmt: skip
def test_a_refusal_in_full(override: str, said: str) -> None:
    assert refused(override).startswith(said)


def test_a_long_value_is_cut() -> None:
    assert len(refused(f"train.steps={'x' * 4000}")) < 200


def test_a_whole_number_is_a_number() -> None:
    clip = config.load(None, ["optim.clip=2"]).optim.clip
    assert (type(clip), clip) == (float, 2.0)


@pytest.mark.parametrize("name", ["optim.clip", "train.steps"])
def test_a_number_that_no_checkpoint_could_hold(name: str) -> None:
    for sign in ("", "-"):
        assert f"{name} = {sign}1000" in refused(f"{name}={sign}1{'0' * 400}")


NOT_ZERO = [
    "model.layers", "model.width", "model.heads", "model.context", "train.steps", "train.micro_batches", "train.rows",
    "data.prefetch", "eval.rows", "checkpoint.keep", "numerics.threads", "log.every", "optim.epsilon",
    "model.norm_epsilon", "comm.bucket_mib", "comm.timeout_s", "numerics.shares", "model.rotary_original",
    "model.rotary_base", "model.rotary_factor", "model.rotary_low", "model.rotary_high", "train.first_rows",
    "train.first_context", "mesh.pp", "mesh.tp", "mesh.chunks", "start.lora_alpha", "task.window", "task.negatives",
    "model.segments", "model.ngrams", "model.ngram_buckets", "task.rate", "task.span",
    "task.question", "task.longest", "task.beta",
]  # fmt: skip
NOT_NEGATIVE = [
    "model.decoder_layers",
    "model.feed_forward", "train.lanes", "eval.every", "eval.windows", "checkpoint.every", "optim.warmup_steps",
    "optim.weight_decay", "optim.clip", "train.seed", "optim.learning_rate", "model.init_std", "backend.memory_gib",
    "model.dropout", "optim.beta1", "optim.beta2", "optim.final_fraction", "optim.momentum", "model.logit_cap",
    "model.key_value_heads", "model.head_width", "model.window", "model.full_every", "model.rotary_skip",
    "train.rows_warmup_steps", "train.context_warmup_steps", "optim.average", "optim.decay_fraction", "comm.stall_s",
    "optim.momentum_start", "optim.momentum_steps", "optim.adam_learning_rate", "optim.adam_weight_decay",
    "guard.spike", "guard.compare_every", "guard.audit_every", "comm.spares", "mesh.dp", "mesh.zero",
    "start.lora_rank", "start.vectors_scale", "eval.patience", "task.subsample", "task.noise_power", "task.dropout",
    "task.smoothing", "task.crop", "task.hide", "task.split", "task.stride",
]  # fmt: skip
BELOW_ONE = [
    "model.dropout", "optim.beta1", "optim.beta2", "optim.momentum", "optim.momentum_start", "optim.average",
    "task.rate", "task.dropout", "task.smoothing", "task.hide",
]  # fmt: skip


def of(name: str) -> list[str]:
    """Overrides under which a key is known: none where the default kind of its section knows it."""
    section = name.partition(".")[0]
    kinds = [found.kind for found in declared() if any(entry.full == name for entry in found.entries.values())]
    default = section not in KINDS or KINDS[section].default in kinds
    return [] if default else [f"{section}.{KINDS[section].key}={kinds[0]}"]


@pytest.mark.parametrize("name", NOT_ZERO)
def test_zero_is_refused(name: str) -> None:
    assert f"{name} = 0" in refused(*of(name), f"{name}=0")


@pytest.mark.parametrize("name", [*NOT_ZERO, *NOT_NEGATIVE])
def test_a_negative_number_is_refused(name: str) -> None:
    assert f"{name} = -1" in refused(*of(name), f"{name}=-1")


@pytest.mark.parametrize("name", BELOW_ONE)
def test_one_is_refused(name: str) -> None:
    assert f"{name} = 1" in refused(*of(name), f"{name}=1")


def test_a_guard_that_would_do_harm_is_refused() -> None:
    assert "guard.spike = 0.5 makes a spike of what is usual" in refused("guard.spike=0.5")
    assert "checkpoint.every = 0 makes none" in refused("guard.policy=rollback")
    assert config.load(None, ["guard.spike=0"]).guard.spike == 0


def test_shares_are_a_power_of_two() -> None:
    assert [config.load(None, [f"numerics.shares={n}"]).numerics.shares for n in (1, 2, 4, 8)] == [1, 2, 4, 8]
    assert "set it to 1, 2, 4 or 8" in refused("numerics.shares=6")


def declared() -> list[reference.Declared]:
    return list(reference.declared(Plugins()))


def test_every_number_is_in_the_lists_above() -> None:
    numbers = {e.full for found in declared() for e in found.entries.values() if e.type in (int, float)}
    assert numbers == {*NOT_ZERO, *NOT_NEGATIVE}


# ---- sections are declared by rooms


def test_every_key_says_in_one_sentence_what_it_is() -> None:
    for found in declared():
        assert found.says.endswith((".", ")."))
        for entry in found.entries.values():
            says = entry.about.says
            assert says[0].isupper() and says.endswith(".") and says.isprintable(), entry.full
            assert len(says.split()) >= 5, entry.full


def test_every_default_is_its_own_type() -> None:
    c = config.load(None)
    for section in dataclasses.fields(c):
        for field in dataclasses.fields(getattr(c, section.name)):
            value = getattr(getattr(c, section.name), field.name)
            assert type(value) in (int, float, bool, str, tuple)


def test_a_key_of_another_kind_says_whose_it_is() -> None:
    assert refused("optim.name=sgd", "optim.beta1=0.5") == (
        '--set: unknown key optim.beta1 of optim.name = "sgd"; '
        '"adamw" and "lion" and "muon" know it: take it out, or set optim.name = "adamw"'
    )
    assert refused("optim.nesterov=true").endswith('"muon" knows it: take it out, or set optim.name = "muon"')
    known = '"classification" and "dialogue" and "preference" and "tagging" and "translation" know it'
    said = refused("task.too_long=cut", "task.kind=question_answering")
    assert said.endswith(f"{known}: take it out"), "nobody learns something else for that"
    assert refused("task.pooling=mean").endswith(': take it out, or set task.kind = "classification"')
    assert "optim.momentum = 1.0 must be in [0, 1)" in refused("optim.name=muon", "optim.momentum=1")
    assert "optim.learning_rate = 0" in refused("optim.name=muon", "optim.learning_rate=0")
    assert 'must be "polar-express" or "newton-schulz"' in refused("optim.name=muon", "optim.iteration=svd")


def test_an_unknown_kind_names_the_nearest_one() -> None:
    assert refused("optim.name=adam") == (
        "--set: optim.name = \"adam\" is none of adamw, lion, muon, sgd; did you mean 'adamw'?"
    )


def test_a_room_holds_kinds_only() -> None:
    """`ls` is the registry: whatever else a kind needs stands in another room."""
    has = {"models": "Settings", "tasks": "Settings", "optim": "Settings", "objectives": "samples", "rates": "rate",
           "schedules": "instructions", "reductions": "build", "formats": "SUFFIXES"}  # fmt: skip
    assert set(has) == set(ROOMS)
    for room, name in has.items():
        for kind in Plugins().kinds(room):
            assert hasattr(Plugins().find(room, kind, room), name), f"{room}/{kind}.py"


MINE = """
from dataclasses import dataclass, replace
from mlm_mpi.config.keys import key
from mlm_mpi.errors import ConfigError

@dataclass(frozen=True)
class Settings:
    '''A model of the user's.'''
    kind: str = key("mine", says="The run trains this model.", room="models")
    depth: int = key(says="The model is this deep.", least=1, most=9, unit="layers")
    width: int = key(0, says="The model is this wide; 0 means twice its depth.")

    def resolved(self) -> "Settings":
        if self.depth == 7:
            raise ConfigError("model.depth = 7 does not work: set 8")
        return replace(self, width=self.width or 2 * self.depth)


def build(settings, sizes):
    pass
"""


@pytest.fixture
def plugins(tmp_path: Path) -> Plugins:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.py").write_text(MINE)
    return Plugins(tmp_path)


def test_a_kind_of_the_users_own_declares_its_keys(plugins: Plugins) -> None:
    mine = ["model.kind=mine"]
    c = config.load(None, [*mine, "model.depth=3"], plugins)
    assert config.to_table(c)["model"] == {"kind": "mine", "depth": 3, "width": 6}
    assert config.from_table(config.to_table(c), "a table", plugins) == c
    assert refused(*mine, plugins=plugins) == "model.depth has no default: set it"
    assert refused(*mine, "model.depth=10", plugins=plugins) == "--set: model.depth = 10 must be in [1, 9]"
    assert refused(*mine, "model.depth=7", plugins=plugins) == "model.depth = 7 does not work: set 8"
    assert refused("model.depth=3", plugins=plugins).endswith(
        '"mine" knows it: take it out, or set model.kind = "mine"'
    )
    assert "is none of bert, encoder_decoder" in refused(*mine, "model.depth=3")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("depth: int", "depth: list", "mine.py: Settings.depth is a list: make it int, float, bool, str or a Literal"),
        ("depth: int", "depth: 'Gone'", "name 'Gone' is not defined: mend it"),
        (
            'key(says="The model is this deep.", least=1, most=9, unit="layers")',
            "3",
            "models/mine.py: Settings.depth is not made by key(…)",
        ),
        ("    kind: str", "    sort: str", "models/mine.py: Settings has no key kind: declare it"),
        ("class Settings", "class Setting", "models/mine.py has no dataclass Settings"),
        ("from dataclasses", "from dataklasses", "mine.py does not load: ModuleNotFoundError"),
    ],
)
def test_a_kind_that_is_declared_wrong(plugins: Plugins, tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in MINE
    (tmp_path / "models" / "mine.py").write_text(MINE.replace(old, new, 1))
    assert said in refused("model.kind=mine", "model.depth=3", plugins=plugins)


ALONE = """
import os, sys
import mlm_mpi.backend, mlm_mpi.comm, mlm_mpi.data, mlm_mpi.models, mlm_mpi.monitor, mlm_mpi.optim, mlm_mpi.tasks
import mlm_mpi.train, mlm_mpi.commands.train
from mlm_mpi import config

def pin(numerics):
    assert (numerics.level, numerics.threads) == ("base", 3)
    assert not {"numpy", "msgspec", "mpi4py"} & set(sys.modules), "loaded too early"
    config.prepare_environment(numerics)

config.load(None, ["numerics.threads=3", "model.layers=2", "numerics.level=base"], pin=pin)
assert "numpy" in sys.modules
assert os.environ["OPENBLAS_NUM_THREADS"] == "3" and os.environ["OPENBLAS_CORETYPE"] == "Nehalem"
"""


def test_numerics_are_read_and_pinned_before_numpy_loads() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_section_in_which_every_character_is_written_as_toml(tmp_path: Path) -> None:
    c = config.load(None)
    odd = dataclasses.replace(c, data=dataclasses.replace(c.data, dir="".join(map(chr, range(1, 0x250))) + "😀"))
    path = tmp_path / "saved.toml"
    path.write_bytes(config.to_toml(odd).encode())
    assert config.load(path) == odd
