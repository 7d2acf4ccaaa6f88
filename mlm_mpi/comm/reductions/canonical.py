"""The sum in one order for any number of ranks, and so the same bits.

Lane sums are the leaves of a binary tree over the lane number. A rank sends only its maximal complete subtrees; the
owner of a slice finishes the tree for it and returns the sum. It is `naive` with less to send and to hold. Where each
rank needs the sum of a range of its own only, that is the slice, and nothing returns.
"""

from typing import Any

from mlm_mpi.backend import sums
from mlm_mpi.backend.arrays import forget
from mlm_mpi.comm.buckets import ALL, Bucket, Bucketed, Reduction, Setup, unfinished
from mlm_mpi.comm.tree import LanePlan, maximal_nodes, merges_of, plan_lanes
from mlm_mpi.cut import cut
from mlm_mpi.errors import ConfigError


def build(setup: Setup) -> Reduction:
    return Canonical(setup)


class Canonical(Bucketed):
    """The sum in canonical tree order: the same bits on any number of ranks from 1 to J.

    Buffers: `costs()["buffers"]` flat ones for lanes, one for the sum and scratch for others' subtrees
    where there is more than one rank.
    """

    stable = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        group, lanes, ranges = setup.group, setup.lanes, setup.ranges
        self.first, self.stop = ranges[group.rank]
        self.owned = setup.owned if group.size > 1 else None
        self.plans, self.node_buffers, count = plan_lanes(lanes, self.first, self.stop)
        self.buffers = [self.xp.zeros(self.size, self.dtype) for _ in range(count)]
        self.nodes = [maximal_nodes((0, lanes), a, b) for a, b in ranges]
        self.merges = merges_of((0, lanes), [node for nodes in self.nodes for node in nodes])
        self.tags = max(map(len, self.nodes))
        if len(self.buckets) * (self.tags + 1) > group.highest_tag():
            raise ConfigError(
                f"comm.bucket_mib = {setup.bucket_bytes / 2**20:g} makes {len(self.buckets):,} messages a step, this "
                f"MPI library tells {group.highest_tag():,} apart: raise comm.bucket_mib"
            )
        self.total = self.buffers[0] if group.size == 1 else self.xp.zeros(self.size, self.dtype)
        if self.owned is not None:
            forget(self.total)
        if group.size > 1:
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
        mine, whole = self._owned_elements(), self.owned is None  # pages of the sum that nobody writes are not there
        held = len(self.buffers) * self.size + (self.size if whole else mine) * (others > 0) + len(self.scratch) * mine
        sent = len(self.nodes[self.group.rank]) * (self.size - mine) + others * mine * whole
        return {"buffers": len(self.buffers), "held_bytes": held * item, "sent_bytes": sent * item if others else 0}

    def _part(self, bucket: Bucket, rank: int) -> slice:
        """What a rank finishes of a bucket, perhaps nothing."""
        if self.owned is not None:
            start, stop = self.owned[rank]
            start = min(max(start, bucket.start), bucket.stop)
            return slice(start, max(start, min(stop, bucket.stop)))
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
            for (rank, k), scratch in self.scratch.items() if length else ():
                view = scratch[offset : offset + length]
                bucket.partials.append(self.group.mail.receive(view, rank, self._tag(bucket, k)))
            for rank in self._others() if self.owned is None else ():
                view = self.sum[self._part(bucket, rank)]
                bucket.sums.append(self.group.mail.receive(view, rank, self._tag(bucket, self.tags)))
            offset += length

    def _tag(self, bucket: Bucket, k: int) -> int:
        return bucket.number * (self.tags + 1) + k

    def open_lane(self, lane: int) -> tuple[Any, bool]:
        """(buffer to accumulate in, True: its first micro-batch writes over what it holds)."""
        return self.buffers[self.plans[lane - self.first].buffer], True

    def close_lane(self, lane: int, part: slice = ALL) -> None:
        """Adds up the subtrees this lane completes; those of the last lane are added bucket by bucket."""
        if lane < self.stop - 1:
            self._merge(self.plans[lane - self.first], part)

    def _merge(self, plan: LanePlan, part: slice) -> None:
        """Each sum that a lane completes takes in the one before: a tree that leans to the right, in one pass."""
        if plan.merges:
            order = [left for left, _ in reversed(plan.merges)] + [plan.merges[0][1]]
            leaves = [self.buffers[buffer][part] for buffer in order]
            sums.tree(leaves, [0] * len(plan.merges) + [len(plan.merges)], leaves[0])

    def _start(self, bucket: Bucket) -> None:
        part = slice(bucket.start, bucket.stop)
        if self.plans:
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
            bucket.partials = unfinished(bucket.partials)
            if not bucket.partials:
                self._combine(bucket)
        if bucket.summed is not None and bucket.summed():
            self._send_sum(bucket)
        bucket.sums, bucket.sends = unfinished(bucket.sums), unfinished(bucket.sends)
        pending = bucket.partials + bucket.sums + bucket.sends
        if pending or bucket.summed is not None:
            return [message.peer for message in pending if message.peer is not None]
        part = slice(bucket.start, bucket.stop) if self.owned is None else self._part(bucket, self.group.rank)
        self.transport.arrive(self.sum[part], self.total[part])
        bucket.done = True
        return None

    def _send(self, bucket: Bucket) -> None:
        bucket.sent = True
        for rank in self._others():
            part = self._part(bucket, rank)
            for k, mirror in enumerate(self.mine if part.start < part.stop else ()):
                bucket.sends.append(self.group.mail.send(mirror[part], rank, self._tag(bucket, k)))

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
        for rank in self._others() if self.owned is None else ():
            bucket.sends.append(self.group.mail.send(self.sum[part], rank, tag))

    def finish(self) -> Any:
        """The sum over all lanes, the same bits everywhere; of my own range where each has one. Collective."""
        self._finish()
        return self.total
