"""What ends a program is one line and an exit code, and a traceback only where it is a bug."""

import os

import pytest

from mlm_mpi.comm import launch
from mlm_mpi.errors import CommError, DataError, LaunchError


def ending(body, capsys):
    code = launch.supervise(body)
    return code, capsys.readouterr().err


def raising(error):
    def body():
        raise error

    return body


def test_an_error_of_ours_is_one_line(capsys):
    assert ending(raising(DataError("no corpus")), capsys) == (2, "mlm-mpi: no corpus\n")
    assert ending(raising(CommError("nobody came")), capsys) == (75, "mlm-mpi: nobody came\n")


def test_memory_that_is_not_there_is_one_line(capsys):
    code, err = ending(raising(MemoryError("Unable to allocate 1 TiB")), capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("mlm-mpi: out of memory: Unable to allocate 1 TiB: lower")


def test_a_file_of_the_machine_is_one_line_and_a_bug_is_a_traceback(capsys, tmp_path):
    code, err = ending(lambda: len((tmp_path / "nothing").read_text()), capsys)
    assert (code, err) == (
        2,
        f"mlm-mpi: {tmp_path}/nothing: No such file or directory: mend it, or give another path\n",
    )
    code, err = ending(raising(OSError("no file is named")), capsys)
    assert code == 1 and "Traceback" in err
    code, err = ending(lambda: 1 // 0, capsys)
    assert code == 1 and err.endswith("ZeroDivisionError: integer division or modulo by zero\n")


def test_junk_of_a_launcher_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("PMI_RANK", "one")
    monkeypatch.setenv("PMI_SIZE", "2")
    code, err = ending(lambda: 0, capsys)
    assert (code, err) == (
        2,
        "mlm-mpi: PMI_RANK = 'one' in the environment is not a whole number: unset or correct it\n",
    )
    with pytest.raises(LaunchError):
        launch.announced()


@pytest.mark.parametrize("text", ["", "nan", "-3", "soon", "inf"])
def test_a_limit_of_the_start_has_to_be_a_time(text, monkeypatch):
    monkeypatch.setenv(launch.START_VARIABLE, text)
    with pytest.raises(LaunchError, match=f"MLM_MPI_START_S = '{text}' is not a number of seconds"):
        launch._start_limit()


def test_the_watch_over_mpi_init_leaves_with_it():
    with launch._watched("rank 0 of 1", 60):
        pass
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
