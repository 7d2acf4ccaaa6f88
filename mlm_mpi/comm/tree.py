"""The one binary tree in which lanes are summed: split at the largest power of two below their number."""

from collections.abc import Collection
from dataclasses import dataclass

from mlm_mpi.order import middle

Node = tuple[int, int]  # lanes [first, stop) whose sum a subtree is


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
