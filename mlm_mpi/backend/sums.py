"""The sum of arrays in the order of a tree: the gradient sums of `comm.reductions`, which may not see `ops`."""

from collections.abc import Sequence
from typing import Any

from mlm_mpi.backend.arrays import row_blocks
from mlm_mpi.backend.registry import served


@served
def tree(leaves: Sequence[Any], merges: Sequence[int], out: Any) -> None:
    """out = the sum of the leaves: after leaf i the two newest sums become one, merges[i] times.

    Shapes: leaves (N,) each, out (N,), which may be one of them. Σ merges is the number of leaves − 1.
    """
    for part in row_blocks(out):
        sums: list[Any] = []
        for leaf, count in zip(leaves, merges, strict=True):
            sums.append(leaf[part])
            for _ in range(count):
                right = sums.pop()
                sums[-1] = sums[-1] + right
        out[part] = sums[0]
