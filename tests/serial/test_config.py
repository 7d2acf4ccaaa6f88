"""Every rule of the configuration, and that its errors name the value, the bound and the remedy."""

from pathlib import Path

import pytest

from mlm_mpi import config
from mlm_mpi.errors import ConfigError


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(None, overrides)
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
        "comm.overlap=1", "comm.reduction=ring", "optim.name=lion", "model.kind=rnn", "data.dir=7", "log.every=[1]",
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
    with pytest.raises(ConfigError, match="is a section"):
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
