"""The definition: every rank gathers all lanes and adds them in the tree. The first to read, and the reference.

J buffers a rank and J times its gradients in messages: nothing to train with.
"""

from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import cpu, fill, to_host
from mlm_mpi.comm.buckets import ALL, Reduction, Setup
from mlm_mpi.comm.transport import Direct
from mlm_mpi.comm.tree import Node, middle


def build(setup: Setup) -> Reduction:
    return Naive(setup)


class Naive:
    """Lanes are kept until `finish`."""

    stable = True

    def __init__(self, setup: Setup) -> None:
        self.group, self.ranges, self.lanes = setup.group, setup.ranges, setup.lanes
        xp, size = (setup.place or cpu()).xp, setup.elements
        self.first, stop = self.ranges[self.group.rank]
        self.buffers = [xp.zeros(size, setup.dtype) for _ in range(self.first, stop)]
        self.total = xp.zeros(size, setup.dtype)
        self.transport, self.exposed_s = setup.transport or Direct(), 0.0

    def begin(self) -> None:
        """Nothing is in flight between steps."""

    def open_lane(self, lane: int) -> tuple[Any, bool]:
        return self.buffers[lane - self.first], True

    def close_lane(self, lane: int, part: slice = ALL) -> None:
        """The lane's buffer is its sum."""

    def block_ready(self, block: int) -> None:
        """Nothing leaves before the end."""

    def finish(self) -> Any:
        """The sum over all lanes. Collective."""
        most = max(stop - first for first, stop in self.ranges)
        mine = np.zeros((most, self.total.size), self.total.dtype)
        for row, buffer in zip(mine, self.buffers, strict=False):
            row[:] = to_host(buffer)
        everybody = self.group.allgather_array(mine, "all lanes")  # (R, most, n)
        lanes = [everybody[rank, k] for rank, (first, stop) in enumerate(self.ranges) for k in range(stop - first)]
        fill(self.total, self.joined(lanes))
        return self.total

    def joined(self, lanes: list[Any]) -> Any:
        """The sum of all lanes, which defines its bits."""
        return _tree(lanes, (0, self.lanes))

    def costs(self) -> dict[str, int]:
        """Lane buffers, bytes held, bytes sent per step."""
        count, size = len(self.buffers), self.total.nbytes
        return {"buffers": count, "held_bytes": (count + 1) * size, "sent_bytes": (self.group.size - 1) * count * size}


def _tree(lanes: list[Any], node: Node) -> Any:
    if node[1] - node[0] == 1:
        return lanes[node[0]]
    centre = middle(*node)
    return _tree(lanes, (node[0], centre)) + _tree(lanes, (centre, node[1]))
