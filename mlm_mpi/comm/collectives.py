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
    slices = [flat[slice(*cut(flat.size, group.size, rank))] for rank in range(group.size)]
    total = _of_my_slice(group, slices, what)
    messages = []
    for rank in (rank for rank in range(group.size) if rank != me):
        messages += [mail.receive(slices[rank], rank, _SUM), mail.send(total, rank, _SUM)]
    for message in messages:
        group.wait(message, what)
    slices[me][...] = total
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
    return _of_my_slice(group, [np.ascontiguousarray(mine) for mine in np.split(part, group.size, axis=1)], what)


def _of_my_slice(group: Group, slices: Sequence[np.ndarray], what: str) -> np.ndarray:
    """Σ over ranks of what each has of my slice, in the order of the tree. `slices`: of every rank, contiguous."""
    me, mail = group.rank, group.mail
    leaves = [np.empty_like(slices[me]) for _ in slices]
    messages = []
    for rank in (rank for rank in range(group.size) if rank != me):
        messages += [mail.receive(leaves[rank], rank, _PART), mail.send(slices[rank], rank, _PART)]
    for message in messages:
        group.wait(message, what)
    leaves[me], total = slices[me], np.empty_like(slices[me])
    leaf_nodes = [(rank, rank + 1) for rank in range(group.size)]
    sums.tree([leaf.reshape(-1) for leaf in leaves], merges_of((0, group.size), leaf_nodes), total.reshape(-1))
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
