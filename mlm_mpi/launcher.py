"""`mlm-mpi run`: starts the ranks, carries signals to them, and leaves nothing behind.

A thin layer over `mpiexec` for what each MPI library does its own way: binding, signals, banners, orphans.

Exit code: that of the job; 129, 130 or 143 where SIGHUP, SIGINT or SIGTERM made the job stop and it ended
by itself; 137 where it did not end within the grace and was killed. SIGUSR1 is the ranks' request to agree
on a step, save and leave: the launcher forwards it, and turns the other three signals into it. Only `train`
saves: any other command has no grace, and ends at once with 129, 130 or 143. 75: the ranks did not all arrive.
"""

import argparse
import contextlib
import ctypes
import math
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import psutil

from mlm_mpi import config, mpiexec, signs
from mlm_mpi.arguments import Parser
from mlm_mpi.banners import BannerFilter, EchoFilter
from mlm_mpi.comm import launch
from mlm_mpi.commands import finetune
from mlm_mpi.commands import train as training
from mlm_mpi.errors import CommError, LaunchError
from mlm_mpi.files import HeldError, Lock
from mlm_mpi.monitor import live
from mlm_mpi.monitor.live import Shown
from mlm_mpi.monitor.screen import Screen
from mlm_mpi.plug import named
from mlm_mpi.signs import Arrivals, Signs

GRACE_S = 60.0
START_S = 300.0
_SOON_S = 0.5  # a start that lasts longer is drawn
_WORD_S = 20.0  # a start that lasts longer is worth a word
_TERM_S = 2.0  # from SIGINT or SIGTERM to SIGKILL; Open MPI ends its ranks in half a second
_REPEAT_S = 1.0
_TRAININGS = ("train", "finetune")
_JOINERS = (*_TRAININGS, "prepare", "evaluate", "generate", "predict")  # commands whose ranks call MPI_Init
_SHARED_MEMORY = Path("/dev/shm")
_OLD_S = 86400.0

# Runs before each rank's program. The kernel kills the rank when its MPI daemon dies: SIGKILL of mpiexec
# would leave it an orphan. A daemon that has died before that is told by the launcher, which died before it.
# SIGUSR1 is ignored until the trainer listens, else it would end a rank that still imports; the launcher
# repeats it, so the request is not lost.
_GUARD = "; ".join([  # one line: Open MPI 5 cuts an argument at its line ends
    "import ctypes, os, signal, sys",
    "ctypes.CDLL(None).prctl(1, signal.SIGKILL)",
    f"process, *place = os.environ['{signs.VARIABLE}'].split()",
    "here = os.uname().nodename",
    "place != [here, os.readlink('/proc/self/ns/pid')] or os.path.exists('/proc/' + process) or os._exit(1)",
    "signal.signal(signal.SIGUSR1, signal.SIG_IGN)",
    f"rank = next((os.environ[name] for name in {[rank for rank, _ in launch.ANNOUNCED]} if name in os.environ), '0')",
    "os.write(2, f'{chr(2)}mlm-mpi arrival {rank} started {here} {os.getpid()}{chr(10)}'.encode())",
    "os.execv(sys.argv[1], sys.argv[1:])",
])  # fmt: skip

_EXAMPLES = """examples:
  mlm-mpi run -n 4 -- train jobs/configs/tiny.toml --run runs/four
  mlm-mpi run -n 2 -- evaluate runs/four
  mlm-mpi run -n 4 --mpiexec /usr/bin/mpiexec --mpiexec-args='--bind-to core' -- train …

Ctrl-C lets train save and leave; the same command goes on."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `mlm-mpi run`."""
    parser.epilog, parser.usage = _EXAMPLES, "mlm-mpi run [-n RANKS] [OPTION …] -- COMMAND …"
    parser.add_argument(
        "-n", "-np", "--ranks", type=int, default=None, help="ranks to start (default: SLURM_NTASKS, else 1)"
    )
    parser.add_argument(
        "--spares", type=int, default=0, metavar="N",
        help="so many more ranks, one of which takes the place of a rank of train that dies (comm.spares)",
    )  # fmt: skip
    parser.add_argument("--mpiexec", metavar="PATH", help="the launcher to use (default: beside python, else on PATH)")
    parser.add_argument("--mpiexec-args", metavar="TEXT", default="", help="more options for mpiexec, in one string")
    parser.add_argument(
        "--grace", type=float, default=GRACE_S, metavar="S", help="seconds for train to save and leave after Ctrl-C"
    )
    parser.add_argument(
        "--start-timeout", type=float, default=START_S, metavar="S",
        help=f"end the job if not all ranks have arrived by then ({START_S:g})",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true",
        help="only check what train is asked for, as before a submission: exit code 2 if it would be refused",
    )  # fmt: skip
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="train CONFIG --run DIR …")


