"""Signs: lines of ranks for the launcher alone, on stderr, which every launcher carries from every node.

Two kinds. How far a rank has come: a rank that is stopped before or in MPI_Init says nothing, and the others wait for
it inside MPI, where they cannot speak; so each says where it is before it goes on, and the launcher names whoever did
not. And what rank 0 wants to be seen at the foot of the terminal (`monitor.live`), which only the launcher can draw.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from mlm_mpi.errors import ranges

STATES = ("started", "joining", "joined")  # its process runs; it calls MPI_Init; MPI_Init has returned
_WAITS = "waits in MPI_Init"
VARIABLE = "MLM_MPI_LAUNCHER"  # set where a launcher listens; holds `this_process()` of the launcher
_MARK = b"\x02mlm-mpi "  # no program writes a start-of-text byte by chance
_LINE = re.compile(_MARK + rb"([a-z]+) ([^\n]*)\n")


def this_process() -> str:
    """This process, as another one of the same machine can look for it: number, host, PID namespace."""
    return f"{os.getpid()} {os.uname().nodename} {Path('/proc/self/ns/pid').readlink()}"


def is_heard() -> bool:
    """Whether a launcher listens to this process."""
    return VARIABLE in os.environ


def sign(word: str, text: str) -> bytes:
    """The line that brings `text`, itself one line, to whom the launcher has made responsible for `word`."""
    return _MARK + f"{word} {text}\n".encode()


def arrival(rank: int, state: str) -> bytes:
    """The sign by which rank `rank`, this process, says how far it has come."""
    return sign("arrival", f"{rank} {state} {os.uname().nodename} {os.getpid()}")


class Signs:
    """Takes signs out of the ranks' stderr and gives each to the handler of its word; one without is dropped."""

    def __init__(self, handlers: Mapping[str, Callable[[str], None]]) -> None:
        self._handlers = handlers
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What is no sign. Half a sign is held back."""
        out = _LINE.sub(self._hear, self._held + data)
        begin = out.rfind(_MARK[:1])
        rest = out[begin:] if begin >= 0 else b""
        half = b"\n" not in rest and (rest.startswith(_MARK) or _MARK.startswith(rest))
        self._held = rest if half else b""
        return out[: len(out) - len(self._held)]

    def close(self) -> bytes:
        """What was still held back at the end."""
        out, self._held = self._held, b""
        return out

    def _hear(self, line: re.Match[bytes]) -> bytes:
        handle = self._handlers.get(line[1].decode())
        if handle is not None:
            handle(line[2].decode(errors="replace"))
        return b""


class Arrivals:
    """How far each rank has come; `last` is the state that ends the start."""

    _TEXT = re.compile(rf"(\d+) ({'|'.join(STATES)}) (\S*) (\d+)")

    def __init__(self, ranks: int, last: str) -> None:
        self.ranks, self.last = ranks, last
        self._states: dict[int, str] = {}
        self._processes: dict[int, tuple[str, int]] = {}  # host, process number

    def note(self, text: str) -> None:
        """Hears what an `arrival` says."""
        said = self._TEXT.fullmatch(text)
        if said is None:
            return  # another program's: nothing that could be believed
        rank, state = int(said[1]), said[2]
        if STATES.index(state) >= STATES.index(self._states.get(rank, STATES[0])):
            self._states[rank] = state
            self._processes[rank] = said[3], int(said[4])

    @property
    def seen(self) -> int:
        """How many ranks have given a sign at all."""
        return len(self._states)

    def missing(self) -> list[int]:
        """The ranks that have not come to the last state."""
        there = STATES[STATES.index(self.last) :]
        return [rank for rank in range(self.ranks) if self._states.get(rank) not in there]

    def describe(self) -> str:
        """Where the missing ranks are, those first that hold the others up."""
        groups: dict[str, list[int]] = {}
        for rank in self.missing():
            groups.setdefault(self._where(rank), []).append(rank)
        order = sorted(groups, key=lambda text: ("stopped" not in text, text == _WAITS))
        return "; ".join(f"rank {ranges(groups[text])} {text}" for text in order)

    def _where(self, rank: int) -> str:
        state = self._states.get(rank)
        if state is None:
            return "has not started"
        stopped = " and is stopped" if self._is_stopped(rank) else ""
        host, process = self._processes[rank]
        where = f" (process {process} on {host})" if stopped else ""
        if state == "started":
            return f"has not come to MPI_Init{stopped}{where}"
        return f"is in MPI_Init{stopped}{where}" if stopped else _WAITS

    def _is_stopped(self, rank: int) -> bool:
        host, process = self._processes[rank]
        try:
            return host == os.uname().nodename and psutil.Process(process).status() == psutil.STATUS_STOPPED
        except psutil.Error:
            return False
