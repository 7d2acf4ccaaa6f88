"""Strategies that turn per-micro-batch gradients into one global sum, identical on every rank.

A step is J lanes; a rank runs a contiguous range of them. Per lane the trainer asks `open_lane` for a
flat buffer, lets its micro-batches accumulate there, and says `close_lane`. In the last micro-batch of
its last lane the backward calls `block_ready` as blocks become final, and buckets leave while the rest
of the backward still runs. `finish` waits for what is left and returns the sum.

`Canonical` adds in one order for any number of ranks: lane sums are the leaves of a binary tree over the
lane number, split at the largest power of two below. A rank sends only its maximal complete subtrees;
the owner of a slice finishes the tree for it and returns the sum. `Allreduce` is plain MPI_Iallreduce:
the order is the library's, and the bits change with the number of ranks. `Nccl` is the same between GPUs
without MPI. Where the buffers lie in a GPU's memory a `Transport` brings slices to MPI and back.
"""

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mlm_mpi.backend import sums
from mlm_mpi.backend.arrays import Place, cpu, nccl
from mlm_mpi.comm.group import Group
from mlm_mpi.comm.transport import Direct, Ready, Transport
from mlm_mpi.cut import cut
from mlm_mpi.errors import ConfigError

Node = tuple[int, int]  # lanes [first, stop) whose sum a subtree is


class Reduction(Protocol):
    """What the trainer sees of a strategy."""

    transport: Transport
    exposed_s: float  # seconds of the last step in which this rank could do nothing but wait

    def begin(self) -> None: ...
    def open_lane(self, lane: int) -> tuple[Any, bool]: ...
    def close_lane(self, lane: int) -> None: ...
    def block_ready(self, block: int) -> None: ...
    def finish(self) -> Any: ...
    def costs(self) -> dict[str, int]: ...


def middle(first: int, stop: int) -> int:
    """Where the tree splits lanes [first, stop): at the largest power of two below their number."""
    return first + (1 << ((stop - first - 1).bit_length() - 1))


def maximal_nodes(root: Node, first: int, stop: int) -> list[Node]:
    """The largest complete subtrees of `root` inside lanes [first, stop), left to right."""
    lo, hi = root
    if first <= lo and hi <= stop:
        return [root]
    if hi <= first or stop <= lo or hi - lo == 1:
        return []
    centre = middle(lo, hi)
    return maximal_nodes((lo, centre), first, stop) + maximal_nodes((centre, hi), first, stop)


def merges_of(root: Node, leaves: Collection[Node]) -> list[int]:
    """How many sums are complete after each leaf, left to right: the tree as `backend.sums.tree` wants it."""
    if root in leaves:
        return [0]
    centre = middle(*root)
    merges = merges_of((root[0], centre), leaves) + merges_of((centre, root[1]), leaves)
    merges[-1] += 1
    return merges


@dataclass
class LanePlan:
    """Which buffer a lane fills, and which pairs (left, right) of buffers merge when it is closed."""

    buffer: int
    merges: list[tuple[int, int]]


Sum = tuple[int, int, int]  # lanes [first, stop) summed in a buffer


def _siblings(left: Sum, right: Sum, parents: set[Node]) -> bool:
    whole = (left[0], right[1])
    return whole in parents and middle(*whole) == right[0]


def plan_lanes(lanes: int, first: int, stop: int) -> tuple[list[LanePlan], list[int], int]:
    """(plan per lane, buffer of each maximal node, number of buffers) of a rank with lanes [first, stop).

    Lanes are summed as they come, like carries of a binary counter, so that k aligned lanes need
    1 + log2 k buffers.
    """
    parents: set[Node] = set()

    def walk(lo: int, hi: int) -> None:
        if hi - lo > 1:
            parents.add((lo, hi))
            walk(lo, middle(lo, hi))
            walk(middle(lo, hi), hi)

    walk(0, lanes)
    stack: list[Sum] = []
    free: list[int] = []
    plans, count = [], 0
    for lane in range(first, stop):
        if free:
            buffer = free.pop()
        else:
            buffer, count = count, count + 1
        plan = LanePlan(buffer, [])
        stack.append((lane, lane + 1, buffer))
        while len(stack) > 1 and _siblings(stack[-2], stack[-1], parents):
            (_, hi, right), (lo, _, left) = stack.pop(), stack.pop()
            plan.merges.append((left, right))
            stack.append((lo, hi, left))
            free.append(right)
        plans.append(plan)
    return plans, [buffer for _, _, buffer in stack], count


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
    partials: list[tuple[int, Any]] = field(default_factory=list)  # (other rank, request)
    sums: list[tuple[int, Any]] = field(default_factory=list)
    sends: list[tuple[int, Any]] = field(default_factory=list)


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


