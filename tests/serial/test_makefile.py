"""What `make clean` and `make distclean` take away, and above all what they leave."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
PREPARE = "mlm-mpi prepare --builtin --out corpus"
TRAIN = "mlm-mpi train jobs/configs/tiny.toml --run runs/tiny --set data.dir=corpus"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def write(path: Path, content: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def corpus(folder: Path, command: str) -> Path:
    write(folder / "prepared.json", json.dumps({"command": command}))
    return write(folder / "catalog.json")


def run(folder: Path, command: str | list[str]) -> Path:
    write(folder / "environment.json", json.dumps({"command": command}))
    return write(folder / "checkpoints" / "step-00000300" / "manifest.json")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A scratch copy in which `make train` seems to have run, with caches and builds."""
    shutil.copy(MAKEFILE, tmp_path)
    for name in ("mlm_mpi", "tests", "benchmarks", "kernels"):
        write(tmp_path / name / "__pycache__" / "cached.pyc")
    for name in ("build/lib/x.o", "dist/x.whl", "x.egg-info/x", ".mypy_cache/x", ".ruff_cache/x", ".hypothesis/x"):
        write(tmp_path / name)
    write(tmp_path / ".venv" / ".made-by-make")
    corpus(tmp_path / "corpus", PREPARE)
    run(tmp_path / "runs" / "tiny", TRAIN)
    return tmp_path


def make(folder: Path, *words: str) -> str:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(  # as typed, also where `make test` runs this
        ["make", f"PYTHON={sys.executable}", *words], cwd=folder, env=outside, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_clean_removes_caches_and_builds_only(checkout):
    own = {path for path in files(checkout) if path.startswith((".venv", "corpus", "runs", "Makefile"))}
    own.add(str(write(checkout / "mlm_mpi" / "backend" / "_cpu.so").relative_to(checkout)))
    own.add(str(write(checkout / "my runs" / "__pycache__" / "a.pyc").relative_to(checkout)))
    assert make(checkout, "clean") == ""
    assert files(checkout) == own


def test_distclean_removes_what_make_train_made(checkout):
    write(checkout / "mlm_mpi" / "backend" / "_cpu.so")
    assert make(checkout, "distclean") == ""
    assert files(checkout) == {"Makefile"}
    assert not (checkout / "runs").exists()


def test_distclean_leaves_and_names_what_it_did_not_make(checkout):
    kept = [
        corpus(checkout / "corpus", PREPARE + " --vocab 8192"), run(checkout / "runs" / "tiny", TRAIN + " --quiet"),
        run(checkout / "runs" / "by hand", TRAIN), run(checkout / "runs" / "b", ["mlm-mpi", "train"]),
    ]  # fmt: skip
    (checkout / ".venv" / ".made-by-make").unlink()
    said = make(checkout, "distclean")
    names = [".venv", "corpus", "runs/b", "runs/by hand", "runs/tiny"]
    assert said.splitlines() == [f"{name} stays: make did not make it" for name in names]
    assert all(path.exists() for path in kept) and (checkout / ".venv").is_dir()


@pytest.mark.parametrize("missing", ["prepared.json", "environment.json"])
def test_distclean_leaves_what_does_not_say_who_made_it(checkout, missing):
    (path,) = checkout.glob(f"**/{missing}")
    path.unlink()
    assert make(checkout, "distclean") == f"{path.parent.relative_to(checkout)} stays: make did not make it\n"


def test_distclean_asks_for_the_commands_that_make_train_gives(checkout):
    """The words after the program's name, as prepare and train record them."""
    (checkout / "corpus" / "catalog.json").unlink()
    for name in ("setup.cfg", "setup.py", "pyproject.toml"):
        write(checkout / name)
    shown = [shlex.split(line) for line in make(checkout, "-n", "train").splitlines() if ".venv/bin/mlm-mpi" in line]
    commands = [words[words.index("--") + 1 :] if "--" in words else words[1:] for words in shown]
    assert commands[:2] == [shlex.split(PREPARE)[1:], shlex.split(TRAIN)[1:]]


def test_help_lists_both(checkout):
    assert {"clean", "distclean"} <= {line.split()[0] for line in make(checkout, "help").splitlines()}


@pytest.mark.parametrize("folder", ["corpus", "runs/tiny"])
def test_distclean_leaves_a_folder_in_which_other_files_lie(checkout, folder):
    """Made by make's own words, and then used for something else."""
    (checkout / folder / "thesis.tex").write_text("precious")
    assert f"{folder} stays" in make(checkout, "distclean")
    assert (checkout / folder / "thesis.tex").read_text() == "precious"
