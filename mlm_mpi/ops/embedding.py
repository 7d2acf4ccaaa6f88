"""Rows of a table by index; backward sums gradients of equal indices in position order, then adds the sums."""

from typing import Any

from mlm_mpi.backend.arrays import scatter_add, wide
from mlm_mpi.backend.registry import served


@served
def forward(ids: Any, table: Any) -> Any:
    """Shapes: ids (…), table (V, C) -> (…, C).

    An id outside the table raises IndexError on the CPU; on a GPU, where looking would cost a synchronisation, the
    kernel gives a row of NaN, which the loss shows, and `backward` leaves the id out.
    """
    return table[ids]


@served
def backward(dy: Any, ids: Any, dtable: Any) -> None:
    """dtable[id] += Σ of the rows of dy that have this id, complete before it is added; dtable may be wider than dy.

    Shapes: dy (N, C), ids (N,), dtable (V, C).
    """
    scatter_add(dtable, ids, wide(dy))