def main(args: argparse.Namespace) -> int:
    """Runs `python -m mlm_mpi <command>` on every rank. Raises LaunchError, ConfigError."""
    command = args.words[1:] if args.words[:1] == ["--"] else args.words
    command = command[command[:1] == ["mlm-mpi"] :]  # as one writes behind mpiexec
    if signs.is_heard():
        raise LaunchError("mlm-mpi run inside mlm-mpi run would start a job for each rank: leave one of them out")
    if not command:
        raise LaunchError("nothing to run: write mlm-mpi run -n 2 -- train CONFIG --run DIR")
    ranks, command = _with_spares(args, command)
    for name, value, least in (("--grace", args.grace, 0.0), ("--start-timeout", args.start_timeout, 1.0)):
        if not (math.isfinite(value) and value >= least):
            raise LaunchError(f"{name} {value:g} must be a number of seconds, at least {least:g}")
    recovers = command[0] in _TRAININGS and _check_training(command[0], command[1:], ranks)
    if args.check:
        return 0
    grace_s = args.grace if command[0] in _TRAININGS else None
    limits = Limits(grace_s, args.start_timeout, command[0] in _JOINERS, recovers)
    program = [sys.executable, "-P", "-m", "mlm_mpi", *command]  # -P: nothing is imported from the current folder
    return run_job(program, ranks, args.mpiexec, args.mpiexec_args, limits)


def _with_spares(args: argparse.Namespace, command: list[str]) -> tuple[int, list[str]]:
    """(all ranks to start, the command that knows how many of them are spares). Raises LaunchError."""
    if args.spares < 0:
        raise LaunchError(f"--spares {args.spares} must not be negative")
    if args.spares and command[0] not in _TRAININGS:
        raise LaunchError(f"--spares {args.spares} is for train: {command[0]} needs no spares")
    if not args.spares:
        return launch.number("SLURM_NTASKS", 1) if args.ranks is None else args.ranks, command
    ranks = launch.number("SLURM_NTASKS", 1 + args.spares) if args.ranks is None else args.ranks + args.spares
    return ranks, [*command, "--set", f"comm.spares={args.spares}"]


def _check_training(name: str, words: Sequence[str], ranks: int) -> bool:
    """Finds here, before a hundred processes start, what each of them would find. Whether it shall recover."""
    parser, module = Parser(name), finetune if name == "finetune" else training
    module.configure(parser)
    args = parser.parse(words)
    settings = module.settings(args, named(args.plugins))
    config.check_ranks(settings, ranks)
    plain = config.is_plain(settings) and settings.comm.reduction != "nccl"  # which has ranks of its own
    return settings.comm.recover and ranks > 1 and plain


@dataclass(frozen=True)
class Limits:
    """How long a job may take to end and to start.

    `grace_s`: from a signal to SIGKILL; None: the program saves nothing, so a signal ends it at once. `joins`: the
    start ends when MPI_Init has returned on all ranks, else when all processes run.
    """

    grace_s: float | None = GRACE_S
    start_s: float = START_S
    joins: bool = False
    recovers: bool = False  # wanted: the ranks go on without one that dies, where the MPI library can


