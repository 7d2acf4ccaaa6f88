"""`mlm-mpi config`: every key is explained from its declaration, and docs/configuration.md is what it prints."""

from pathlib import Path

import pytest

from mlm_mpi import config
from mlm_mpi.__main__ import main

ROOT = Path(__file__).parents[2]
MANUAL = ROOT / "docs" / "configuration.md"

MINE = """
from dataclasses import dataclass
from mlm_mpi.config.keys import key
from mlm_mpi.optim import Common

@dataclass(frozen=True)
class Settings(Common):
    '''An optimiser of the user's.'''
    name: str = key("mine", says="This optimiser updates the weights.", room="optim")
    slope: float = key(says="The weights move by this much.", above=0, unit="a step")


def build(settings, store):
    pass
"""


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["config", *words]) == code
    out, err = capsys.readouterr()
    assert bool(err) == bool(code) and err.count("\n") <= 1
    return out or err


def test_the_manual_is_what_the_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    printed = said(capsys, "--markdown")
    stale = "docs/configuration.md is stale: mlm-mpi config --markdown >docs/configuration.md"
    assert MANUAL.read_text(encoding="utf-8") == printed, stale


def test_all_keys_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys)
    assert max(map(len, text.splitlines())) <= 120
    for section, values in config.to_table(config.load(None)).items():
        assert f"[{section}]" in text
        for name in values:
            assert f"\n  {name} = " in text
    assert "momentum = 0.9" in text, "of the kind that is not the default"


def test_one_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "train.rows").splitlines() == [
        "train.rows = 8",
        "  A micro-batch holds this many windows of text, which a rank computes at once.",
        "  type   a whole number",
        "  bounds at least 1",
        "  unit   windows",
    ]
    assert 'where  name = "sgd"' in said(capsys, "optim.momentum")
    assert "where" not in said(capsys, "optim.clip"), "every kind has it"
    assert "one of adamw, lion, muon, sgd" in " ".join(said(capsys, "optim.name").split())
    assert '"float32" or "float64"' in said(capsys, "train.dtype")


def test_one_section(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "checkpoint")
    assert text.startswith("[checkpoint]\n") and text.count("[") == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train.rowz"], "mlm-mpi: unknown key train.rowz; did you mean 'rows'?\n"),
        (["trian.rows"], "mlm-mpi: unknown section [trian]; did you mean 'train'?\n"),
        (["optim.momentun"], "mlm-mpi: unknown key optim.momentun; did you mean 'momentum'?\n"),
        (["train.rows", "--markdown"], "mlm-mpi: --markdown prints all keys, not train.rows alone: leave one out\n"),
        (["--plugins", "nowhere"], "mlm-mpi: --plugins nowhere is no folder: give one that holds models/, optim/ or"),
    ],
)
def test_what_is_unknown_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], line: str) -> None:
    assert said(capsys, *words, code=2).startswith(line)


def test_the_users_own_kinds_are_explained_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "mine.py").write_text(MINE)
    text = said(capsys, "--plugins", str(tmp_path))
    assert '[optim]  name = "mine"' in text and "slope = (must be set)" in text
    text = said(capsys, "--plugins", str(tmp_path), "optim.slope")
    assert "bounds positive" in text and 'where  name = "mine"' in text
    assert "adamw, lion, mine, muon, sgd" in said(capsys, "--plugins", str(tmp_path), "optim.name")
