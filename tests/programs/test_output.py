"""A training does not end because nobody can read what it says; a command whose output is its purpose says so."""

import os
import subprocess
import sys

from programs import TIMEOUT_S, Place

COMMAND = [sys.executable, "-P", "-m", "mlm_mpi"]


def shell(place: Place, words: list[str], redirection: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program started by a shell, with a redirection."""
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "bash", *COMMAND, *words], cwd=place.folder, env=os.environ | environment,
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip


def test_a_full_stdout_is_an_alarm_and_training_goes_on(place, straight):
    alone = shell(place, place.words("run", None), ">/dev/full")
    (line,) = alone.stderr.splitlines()
    assert line.startswith("mlm-mpi: ALARM cannot write to stdout (No space left on device): free space there")
    launched = shell(place, place.words("launched", 2), ">/dev/full")
    assert (alone.returncode, launched.returncode) == (0, 0)
    for run in ("run", "launched"):
        assert straight.weights in (place.folder / run / "DONE").read_text()


def test_a_full_stdout_of_a_command_that_prints_is_an_error(place, home, straight):
    place.copy_of(home, "straight")
    for words in (["evaluate", "straight"], ["doctor"], ["--help"]):
        told = shell(place, words, ">/dev/full")
        assert told.returncode == 2, words
        assert told.stderr.startswith("mlm-mpi: cannot write to stdout (No space left on device)"), told.stderr
        assert told.stderr.count("\n") == 1


def test_closed_streams_are_not_taken_by_files(place, straight):
    """The next file to be opened would be number 1, and what is printed would land in it."""
    run = shell(place, place.words("run", None), ">&- <&-")
    assert (run.returncode, run.stderr) == (0, "")
    assert straight.weights in (place.folder / "run" / "DONE").read_text()
    nothing = shell(place, place.words("other", None, "model.heads=3"), ">&- 2>&-")
    assert (nothing.returncode, nothing.stdout, nothing.stderr) == (2, "", "")


def test_a_terminal_without_our_characters(place):
    plain = {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for name, environment in zip(("one", "two"), plain, strict=True):
        run = shell(place, place.words(name, None, "train.steps=2"), "", **environment)
        assert run.returncode == 0, run.stderr
        assert "1 rank, 1 thread each" in run.stdout


def test_a_user_without_a_home(place):
    run = shell(place, place.words("run", None, "train.steps=2", "log.curve=true"), "", HOME="")
    assert (run.returncode, run.stderr) == (0, "")
    bare = subprocess.run(
        ["env", "-u", "HOME", *COMMAND, *place.words("other", None, "train.steps=2", "log.curve=true")],
        cwd=place.folder, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert (bare.returncode, bare.stderr) == (0, "")
    assert (place.folder / "other" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_reader_that_leaves_is_no_error(place, home, straight):
    place.copy_of(home, "straight")
    left = shell(place, ["generate", "straight", "--tokens", "5000"], "| head -c 1")
    assert left.stderr == ""