def run_job(
    program: Sequence[str],
    ranks: int,
    given: str | None = None,
    more: str = "",
    limits: Limits | None = None,
) -> int:
    """Runs `program` on `ranks` ranks by the mpiexec `given`, told `more`; returns the exit code described above.

    Raises LaunchError; CommError where the ranks did not all arrive in time.
    """
    limits = limits or Limits()
    if ranks < 1:
        raise LaunchError(f"-n {ranks} must be at least 1")
    try:
        extra = shlex.split(more)
    except ValueError as error:
        raise LaunchError(f"--mpiexec-args {more!r} cannot be split into words: {error}") from None
    path = mpiexec.find(given)
    version = mpiexec.version_text(path)
    flavour = mpiexec.vendor(version)
    with _scratch_folder() as folder:
        major = mpiexec.openmpi_major(version)
        recovers = limits.recovers and mpiexec.can_recover(path, flavour, major)
        options = mpiexec.options(flavour, ranks, extra, folder, major, recovers)
        guarded = [sys.executable, "-ISc", _GUARD, *program]
        command = [path, "-n", str(ranks), *options, *guarded]
        here = None if mpiexec.several_nodes(extra) else folder
        environment = mpiexec.environment(flavour, ranks, limits.start_s, here, path)
        limits = replace(limits, recovers=recovers)
        return _Job(command, environment, limits, ranks, mpiexec.end_signals(flavour, extra)).run()


@contextlib.contextmanager
def _scratch_folder() -> Iterator[str]:
    """A folder for the ranks' shared memory and Open MPI's sockets, which killed ranks would leave for ever."""
    root = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    prefix = f"mlm-mpi-{os.geteuid()}-"
    for folder in root.glob(f"{prefix}*"):
        _remove_dead(folder)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=root, ignore_cleanup_errors=True) as name:
        lock = Lock(Path(name, "launcher.lock"))
        try:
            yield name
        finally:
            lock.release()


def _remove_dead(folder: Path) -> None:
    """Removes what a launcher that was killed has left: nobody holds its lock any more."""
    try:
        if not (folder / "launcher.lock").exists() and time.time() - folder.stat().st_mtime < _OLD_S:
            return  # it may be about to take its lock
        Lock(folder / "launcher.lock").release()
    except (HeldError, OSError):
        return
    shutil.rmtree(folder, ignore_errors=True)


