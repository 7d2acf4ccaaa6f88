"""What tensor-parallel ranks exchange inside a layer, each collective beside its adjoint.

    copied    x, the same on all ranks, is used by each        its adjoint: gradients of x are joined
    joined    parts of a sum, which all ranks get              its adjoint: the gradient of the sum is that of each part
    gathered  positions, which all ranks get                   its adjoint: scattered
    scattered parts of a sum, of which each has its positions  its adjoint: gathered

A sum is joined in the order that `order.py` declares: ranks hold the shares of it in their order, equally many each, so
that what a rank has summed is a subtree. Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, figure 3 (f and g).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlm_mpi import order
from mlm_mpi.backend import sums
from mlm_mpi.comm.group import Group
from mlm_mpi.comm.tree import merges_of
from mlm_mpi.cut import Box, cut

_PART, _SUM = 1, 2  # tags


def joined(group: Group, part: Any, what: str) -> Any:
    """Σ over ranks of their parts, contiguous, in the order of the tree: over `part`, which it returns. Collective.

    Each rank adds up a slice and gives it to the others: a rank sends 2 (R − 1) / R of the array's bytes.
    """
    if group.size == 1:
        return part
    flat, me, mail = part.reshape(-1), group.rank, group.mail
    slices = [slice(*cut(flat.size, group.size, rank)) for rank in range(group.size)]
    others = [rank for rank in range(group.size) if rank != me]
    length = slices[me].stop - slices[me].start
    leaves = {rank: np.empty(length, flat.dtype) for rank in others}
    sums_ = {rank: np.empty(slices[rank].stop - slices[rank].start, flat.dtype) for rank in others}
    arriving = [mail.receive(leaves[rank], rank, _PART) for rank in others]
    returning = [mail.receive(sums_[rank], rank, _SUM) for rank in others]
    leaving = [mail.send(flat[slices[rank]], rank, _PART) for rank in others]
    for message in arriving:
        group.wait(message, what)
    leaves[me], total = flat[slices[me]], np.empty(length, flat.dtype)
    sums.tree([leaves[rank] for rank in range(group.size)], _merges(group.size), total)
    leaving += [mail.send(total, rank, _SUM) for rank in others]
    for message in leaving + returning:
        group.wait(message, what)
    flat[slices[me]] = total
    for rank in others:
        flat[slices[rank]] = sums_[rank]
    return part


def gathered(group: Group, mine: Any, what: str) -> Any:
    """All positions, of which each rank has equally many, in the order of ranks. Shapes: (B, T / R, C) -> (B, T, C)."""
    if group.size == 1:
        return mine
    rows = group.allgather_array(np.ascontiguousarray(mine).reshape(-1), what).reshape(group.size, *mine.shape)
    return rows.swapaxes(0, 1).reshape(mine.shape[0], -1, mine.shape[2])


def scattered(group: Group, part: Any, what: str) -> Any:
    """`joined`, of which each rank gets its positions: the adjoint of `gathered`. Shapes: (B, T, C) -> (B, T / R, C).

    A rank sends (R − 1) / R of the array's bytes.
    """
    if group.size == 1:
        return part
    me, mail = group.rank, group.mail
    length = part.shape[1] // group.size
    others = [rank for rank in range(group.size) if rank != me]
    slices = {rank: part[:, rank * length : (rank + 1) * length] for rank in range(group.size)}
    leaves = {rank: np.empty((part.shape[0], length, part.shape[2]), part.dtype) for rank in others}
    messages = [mail.receive(leaves[rank], rank, _PART) for rank in others]
    messages += [mail.send(np.ascontiguousarray(slices[rank]), rank, _PART) for rank in others]
    for message in messages:
        group.wait(message, what)
    leaves[me] = np.ascontiguousarray(slices[me])
    total = np.empty_like(leaves[me])
    flat = [leaves[rank].reshape(-1) for rank in range(group.size)]
    sums.tree(flat, _merges(group.size), total.reshape(-1))
    return total


def joined_rows(group: Group, part: np.ndarray, what: str) -> np.ndarray:
    """The same of a few numbers, (n,): all of them travel at once. Collective."""
    return part if group.size == 1 else np.asarray(order.joined(list(group.allgather_array(part, what))))


def largest(group: Group, mine: np.ndarray, what: str) -> np.ndarray:
    """The maximum over ranks of each number. Collective. Shapes: (n,) -> (n,)."""
    return mine if group.size == 1 else np.asarray(group.allgather_array(mine, what).max(axis=0))


def assembled(group: Group, mine: np.ndarray, boxes: Sequence[Box], shape: Sequence[int], what: str) -> np.ndarray:
    """The global array of which each rank holds a box, the same of one size. Collective."""
    rows = group.allgather_array(np.ascontiguousarray(mine).reshape(-1), what)
    whole = np.empty(tuple(shape), mine.dtype)
    for row, box in zip(rows, boxes, strict=True):
        assert row.size == math.prod(box.shape), "ranks of a mesh hold equal boxes"
        whole[box.slices] = row.reshape(box.shape)
    return whole


def _merges(count: int) -> list[int]:
    return merges_of((0, count), [(number, number + 1) for number in range(count)])
