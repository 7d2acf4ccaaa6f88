"""Sums of arrays in the one order that lanes are added in (`comm/reduction.py`)."""

from collections.abc import Sequence
from typing import Any

from mlm_mpi.backend.kernels import served


@served
def tree(parts: Sequence[Any], out: Any) -> None:
    """out = the sum of the parts in a binary tree that splits n of them at the largest power of two below n.

    Shapes: all alike; out may be one of the parts.
    """

    def add_up(some: Sequence[Any]) -> Any:
        if len(some) == 1:
            return some[0]
        middle = 1 << ((len(some) - 1).bit_length() - 1)
        return add_up(some[:middle]) + add_up(some[middle:])

    out[...] = add_up(parts)
