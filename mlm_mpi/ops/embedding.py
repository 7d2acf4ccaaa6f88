"""Rows of a table by index; backward adds gradients of equal indices in position order, always the same."""

from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import module_of
from mlm_mpi.backend.kernels import served


@served
def forward(ids: Any, table: Any) -> Any:
    """Shapes: ids (…), table (V, C) -> (…, C)."""
    return table[ids]


@served
def backward(dy: Any, ids: Any, dtable: Any) -> None:
    """Adds to dtable. Shapes: dy (N, C), ids (N,), dtable (V, C)."""
    xp = module_of(dy)
    if xp is not np:  # CuPy has no reduceat; its scatter-add is not deterministic (the CUDA kernel will be)
        import cupyx

        cupyx.scatter_add(dtable, ids, dy)
        return
    order = np.argsort(ids, kind="stable")
    ranked = ids[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    dtable[ranked[starts]] += np.add.reduceat(dy[order], starts, axis=0)
