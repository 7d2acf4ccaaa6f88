"""Stacks of all threads of a process, written when another process of its user asks for them by SIGUSR2.

The handler is C: it also answers where Python's interpreter lock is never given away. What it writes lies in memory
that has no name, so nothing has to be removed; another process reads it through /proc. Open MPI, MPICH and Slurm send
no SIGUSR2 of their own; mpiexec hands on one that it is sent, which does no harm then.
"""

import contextlib
import faulthandler
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path

_NAME = "mlm-mpi-stacks"
_LIMIT_S = 1.0
_POLL_S = 0.02
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')
_FRAMES = 4


def register() -> int:
    """From now on SIGUSR2 writes this process' stacks, to the file descriptor returned."""
    descriptor = os.memfd_create(_NAME)
    faulthandler.register(signal.SIGUSR2, file=descriptor, all_threads=True)
    return descriptor


def of(processes: Mapping[int, int]) -> dict[int, str]:
    """The stacks of processes, by what `register` gave each of them; those that do not answer in time are left out."""
    begun = {}
    for process, descriptor in processes.items():
        path = Path(f"/proc/{process}/fd/{descriptor}")
        with contextlib.suppress(OSError):
            if _NAME in str(path.readlink()):  # else another process has its number by now
                begun[process] = path, path.stat().st_size
                os.kill(process, signal.SIGUSR2)
    found, before = dict[int, str](), dict.fromkeys(begun, "")
    end = time.monotonic() + _LIMIT_S
    while begun.keys() - found.keys() and time.monotonic() < end:
        time.sleep(_POLL_S)
        now = {process: _written(*begun[process]) for process in begun.keys() - found.keys()}
        found |= {process: text for process, text in now.items() if text and text == before[process]}
        before |= now
    return found


def _written(path: Path, start: int) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def innermost(text: str) -> str:
    """The last frames of the main thread, which comes last: `spin (fault.py:3) < backward (chain.py:48)`."""
    frames = [found for block in text.split("\n\n") if (found := _FRAME.findall(block))]
    last = frames[-1][:_FRAMES] if frames else []
    return " < ".join(f"{name} ({Path(file).name}:{line})" for file, line, name in last)
