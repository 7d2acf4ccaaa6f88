"""What ranks know of each other while they wait: who does not, and what that one did last.

Each rank keeps a sign of what it is doing in memory that the ranks of its node share; it can be read even when its
rank is stopped. Between nodes signs travel on request: the rank whose patience ends first calls the roll, and every
rank that waits answers with the signs of its node.
"""

import json
import mmap
import os
import struct
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from mlm_mpi.errors import ranges

_SLOT_BYTES = 256
_HEAD = struct.Struct("=dqiiH")  # time, process, rank, whether it waits, length of the text
_CALL, _ANSWER = 1, 2  # tags
_ROLL_S = 1.0
_RENEW_S = 0.1
_FRESH_S = 5.0  # who waits renews its sign ten times a second; this leaves room for a machine that is overloaded
_TURN_S = 0.002  # the lowest of the ranks whose patience ends together calls; the others hear it before their turn
_NAME_BYTES = 512


class Sign(NamedTuple):
    """What a rank was doing when last seen."""

    rank: int
    waits: bool
    age_s: float
    text: str
    process: int
    host: str
    stopped: bool

    @property
    def is_here(self) -> bool:
        """It waits as I do. One that was stopped while it waited does not."""
        return self.waits and not self.stopped and self.age_s < _FRESH_S

    def __str__(self) -> str:
        where = f"process {self.process} on {self.host}" + (", stopped" if self.stopped else "")
        what = f"waiting for {self.text}" if self.waits else self.text
        return f"rank {self.rank} did last, {self.age_s:.0f} s ago: {what} ({where})"


