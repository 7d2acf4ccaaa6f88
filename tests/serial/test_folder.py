"""The run folder: its lock, its paths, the command it records."""

import os
import resource
import sys
from pathlib import Path

import pytest

from mlm_mpi import config
from mlm_mpi.errors import ConfigError
from mlm_mpi.train import folder
from mlm_mpi.train.folder import RunFolder, findable


def test_a_disk_without_room_for_a_lock_is_one_line(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # as a full disk, but for the name of the error
    try:
        with pytest.raises(ConfigError, match=f"cannot use {tmp_path}/run as run folder: File too large: give another"):
            RunFolder(tmp_path / "run").acquire()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "run").exists(), "nothing stays of a run folder that could not be made"
    RunFolder(tmp_path / "run").acquire()


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "DONE", "checkpoints", "catalog.json", "notes.md"])
def test_a_folder_with_files_that_no_run_wrote_is_refused_and_left_alone(tmp_path, name):
    """`--run .` beside one's own config.toml would write over it."""
    (tmp_path / name).write_text("precious")
    with pytest.raises(
        ConfigError, match=f"{tmp_path} holds {name}, which no run of mlm-mpi wrote: give another --run"
    ):
        RunFolder(tmp_path).acquire()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "precious"}


def test_who_names_a_folder_by_another_option_is_told_of_that(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="mine.txt, which no run of mlm-mpi wrote: give another --out, or move them"):
        RunFolder(tmp_path, "--out").acquire()


def test_a_folder_with_the_log_of_a_job_may_hold_a_run(tmp_path):
    (tmp_path / "job-17.log").write_text("of Slurm")
    (tmp_path / ".gitignore").touch()
    RunFolder(tmp_path).acquire()
    assert (tmp_path / "job-17.log").read_text() == "of Slurm"


def test_a_start_that_was_killed_at_once_leaves_a_folder_that_the_next_takes(tmp_path, monkeypatch):
    """The lock comes first: without it, what else was made would look like somebody else's."""
    run = tmp_path / "run"
    monkeypatch.setattr(folder, "Lock", lambda path: os._exit(9))
    if (child := os.fork()) == 0:
        RunFolder(run).acquire()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert run.exists()
    monkeypatch.undo()
    RunFolder(run).acquire()


def test_a_name_that_no_file_system_takes_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="as run folder: File name too long: give another --run"):
        RunFolder(tmp_path / ("x" * 300)).acquire()


def test_the_corpus_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert findable(config.load(None, ["data.dir=a/../b"])).data.dir == f"{tmp_path}/a/../b"
    assert findable(config.load(None, ["data.dir=/c"])).data.dir == "/c"
    mixed = config.load(None, ['data.mixture=["/c","d"]', "data.weights=[0.5,0.5]"])
    assert findable(mixed).data.mixture == ("/c", f"{tmp_path}/d")


def test_a_path_that_no_file_of_a_run_can_hold_is_refused(tmp_path, monkeypatch):
    latin = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    latin.mkdir()
    monkeypatch.chdir(latin)
    with pytest.raises(ConfigError, match=r"data.dir = '.*caf\\udce9/corpus' is no UTF-8.*: rename it"):
        findable(config.load(None))


@pytest.mark.parametrize(
    ("program", "name"), [("/a/bin/mlm-mpi", "mlm-mpi"), ("/a/mlm_mpi/__main__.py", "mlm-mpi"), ("./my.py", "./my.py")]
)
def test_a_run_records_its_command_as_a_line_for_a_shell(tmp_path, monkeypatch, program, name):
    monkeypatch.setattr(sys, "argv", [program, "train", "a b.toml", "--run", "r"])
    RunFolder(tmp_path).describe(config.load(None), {}, 1)
    assert f'"command": "{name} train \'a b.toml\' --run r",\n' in (tmp_path / "environment.json").read_text()