class _Job:
    """One mpiexec in a session of its own, so that Ctrl-C reaches this process alone."""

    def __init__(
        self, command: list[str], environment: dict[str, str], limits: Limits, ranks: int,
        signals: tuple[signal.Signals, signal.Signals],
    ) -> None:  # fmt: skip
        self.command = command
        self.environment = environment
        self.grace_s, self.limits = limits.grace_s, limits
        self.arrivals = Arrivals(ranks, "joined" if limits.joins else "started")
        self.screen = Screen(live.can_draw())
        self.end_signal, self.orphan_signal = signals
        self.cause: signal.Signals | None = None  # INT, TERM or HUP, once received
        self.again = False  # one more came
        self.lost = False  # a node; mpirun exits with 0 then
        self.ends: dict[str, int] = {}  # what was said (signs "end") -> the first exit code
        self.over_at = float("inf")  # when a job is to be gone that is over for all
        self.deadline = float("inf")
        self.repeat_at = float("inf")
        self.began: float | None = None  # while the ranks are awaited
        self.worded = False
        self.worded_end = False  # why the job is over has been said

    def run(self) -> int:
        """Starts the job and sees it to its end."""
        with self._listening():
            try:
                process = subprocess.Popen(
                    self.command, env=self.environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                    # what nobody draws on is not ours to hold: it outlives this process, byte for byte
                    stdout=subprocess.PIPE if self.screen.drawn else None,
                    start_new_session=True, preexec_fn=self._before_exec,
                )  # fmt: skip
            except OSError as error:
                raise LaunchError(f"cannot start {self.command[0]}: {error.strerror}") from None
            banners = BannerFilter(self._report_death, self._report_loss)
            pump = threading.Thread(target=self._pump, args=(process, banners), daemon=True)
            pump.start()
            code = self._wait(process)
            pump.join(timeout=5)
            self.screen.close()
            code = self._told(code or int(self.lost), banners.passed)
        if code and not banners.passed and self.cause is None and not self.worded_end:
            self.screen.say(
                f"the job ended with exit code {code} and no message: a rank left silently, or without MPI_Finalize"
            )
        if not code and self.arrivals.seen < self.arrivals.ranks:
            raise LaunchError(
                f"{self.command[0]} ended with exit code 0, but {self.arrivals.seen} of {self.arrivals.ranks} ranks "
                "reported: it does not start ranks, or hides what they write to stderr: give another --mpiexec"
            )
        return code

    def _pump(self, process: subprocess.Popen[bytes], banners: BannerFilter) -> None:
        """Passes on what the job says, but for signs and banners, until nobody can say anything any more."""
        handlers = {"arrival": self.arrivals.note, live.WORD: self.screen.show, "end": self._hear_end}
        said, echoes = Signs(handlers), EchoFilter()
        with selectors.DefaultSelector() as sources:
            for descriptor, pipe in ((1, process.stdout), (2, process.stderr)):
                if pipe is not None:
                    sources.register(pipe.fileno(), selectors.EVENT_READ, descriptor)
            while sources.get_map():
                for key, _ in sources.select():
                    data = os.read(key.fd, 65536)
                    if not data:
                        sources.unregister(key.fd)
                    self.screen.write(key.data, data if key.data == 1 else echoes.feed(banners.feed(said.feed(data))))
        self.screen.write(2, echoes.feed(banners.feed(said.close()) + banners.close()) + echoes.close())

    def _hear_end(self, text: str) -> None:
        """A rank has failed, which the others may survive, or the program has ended; or all is over: a lookout has
        seen it, and ranks that cannot be reached would be waited for."""
        how, _, code = text.partition(" ")
        if how in ("failed", "lost", "ended", "over") and code.isdecimal():
            self.ends.setdefault(how, int(code))
            if how == "over":
                self.over_at = min(self.over_at, time.monotonic() + _TERM_S)

    def _told(self, code: int, explained: bool) -> int:
        """The exit code of ranks that recover: mpiexec's is 0 when all have died, and that of one when others lived."""
        if "over" in self.ends and self.cause is None:
            return self.ends["over"]
        if not self.limits.recovers or self.cause is not None or self.worded_end:
            return code
        if "ended" in self.ends:
            return self.ends["ended"]
        if "failed" not in self.ends and not explained:
            again = "" if self.grace_s is None else ": start again to go on from the last checkpoint"
            who = "a rank has died before the others could go on" if "lost" in self.ends else "all ranks have died"
            self._say_end(f"{who} (often the memory limit: see dmesg){again}")
        return self.ends.get("failed", code or 128 + signal.SIGKILL)

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
        if self.end_signal != signal.SIGTERM:  # see mpiexec._DEAF_DAEMON; mpiexec gives its ranks an empty mask
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.repeat_at = 0.0
        if number == signal.SIGUSR1:
            return
        self.again = self.cause is not None
        self.cause = self.cause or signal.Signals(number)
        at_once = self.again or self.grace_s is None or self._is_starting()
        self.deadline = 0.0 if at_once else time.monotonic() + (self.grace_s or 0.0)
        if not at_once:
            kills = "; Ctrl-C again kills" if number == signal.SIGINT else ""
            self.screen.say(f"{_cause(number)}: stopping after this step{kills}")

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        self.began = time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=0.05)
                break
            now = time.monotonic()
            if now >= self.deadline:
                return self._kill(process)
            if now >= self.over_at:
                self._end(process)
                return 128 + signal.SIGKILL
            self._watch_start(process, now)
            if now >= self.repeat_at and not self._may_break_the_start(now):
                process.send_signal(signal.SIGUSR1)
                self.repeat_at = now + _REPEAT_S
        self._kill_session(process.pid)
        if code < 0:
            stands = "" if self.grace_s is None else ", the last checkpoint, if any, stands"
            self._say_end(f"mpiexec died by {_name(-code)}: the ranks were killed{stands}")
            return 128 - code
        return 128 + self.cause if self.cause and code == 0 else code

    def _may_break_the_start(self, now: float) -> bool:
        """Whether SIGUSR1 could kill what mpiexec is starting: its daemon on another node, seen under Slurm. Ranks of
        which none is heard after a while are not heard at all.
        """
        return self.began is not None and (self.arrivals.seen > 0 or now - self.began < _WORD_S)

    def _is_starting(self) -> bool:
        """Ranks are on their way, and nothing is there to be saved."""
        return self.arrivals.seen > 0 and bool(self.arrivals.missing())

    def _watch_start(self, process: subprocess.Popen[bytes], now: float) -> None:
        """Names the ranks that have not arrived: once as a word, and at the limit as the end of the job."""
        if self.began is None:
            return
        missing = len(self.arrivals.missing())
        if not missing:
            self.began = None  # from now on ranks watch each other (comm.timeout_s)
            self.screen.draw(None)
            return
        waited = now - self.began
        if waited >= _SOON_S:
            ranks = self.arrivals.ranks
            self.screen.draw(Shown("starting", ranks - missing, ranks, f"{ranks - missing} of {ranks} ranks"))
        if (
            waited >= self.limits.start_s and not self.arrivals.seen
        ):  # as with --output …:nocopy; MPI_Init has its limit
            self.began = None
            self.screen.say(f"no rank was heard on stderr within {waited:.0f} s: the start is not watched from here")
        elif waited >= self.limits.start_s:
            where = self.arrivals.describe()
            self._end(process)
            raise CommError(
                f"the job has not started within {waited:.0f} s (--start-timeout): {where}: "
                "look at what holds it up, or raise --start-timeout"
            )
        elif waited >= _WORD_S and not self.worded:
            self.worded = True
            self.screen.say(f"still waiting for the start after {waited:.0f} s: {self.arrivals.describe()}")

    def _kill(self, process: subprocess.Popen[bytes]) -> int:
        assert self.cause is not None
        if self.grace_s is None or self._is_starting():
            early = " before all ranks had arrived" if self._is_starting() else ""
            self._say_end(f"stopped by {_cause(self.cause)}{early}")
            code = 128 + self.cause
        else:
            had = "asked twice" if self.again else f"which had {self.grace_s:g} s to end after {_cause(self.cause)}"
            self._say_end(f"killing the job, {had}: the last checkpoint, if any, stands")
            code = 128 + signal.SIGKILL
        self._end(process)
        return code

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(self.end_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_TERM_S)
        self._kill_session(process.pid)
        process.wait()

    def _kill_session(self, session: int) -> None:
        """SIGKILLs what is left of mpiexec's session and returns when it is gone."""
        deadline = time.monotonic() + 5
        while left := _members(session):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if time.monotonic() > deadline:
                numbers = ", ".join(str(process.pid) for process in left)
                self.screen.say(f"cannot kill process {numbers}: look at it with ps")
                return
            time.sleep(0.01)

    def _say_end(self, text: str) -> None:
        """The one line that says why the job is over."""
        self.worded_end = True
        self.screen.say(text)

    def _report_loss(self, what: str) -> None:
        self.lost = True
        if "over" in self.ends:
            return
        again = "" if self.grace_s is None else "; start again to go on from the last checkpoint"
        self.screen.say(f"lost {what}{again}")

    def _report_death(self, rank: int, number: int) -> None:
        if self.cause is None and "over" not in self.ends:  # else it has been said why
            hint = " (often the memory limit: see dmesg)" if number == signal.SIGKILL else ""
            again = "" if self.grace_s is None else "; start again to go on from the last checkpoint"
            self.screen.say(f"rank {rank} died by {_name(number)}{hint}{again}")


def _members(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _cause(number: int) -> str:
    """A signal's name as the person knows it who sent it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