class Company:
    """All ranks of the job, as seen by one of them."""

    def __init__(self, comm: Any, node: Any = None) -> None:
        """Collective over `comm`, an mpi4py communicator. `node`: its ranks that share memory (my machine's)."""
        from mpi4py import MPI

        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        node = node or comm.Split_type(MPI.COMM_TYPE_SHARED)
        self._place, self._members = node.Get_rank(), node.Get_size()
        self._board = _shared_board(node)
        node.Free()
        self._comm = comm.Dup()
        self._sent: list[tuple[Any, Any]] = []  # requests and the arrays they read
        self._calls = 0
        self._heard: dict[int, float] = {}  # when which rank has called the roll
        self.note("the start of the job")

    def note(self, text: str, waits: bool = False) -> None:
        """Says what this rank does from now on."""
        words = text.encode()[: _SLOT_BYTES - _HEAD.size]
        self._text, self._renewed = text, time.monotonic()
        head = _HEAD.pack(self._renewed, os.getpid(), self.rank, waits, len(words))
        self._board[self._place * _SLOT_BYTES : self._place * _SLOT_BYTES + len(head) + len(words)] = head + words

    def here(self) -> list[Sign]:
        """The signs of the ranks of my node."""
        return [self._read(place) for place in range(self._members)]

    def _read(self, place: int) -> Sign:
        slot = self._board[place * _SLOT_BYTES : (place + 1) * _SLOT_BYTES]
        then, process, rank, waits, length = _HEAD.unpack_from(slot)
        text = slot[_HEAD.size : _HEAD.size + length].decode(errors="replace")
        age_s = time.monotonic() - then
        return Sign(rank, bool(waits), age_s, text, process, os.uname().nodename, _is_stopped(process))

    def answer(self) -> None:
        """Renews my sign and answers ranks that call the roll; whoever waits calls this now and then."""
        if time.monotonic() - self._renewed > _RENEW_S:
            self.note(self._text, waits=True)
        for source, number in self._arrived(_CALL):
            self._heard[source] = time.monotonic()
            signs = json.dumps([number[0], *self.here()]).encode()
            self._send(np.frombuffer(signs, np.uint8), source, _ANSWER)
        self._sent = [(request, array) for request, array in self._sent if not request.Test()]

    def absent(self, what: str, waited_s: float) -> tuple[int, str]:
        """(the rank that is to tell it, who did not arrive and what it did last). Called when patience has ended."""
        self._linger(min(self.rank * _TURN_S, _ROLL_S))
        if callers := self._callers():
            self._linger(_ROLL_S)  # my answer may still be on its way
            return min(callers), f"rank {self.rank} waited {waited_s:.0f} s for {what}"
        signs = self._roll()
        missing = [rank for rank in range(self.size) if rank not in signs or not signs[rank].is_here]
        teller = min([self.rank, *self._callers()])
        if not missing:
            return teller, f"all {self.size} ranks wait: {_by_text(signs)}"
        waiting = f"{self.size - len(missing)} of {self.size} ranks wait for {what} since {waited_s:.0f} s"
        last = [str(signs[rank]) for rank in missing if rank in signs][:4]
        silent = [] if last else ["no rank of its node answers"]
        return teller, f"rank {ranges(missing)} did not arrive, {waiting}; {'; '.join(last + silent)}"

    def _roll(self) -> dict[int, Sign]:
        """Calls all other ranks and gathers signs for a while."""
        self._calls += 1
        for other in range(self.size):
            if other != self.rank:
                self._send(np.array([self._calls], np.int64).view(np.uint8), other, _CALL)
        signs: dict[int, Sign] = {}
        end = time.monotonic() + _ROLL_S
        while time.monotonic() < end:
            self.answer()
            for _, found in self._arrived(_ANSWER):
                if found[0] == self._calls:  # not the answer to an earlier call
                    signs |= {sign[0]: Sign(*sign) for sign in found[1:]}
            time.sleep(_TURN_S)
        return signs | {sign.rank: sign for sign in self.here()}

    def _callers(self) -> list[int]:
        """Who calls the roll besides me, now; an older call was answered by whoever was awaited."""
        return [rank for rank, then in self._heard.items() if time.monotonic() - then < 2 * _ROLL_S]

    def _linger(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.answer()
            time.sleep(_TURN_S)

    def _arrived(self, tag: int) -> list[tuple[int, Any]]:
        """(source, content) of the messages with a tag that are here."""
        from mpi4py import MPI

        found = []
        status = MPI.Status()
        while self._comm.Iprobe(MPI.ANY_SOURCE, tag, status):
            content = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            source = status.Get_source()
            request = self._comm.Irecv(content, source, tag)
            while not request.Test():  # the message is here, or on its way from a rank that polls
                time.sleep(0)
            data = content.tobytes()
            found.append((source, [struct.unpack("=q", data)[0]] if tag == _CALL else json.loads(data)))
        return found

    def _send(self, content: Any, other: int, tag: int) -> None:
        self._sent.append((self._comm.Isend(content, other, tag), content))


def _by_text(signs: dict[int, Sign]) -> str:
    groups: dict[str, list[int]] = {}
    for rank, sign in sorted(signs.items()):
        groups.setdefault(sign.text, []).append(rank)
    return "; ".join(f"rank {ranges(members)} for {text}" for text, members in groups.items())


def _is_stopped(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() == psutil.STATUS_STOPPED)
    except (psutil.Error, ValueError):
        return False


def _shared_board(node: Any) -> mmap.mmap:
    """Memory with a slot for each rank of a node. Its file has no name any more when this returns. Collective."""
    size = node.Get_size() * _SLOT_BYTES
    name = np.zeros(_NAME_BYTES, np.uint8)
    if node.Get_rank() == 0:
        root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        descriptor, path = tempfile.mkstemp(prefix="mlm-mpi-signs-", dir=root)
        os.posix_fallocate(descriptor, 0, size)  # a full /dev/shm is an error here, not a SIGBUS later
        os.close(descriptor)
        encoded = os.fsencode(path)
        name[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    node.Bcast(name, 0)
    path = os.fsdecode(name.tobytes().rstrip(b"\0"))
    with open(path, "r+b") as file:
        board = mmap.mmap(file.fileno(), size)
    node.Barrier()
    if node.Get_rank() == 0:
        Path(path).unlink()
    return board
