"""One start of a run under the launcher, as `mlm-mpi chaos` sees it: what it says, and when; its ranks' processes."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import psutil

from mlm_mpi.comm.launch import ANNOUNCED

_READ_S = 5.0
STRUCK = "chaos: "  # begins what a rank says that is about to go wrong

# `mlm-mpi run` for ranks that something goes wrong inside of
_LAUNCH = (
    "import sys; from mlm_mpi.comm.launch import supervise; from mlm_mpi.launcher import Limits, run_job; "
    "program = [sys.executable, '-P', '-m', 'mlm_mpi.chaos.inside', *sys.argv[2:]]; "
    "ranks = int(sys.argv[1]); limits = Limits(joins=True, recovers=ranks > 1); "
    "sys.exit(supervise(lambda: run_job(program, ranks, limits=limits)))"
)


class Job:
    """`words` of a training on `ranks` ranks. `inside`: a fault's plan as plain data, for chaos/inside.py."""

    def __init__(self, ranks: int, words: Sequence[str], inside: dict[str, object] | None = None) -> None:
        self.said: list[tuple[float, str]] = []  # when, line
        self.hit = 0  # signals that found their rank
        command = ["-P", "-m", "mlm_mpi", "run", "-n", str(ranks), "--", *words]
        if inside is not None:
            command = ["-P", "-c", _LAUNCH, str(ranks), json.dumps(inside), *words]
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append((time.monotonic(), line.rstrip("\n")))

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of the ranks, by rank."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error, ValueError):
                environment = process.environ()
                name = next((rank for rank, _ in ANNOUNCED if rank in environment), None)
                if name is not None and any(word.startswith("mlm_mpi") for word in process.cmdline()):
                    found[int(environment[name])] = process
        return found

    def signal(self, victims: Sequence[int], number: signal.Signals) -> None:
        """Sends a signal to ranks that are there."""
        ranks = self.ranks() if self.process.poll() is None else {}
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess, KeyError):
                ranks[victim].send_signal(number)
                self.hit += 1

    def wait(self, timeout_s: float) -> bool:
        """Whether it ends in time; else it is killed."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return False
        self._reader.join(_READ_S)
        return True

    def when(self, begin: str) -> list[float]:
        """When it said lines that begin like this."""
        return [then for then, line in self.said if line.startswith(begin)]

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.said)

    @property
    def weights(self) -> str:
        """The hash it ended with; "" where it has none."""
        last = self.said[-1][1] if self.said else ""
        return last.split()[2] if last.startswith("weights sha256 ") else ""
