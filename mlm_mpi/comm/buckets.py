"""What reductions are and share: how a step's gradients become one global sum, identical on every rank.

A step is J lanes; a rank runs a contiguous range of them. Per lane the engine asks `open_lane` for a flat buffer, lets
its micro-batches accumulate there, and says `close_lane`. In the last micro-batch of its last lane the backward calls
`block_ready` as blocks become final, and buckets leave while the rest of the backward still runs. `finish` waits for
what is left and returns the sum. Where a stage holds several chunks of the model each goes through the lanes by itself,
in a slice of every buffer that is its alone: it closes that slice, and which lanes others have open is all one. Where
the buffers lie in a GPU's memory a `Transport` brings slices to MPI and back.
"""

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mlm_mpi.backend.arrays import Place, cpu
from mlm_mpi.comm.group import Group
from mlm_mpi.comm.mailbox import Message
from mlm_mpi.comm.transport import Direct, Ready, Transport
from mlm_mpi.comm.tree import Node

ALL = slice(None)  # of a flat buffer


@dataclass(frozen=True)
class Setup:
    """What a reduction is built from. `ranges`: the lanes [first, stop) of every rank; `segments`: of the flat buffer,
    a block each; `size`: of that buffer, where more lies behind them that other ranks sum; `owned`: [start, stop) of
    the buffer that each rank needs the sum of, where not all need all."""

    group: Group
    lanes: int
    ranges: Sequence[Node]
    segments: Sequence[tuple[int, int]]
    bucket_bytes: float
    dtype: Any
    overlap: bool
    place: Place | None = None
    transport: Transport | None = None
    size: int = 0
    owned: Sequence[Node] | None = None

    @property
    def elements(self) -> int:
        """Of the flat buffer."""
        return self.size or self.segments[-1][1]


class Reduction(Protocol):
    """What the engine sees of a strategy."""

    stable: bool  # whether the sum has the same bits on any number of ranks
    transport: Transport
    exposed_s: float  # seconds of the last step in which this rank could do nothing but wait

    def begin(self) -> None: ...
    def open_lane(self, lane: int) -> tuple[Any, bool]: ...
    def close_lane(self, lane: int, part: slice = ALL) -> None: ...
    def block_ready(self, block: int) -> None: ...
    def finish(self) -> Any: ...
    def costs(self) -> dict[str, int]: ...


@dataclass
class Bucket:
    """A range [start, stop) of the flat buffer that travels together, final once `block` is."""

    number: int
    start: int
    stop: int
    block: int
    started: bool = False
    sent: bool = False
    combined: bool = False
    done: bool = False
    left: Ready = field(default=lambda: True)  # whether MPI may read what this rank contributes
    summed: Ready | None = None  # whether MPI may read the sum of my part; None: it is sent, or not mine to send
    partials: list[Message] = field(default_factory=list)
    sums: list[Message] = field(default_factory=list)
    sends: list[Message] = field(default_factory=list)


def make_buckets(segments: Sequence[tuple[int, int]], elements: int) -> list[Bucket]:
    """Buckets of about `elements` in the order in which a backward finishes blocks.

    Small neighbouring blocks share a bucket; a big block is cut evenly. Bits do not depend on it.
    """
    buckets: list[Bucket] = []
    stop = segments[-1][1] if segments else 0
    for block in range(len(segments) - 1, -1, -1):
        start = segments[block][0]
        if stop - start < elements and block > 0:
            continue
        pieces = max(1, round((stop - start) / elements))
        edges = [start + (stop - start) * i // pieces for i in range(pieces + 1)]
        for a, b in reversed(list(itertools.pairwise(edges))):
            buckets.append(Bucket(len(buckets), a, b, block))
        stop = start
    return buckets


def unfinished(messages: list[Message]) -> list[Message]:
    return [message for message in messages if not message.done()]


class Bucketed(ABC):
    """What all strategies share: buckets that start when their block is final, and the wait at the end."""

    def __init__(self, setup: Setup) -> None:
        self.group, self.overlap, self.dtype = setup.group, setup.overlap, np.dtype(setup.dtype)
        self.xp = (setup.place or cpu()).xp
        self.transport = setup.transport or Direct()
        self.size = setup.elements
        self.blocks, self.final = len(setup.segments), set[int]()
        self.buckets = make_buckets(setup.segments, max(1, int(setup.bucket_bytes / self.dtype.itemsize)))
        self.exposed_s = 0.0
        self.first_start_s: float | None = None  # when the first bucket left: the trace proves the overlap

    def begin(self) -> None:
        """Forgets the last step."""
        self.first_start_s = None
        self.final.clear()
        for bucket in self.buckets:
            bucket.started = bucket.sent = bucket.combined = bucket.done = False
            bucket.sends, bucket.partials, bucket.sums, bucket.summed = [], [], [], None

    def block_ready(self, block: int) -> None:
        """Gradients of this block are final on this rank; starts the buckets that with all behind them are complete."""
        self.final.add(block)
        if self.overlap:
            open_still = max(set(range(self.blocks)) - self.final, default=-1)
            for bucket in self.buckets:
                if bucket.block > open_still and not bucket.started:
                    self._start_timed(bucket)
            self.poll()

    def _start_timed(self, bucket: Bucket) -> None:
        if self.first_start_s is None:
            self.first_start_s = time.perf_counter()
        bucket.started = True
        self._start(bucket)
        self._advance(bucket)

    def poll(self) -> None:
        """Lets MPI move and does what has become possible."""
        for bucket in self.buckets:
            if bucket.started:
                self._advance(bucket)

    def _finish(self) -> None:
        began = time.perf_counter()
        for bucket in self.buckets:
            if not bucket.started:
                self._start_timed(bucket)

        def awaited() -> list[int] | None:
            states = [self._advance(bucket) for bucket in self.buckets]
            unfinished = [ranks for ranks in states if ranks is not None]
            return [rank for ranks in unfinished for rank in ranks] if unfinished else None

        self.group.wait_until(awaited, "gradients of this step")
        self.exposed_s = time.perf_counter() - began

    @abstractmethod
    def _start(self, bucket: Bucket) -> None:
        """Begins what this rank contributes to a bucket."""

    @abstractmethod
    def _advance(self, bucket: Bucket) -> list[int] | None:
        """Moves a bucket on; None when it is done, else the ranks awaited (empty: not known)."""


class OneBuffer(Bucketed):
    """What the strategies share whose order of summation is a library's: one buffer for all lanes of a rank."""

    stable = False

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.buffer = self.xp.zeros(self.size, self.dtype)
        self.opened = False

    def costs(self) -> dict[str, int]:
        """As those of `reductions.canonical`; bytes sent are those of a ring."""
        held = self.size * self.dtype.itemsize
        sent = 2 * held * (self.group.size - 1) // self.group.size
        return {"buffers": 1, "held_bytes": held, "sent_bytes": sent}

    def begin(self) -> None:
        """Forgets the last step."""
        super().begin()
        self.opened = False

    def open_lane(self, lane: int) -> tuple[Any, bool]:
        """(the one buffer, True for the first lane of the step)."""
        fresh, self.opened = not self.opened, True
        return self.buffer, fresh

    def close_lane(self, lane: int, part: slice = ALL) -> None:
        """Nothing to do: lanes share the buffer."""

    def finish(self) -> Any:
        """The sum over all lanes. Collective."""
        if not self.opened:  # a rank without lanes
            self.buffer[...] = -0.0
        self._finish()
        return self.buffer