def _unfinished(requests: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    return [(rank, request) for rank, request in requests if not request.Test()]


class _Bucketed(ABC):
    """What all strategies share: buckets that start when their block is final, and the wait at the end."""

    def __init__(
        self, group: Group, segments: Sequence[tuple[int, int]], bucket_bytes: float, dtype: Any, overlap: bool,
        place: Place | None, transport: Transport | None,
    ) -> None:  # fmt: skip
        self.group, self.overlap, self.dtype = group, overlap, np.dtype(dtype)
        self.xp = (place or cpu()).xp
        self.transport = transport or Direct()
        self.size = segments[-1][1]
        self.buckets = make_buckets(segments, max(1, int(bucket_bytes / self.dtype.itemsize)))
        self.exposed_s = 0.0
        self.first_start_s: float | None = None  # when the first bucket left: the trace proves the overlap

    def begin(self) -> None:
        """Forgets the last step."""
        self.first_start_s = None
        for bucket in self.buckets:
            bucket.started = bucket.sent = bucket.combined = bucket.done = False
            bucket.sends, bucket.partials, bucket.sums, bucket.summed = [], [], [], None

    def block_ready(self, block: int) -> None:
        """Gradients of this block are final on this rank; starts the buckets they complete."""
        if self.overlap:
            for bucket in self.buckets:
                if bucket.block >= block and not bucket.started:
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


class Canonical(_Bucketed):
    """The sum in canonical tree order: the same bits on any number of ranks from 1 to J.

    Buffers: `costs()["buffers"]` flat ones for lanes, one for the sum and scratch for others' subtrees
    where there is more than one rank.
    """

    def __init__(
        self, group: Group, lanes: int, ranges: Sequence[Node], segments: Sequence[tuple[int, int]],
        bucket_bytes: float, dtype: Any, overlap: bool, place: Place | None = None, transport: Transport | None = None,
    ) -> None:  # fmt: skip
        super().__init__(group, segments, bucket_bytes, dtype, overlap, place, transport)
        self.first, self.stop = ranges[group.rank]
        self.plans, self.node_buffers, count = plan_lanes(lanes, self.first, self.stop)
        self.buffers = [self.xp.zeros(self.size, self.dtype) for _ in range(count)]
        self.nodes = [maximal_nodes((0, lanes), a, b) for a, b in ranges]
        self.merges = merges_of((0, lanes), [node for nodes in self.nodes for node in nodes])
        self.tags = max(map(len, self.nodes))
        if len(self.buckets) * (self.tags + 1) > group.highest_tag():
            raise ConfigError(
                f"comm.bucket_mib = {bucket_bytes / 2**20:g} makes {len(self.buckets):,} messages a step, this MPI "
                f"library tells {group.highest_tag():,} apart: raise comm.bucket_mib"
            )
        self.total = self.buffers[self.node_buffers[0]]
        if group.size > 1:
            self.total = self.xp.zeros(self.size, self.dtype)
            self.sum = self.transport.mirror(self.total)
            self.mine = [self.transport.mirror(self.buffers[number]) for number in self.node_buffers]
        self.scratch = {
            (rank, k): self.transport.empty(self._owned_elements(), self.dtype)
            for rank, nodes in enumerate(self.nodes) if rank != group.rank
            for k in range(len(nodes))
        }  # fmt: skip

    def costs(self) -> dict[str, int]:
        """Flat lane buffers, bytes held in all, bytes this rank sends per step."""
        item, others = self.dtype.itemsize, self.group.size - 1
        mine = self._owned_elements()
        held = len(self.buffers) * self.size + (self.size if others else 0) + len(self.scratch) * mine
        sent = len(self.nodes[self.group.rank]) * (self.size - mine) + others * mine
        return {"buffers": len(self.buffers), "held_bytes": held * item, "sent_bytes": sent * item if others else 0}

    def _part(self, bucket: Bucket, rank: int) -> slice:
        a, b = cut(bucket.stop - bucket.start, self.group.size, rank)
        return slice(bucket.start + a, bucket.start + b)

    def _owned_elements(self) -> int:
        parts = (self._part(bucket, self.group.rank) for bucket in self.buckets)
        return sum(part.stop - part.start for part in parts)

    def _others(self) -> list[int]:
        return [rank for rank in range(self.group.size) if rank != self.group.rank]

    def begin(self) -> None:
        """Posts every receive of the step, so that few messages arrive unexpected."""
        super().begin()
        offset = 0
        for bucket in self.buckets:
            mine = self._part(bucket, self.group.rank)
            length = mine.stop - mine.start
            for (rank, k), scratch in self.scratch.items():
                view = scratch[offset : offset + length]
                bucket.partials.append((rank, self.group.comm.Irecv(view, rank, self._tag(bucket, k))))
            for rank in self._others():
                view = self.sum[self._part(bucket, rank)]
                bucket.sums.append((rank, self.group.comm.Irecv(view, rank, self._tag(bucket, self.tags))))
            offset += length

    def _tag(self, bucket: Bucket, k: int) -> int:
        return bucket.number * (self.tags + 1) + k

    def open_lane(self, lane: int) -> tuple[Any, bool]:
        """(buffer to accumulate in, True: its first micro-batch writes over what it holds)."""
        return self.buffers[self.plans[lane - self.first].buffer], True

    def close_lane(self, lane: int) -> None:
        """Adds up the subtrees this lane completes; those of the last lane are added bucket by bucket."""
        if lane < self.stop - 1:
            self._merge(self.plans[lane - self.first], slice(0, self.size))

    def _merge(self, plan: LanePlan, part: slice) -> None:
        """Each sum that a lane completes takes in the one before: a tree that leans to the right, in one pass."""
        if plan.merges:
            order = [left for left, _ in reversed(plan.merges)] + [plan.merges[0][1]]
            leaves = [self.buffers[buffer][part] for buffer in order]
            sums.tree(leaves, [0] * len(plan.merges) + [len(plan.merges)], leaves[0])

    def _start(self, bucket: Bucket) -> None:
        part = slice(bucket.start, bucket.stop)
        self._merge(self.plans[-1], part)
        if self.group.size > 1:
            held = (self.buffers[number] for number in self.node_buffers)
            pairs = [(buffer[part], mirror[part]) for buffer, mirror in zip(held, self.mine, strict=True)]
            bucket.left = self.transport.leave(pairs)

    def _advance(self, bucket: Bucket) -> list[int] | None:
        if bucket.done or self.group.size == 1:
            return None
        if not bucket.sent:
            if not bucket.left():
                return []
            self._send(bucket)
        if not bucket.combined:
            bucket.partials = _unfinished(bucket.partials)
            if not bucket.partials:
                self._combine(bucket)
        if bucket.summed is not None and bucket.summed():
            self._send_sum(bucket)
        bucket.sums, bucket.sends = _unfinished(bucket.sums), _unfinished(bucket.sends)
        pending = bucket.partials + bucket.sums + bucket.sends
        if pending or bucket.summed is not None:
            return [rank for rank, _ in pending]
        part = slice(bucket.start, bucket.stop)
        self.transport.arrive(self.sum[part], self.total[part])
        bucket.done = True
        return None

    def _send(self, bucket: Bucket) -> None:
        bucket.sent = True
        for rank in self._others():
            part = self._part(bucket, rank)
            for k, mirror in enumerate(self.mine):
                bucket.sends.append((rank, self.group.comm.Isend(mirror[part], rank, self._tag(bucket, k))))

    def _combine(self, bucket: Bucket) -> None:
        """Finishes the tree for my part of a bucket."""
        bucket.combined = True
        me = self.group.rank
        part = self._part(bucket, me)
        before = (self._part(b, me) for b in self.buckets[: bucket.number])
        offset = sum(p.stop - p.start for p in before)
        leaves = []  # rank by rank, which is left to right
        for rank, nodes in enumerate(self.nodes):
            for k in range(len(nodes)):
                if rank == me:
                    leaves.append(self.mine[k][part])
                else:
                    leaves.append(self.scratch[rank, k][offset : offset + part.stop - part.start])
        sums.tree(leaves, self.merges, self.sum[part])
        bucket.summed = self.transport.settled()

    def _send_sum(self, bucket: Bucket) -> None:
        """Returns the sum of my part to everybody."""
        bucket.summed = None
        part, tag = self._part(bucket, self.group.rank), self._tag(bucket, self.tags)
        for rank in self._others():
            bucket.sends.append((rank, self.group.comm.Isend(self.sum[part], rank, tag)))

    def finish(self) -> Any:
        """The sum over all lanes, the same bits everywhere. Collective."""
        self._finish()
        return self.total


class _OneBuffer(_Bucketed):
    """What the strategies share whose order of summation is a library's: one buffer for all lanes of a rank."""

    def __init__(
        self, group: Group, segments: Sequence[tuple[int, int]], bucket_bytes: float, dtype: Any, overlap: bool,
        place: Place | None = None, transport: Transport | None = None,
    ) -> None:  # fmt: skip
        super().__init__(group, segments, bucket_bytes, dtype, overlap, place, transport)
        self.buffer = self.xp.zeros(self.size, self.dtype)
        self.opened = False

    def costs(self) -> dict[str, int]:
        """As `Canonical.costs`; bytes sent are those of a ring."""
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

    def close_lane(self, lane: int) -> None:
        """Nothing to do: lanes share the buffer."""

    def finish(self) -> Any:
        """The sum over all lanes. Collective."""
        self._finish()
        return self.buffer


class Allreduce(_OneBuffer):
    """MPI_Iallreduce per bucket, in place."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.mirror = self.transport.mirror(self.buffer)

    def _start(self, bucket: Bucket) -> None:
        part = slice(bucket.start, bucket.stop)
        if self.group.size > 1:
            bucket.left = self.transport.leave([(self.buffer[part], self.mirror[part])])

    def _advance(self, bucket: Bucket) -> list[int] | None:
        if bucket.done or self.group.size == 1:
            return None
        part = slice(bucket.start, bucket.stop)
        if not bucket.sent:
            # a collective: every rank has to begin its buckets in the same order
            if not all(other.sent for other in self.buckets[: bucket.number]) or not bucket.left():
                return []
            from mpi4py import MPI

            bucket.sent = True
            bucket.sends = [(self.group.rank, self.group.comm.Iallreduce(MPI.IN_PLACE, self.mirror[part]))]
        bucket.sends = _unfinished(bucket.sends)
        if bucket.sends:
            return []
        self.transport.arrive(self.mirror[part], self.buffer[part])
        bucket.done = True
        return None


class Nccl(_OneBuffer):
    """ncclAllReduce per bucket between GPUs, in place, on a stream of its own. MPI only introduces the ranks."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.nccl = nccl()
        self.stream = self.xp.cuda.Stream(non_blocking=True)
        mine = list(self.nccl.get_unique_id()) if self.group.rank == 0 else None  # bytes, which JSON has not
        identity = bytes(self.group.broadcast(mine, "the introduction of NCCL"))
        self.comm = self.nccl.NcclCommunicator(self.group.size, identity, self.group.rank)

    def _start(self, bucket: Bucket) -> None:
        cuda, view = self.xp.cuda, self.buffer[bucket.start : bucket.stop]
        computed = cuda.Event(disable_timing=True)
        computed.record()
        self.stream.wait_event(computed)
        kind = {4: self.nccl.NCCL_FLOAT32, 8: self.nccl.NCCL_FLOAT64}[self.dtype.itemsize]
        self.comm.allReduce(view.data.ptr, view.data.ptr, view.size, kind, self.nccl.NCCL_SUM, self.stream.ptr)
        summed = cuda.Event(disable_timing=True)
        summed.record(self.stream)
        bucket.left = lambda: bool(summed.done)

    def _advance(self, bucket: Bucket) -> list[int] | None:
        return None if bucket.left() else []
