"""Weights that one rank updates and another reads: on their way while other work goes on (`params/ownership.py`).

With ZeRO-1 and 2 every rank sends its new weights when it has made its update, and a forward waits for those of a part
when it comes to it. With ZeRO-3 a rank keeps its own range: the others' come before a part reads them, while the part
before works, and their memory goes back after. Who reads what and when follows from the schedule and from who runs how
many micro-batches, which all ranks know, so owners send without being asked, however many micro-batches each has.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import forget
from mlm_mpi.comm.group import Group
from mlm_mpi.comm.mailbox import Message
from mlm_mpi.layers.base import Part
from mlm_mpi.layers.chain import Weights
from mlm_mpi.params.ownership import Owned
from mlm_mpi.params.store import FlatStore, Parameter

_TAG = 0


def segments_read(parts: Sequence[Part], store: FlatStore) -> list[frozenset[int]]:
    """The segments of a store that each part reads: its own, and that of a table which it shares with another."""
    at: dict[Parameter, int] = {}
    for number, (start, stop) in enumerate(store.segments):
        at |= {span.parameter: number for span in store.spans if start <= span.start < stop}
    tables = [getattr(part, "table", None) for part in parts]
    return [
        frozenset(at[p] for p in (*part.parameters(), *(() if table is None else (table,))) if not p.frozen)
        for part, table in zip(parts, tables, strict=True)
    ]


class _Shared(Weights):
    """What both ways have in common: who owns what of a segment, and a communicator of their own."""

    def __init__(self, parts: Sequence[Part], store: FlatStore, owned: Owned, group: Group) -> None:
        self.reads, self.store, self.owned, self.group = segments_read(parts, store), store, owned, group
        self._sends: list[Message] = []

    @property
    def waited_s(self) -> float:
        return self.group.waited_s

    def complete(self) -> None:
        """Returns when all that I sent has arrived, so that it may change."""
        sends, self._sends = self._sends, []
        for message in sends:
            self.group.wait(message, "others to take my weights")

    def _part(self, segment: int, rank: int) -> slice:
        """What a rank owns of a segment, perhaps nothing."""
        (start, stop), (first, last) = self.store.segments[segment], self.owned.every[rank]
        begin = min(max(start, first), stop)
        return slice(begin, max(begin, min(stop, last)))

    def _others(self) -> Iterator[int]:
        return (rank for rank in range(self.group.size) if rank != self.group.rank)

    def _send(self, flat: Any, segment: int, rank: int) -> None:
        part = self._part(segment, self.group.rank)
        if part.start < part.stop:
            self._sends.append(self.group.mail.send(_known(flat[part]), rank, _TAG))

    def _receive(self, flat: Any, segment: int) -> list[Message]:
        parts = ((rank, self._part(segment, rank)) for rank in self._others())
        return [
            self.group.mail.receive(_known(flat[part]), rank, _TAG) for rank, part in parts if part.start < part.stop
        ]

    def _await(self, messages: Iterable[Message], number: int) -> None:
        for message in messages:
            self.group.wait(message, f"the weights of part {number} from rank {message.peer} of its copies")


class Gathered(_Shared):
    """ZeRO-1 and 2: everybody holds all weights, from when they have arrived after an update."""

    def __init__(self, parts: Sequence[Part], store: FlatStore, owned: Owned, group: Group) -> None:
        super().__init__(parts, store, owned, group)
        self._coming: dict[int, list[Message]] = {}

    def updated(self) -> None:
        """Sends what I have updated, and lets the others' come, the parts that a forward begins with first."""
        for segment in range(len(self.store.segments)):
            self._coming[segment] = self._receive(self.store.data, segment)
            for rank in self._others():
                self._send(self.store.data, segment, rank)

    def need(self, part: int) -> None:
        for segment in self.reads[part] & self._coming.keys():
            self._arrive(segment)

    def complete(self) -> None:
        for segment in list(self._coming):
            self._arrive(segment)
        super().complete()

    def _arrive(self, segment: int) -> None:
        self._await(self._coming.pop(segment), segment)
        if self.store.working is not self.store.data:
            part = slice(*self.store.segments[segment])
            self.store.working[part] = self.store.data[part]


@dataclass
class _Visit:
    """A part that is run so many times in a row, the segments that it reads, and those which come for it."""

    part: int
    times: int
    reads: frozenset[int]
    fetched: frozenset[int]


class Lent(_Shared):
    """ZeRO-3: between the parts that read them, a rank holds no weights but its own.

    Beside these it has the weights of two parts at once: of the one that works, and of the next, on their way. What is
    written in memory that is given back is gone, so the store is as large as ever in addresses, and not in memory.
    """

    def __init__(self, parts: Sequence[Part], store: FlatStore, owned: Owned, group: Group) -> None:
        super().__init__(parts, store, owned, group)
        self._visits: deque[_Visit] = deque()
        self._coming: list[Message] = []  # for the first visit that has not begun
        self._begun = False
        self.forget(slice(0, store.size))  # an allocator may have given pages that were there

    def expect(self, walks: Sequence[Sequence[int]]) -> None:
        """Says which parts each rank will run, one after another. All ranks say the same; each then runs its own."""
        self.complete()
        assert not self._visits, f"part {self._visits[0].part} was to be run"
        for rank, walk in enumerate(walks):
            visits = self._planned(walk)
            if rank == self.group.rank:
                self._visits.extend(visits)
                continue
            for visit in visits:
                for segment in sorted(visit.fetched):
                    self._send(self.store.shown, segment, rank)
        self._fetch_next(0)

    def need(self, part: int) -> None:
        visit = self._visits[0]
        assert visit.part == part, f"part {part} runs, and part {visit.part} was to"
        if not self._begun:
            self._begun = True
            self._await(self._coming, part)
            self._fetch_next(1)

    def done(self, part: int) -> None:
        visit = self._visits[0]
        visit.times -= 1
        if visit.times == 0:
            self._visits.popleft()
            self._begun = False
            for segment in visit.reads - (self._visits[0].reads if self._visits else frozenset()):
                self.forget(slice(*self.store.segments[segment]))

    def forget(self, part: slice) -> None:
        """Gives the memory of weights that are not mine back."""
        mine = self.owned
        for start, stop in ((part.start, min(part.stop, mine.start)), (max(part.start, mine.stop), part.stop)):
            if start < stop:
                forget(self.store.shown[start:stop])

    def _planned(self, walk: Sequence[int]) -> Iterator[_Visit]:
        before: frozenset[int] = frozenset()
        for part, same in groupby(walk):
            reads = self.reads[part]
            yield _Visit(part, len(list(same)), reads, reads - before)
            before = reads

    def _fetch_next(self, number: int) -> None:
        """Lets the weights of the visit `number` from here come."""
        fetched = sorted(self._visits[number].fetched) if number < len(self._visits) else []
        self._coming = [message for segment in fetched for message in self._receive(self.store.shown, segment)]


def _known(array: np.ndarray) -> np.ndarray:
    """A contiguous array as a type that MPI knows: bfloat16 is bytes to it."""
    return array if array.dtype.char in "fd" else array.view(np.uint8)
