"""Signs: what each rank of a node does, in memory that all of them can read, also when the one who wrote is stopped."""

import mmap
import os
import struct
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any, NamedTuple

from mlm_mpi.comm.processes import is_stopped

_SLOT_BYTES = 256
# generation, time, length of the text; of a sign: rank, process, waits, moves, longest_s, step, micro, stacks, gives_up
_HEAD = struct.Struct("=idHiq?qdqii?")
_FRESH_S = 5.0  # who waits renews its sign ten times a second; this leaves room for a machine that is overloaded
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
    moves: int = 0  # so many things it has noted
    longest_s: float = 0.0  # that work or a wait of this kind has lasted; 0: not known
    step: int = -1
    micro: int = -1  # of the micro-batch that it works at
    stacks: int = -1  # what `stacks.of` asks for
    gives_up: bool = False  # because it has found, or read, that all wait in vain
    stalled: bool = False  # as I have found

    @property
    def is_here(self) -> bool:
        """It waits as I do. One that was stopped while it waited does not."""
        return self.waits and not self.stopped and self.age_s < _FRESH_S

    @property
    def last_seen(self) -> str:
        """Who it was, where and when it was seen last."""
        what = f"waiting for {self.text}" if self.waits else self.text
        return f"rank {self.rank} (process {self.process} on {self.host}, last seen {self.age_s:.0f} s ago: {what})"

    def __str__(self) -> str:
        where = f"process {self.process} on {self.host}" + (", stopped" if self.stopped else "")
        what = f"waiting for {self.text}" if self.waits else self.text
        most = f", which took it {self.longest_s:.2g} s at most before" if self.stalled else ""
        return f"rank {self.rank} did last, {self.age_s:.0f} s ago: {what} ({where}){most}"


class Board:
    """A slot for each rank of a node."""

    def __init__(self, descriptor: int, members: int, place: int = 0, has_processes: bool = True) -> None:
        """`descriptor`: of the memory, for a process that is to have it too; `place`: the slot of this process."""
        self.descriptor, self.members, self._place = descriptor, members, place
        self.has_processes = has_processes  # else numbers of processes mean others to each: containers
        self._memory = mmap.mmap(descriptor, members * _SLOT_BYTES)

    @classmethod
    def of_node(cls, node: Any) -> "Board":
        """Collective over `node`, an mpi4py communicator of ranks that share memory."""
        members = node.Get_size()
        spaces = array("Q", [0] * members)
        node.Allgather(array("Q", [Path("/proc/self/ns/pid").stat().st_ino]), spaces)
        return cls(_shared(node, members * _SLOT_BYTES), members, node.Get_rank(), len({*spaces}) == 1)

    def show(self, generation: int, text: str, *more: Any) -> None:
        """Makes this my sign, with `more` as in `_HEAD`. Signs of other generations are not seen together."""
        words = text.encode()[: _SLOT_BYTES - _HEAD.size]
        head = _HEAD.pack(generation, time.monotonic(), len(words), *more)
        start = self._place * _SLOT_BYTES
        self._memory[start : start + len(head) + len(words)] = head + words

    def signs(self, generation: int) -> list[Sign]:
        """Those that ranks of a generation have shown."""
        signs = (self._read(place, generation) for place in range(self.members))
        return [sign for sign in signs if sign is not None]

    def _read(self, place: int, wanted: int) -> Sign | None:
        slot = self._memory[place * _SLOT_BYTES : (place + 1) * _SLOT_BYTES]
        generation, then, length, rank, process, waits, *more = _HEAD.unpack_from(slot)
        if generation != wanted:
            return None
        text = slot[_HEAD.size : _HEAD.size + length].decode(errors="replace")
        age_s = time.monotonic() - then
        return Sign(rank, waits, age_s, text, process, os.uname().nodename, is_stopped(process), *more)


def _shared(node: Any, size: int) -> int:
    """The descriptor of memory for a node. Its file has no name any more when this returns. Collective."""
    name = bytearray(_NAME_BYTES)
    if node.Get_rank() == 0:
        root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        descriptor, path = tempfile.mkstemp(prefix="mlm-mpi-signs-", dir=root)
        os.posix_fallocate(descriptor, 0, size)  # a full /dev/shm is an error here, not a SIGBUS later
        os.close(descriptor)
        encoded = os.fsencode(path)
        name[: len(encoded)] = encoded
    node.Bcast(name, 0)
    path = os.fsdecode(bytes(name).rstrip(b"\0"))
    board = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    node.Barrier()
    if node.Get_rank() == 0:
        Path(path).unlink()
    return board
