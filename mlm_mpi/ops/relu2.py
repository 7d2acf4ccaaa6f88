"""Squared ReLU: y = max(x, 0)². Source: So et al., "Primer", arXiv:2109.08668."""

from typing import Any

from mlm_mpi.backend.arrays import module_of, row_blocks, wide
from mlm_mpi.backend.registry import served


@served
def forward(x: Any) -> Any:
    """Shapes: (N, F) -> (N, F)."""
    xp = module_of(x)
    y = xp.empty_like(x)
    for rows in row_blocks(x):
        positive = xp.maximum(wide(x[rows]), 0.0)
        xp.multiply(positive, positive, out=y[rows], casting="unsafe")  # bfloat16 is rounded
    return y


@served
def backward(dy: Any, x: Any, out: Any = None) -> Any:
    """dx = dy · 2·max(x, 0), into `out` (may be dy). Shapes: all (N, F)."""
    xp = module_of(x)
    dx = xp.empty_like(x) if out is None else out
    for rows in row_blocks(x):
        positive = xp.maximum(wide(x[rows]), 0.0)
        xp.multiply(positive + positive, wide(dy[rows]), out=dx[rows], casting="unsafe")
    return dx
