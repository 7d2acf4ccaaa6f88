"""Normalisation by the root mean square: y = x / sqrt(mean(x²) + ε) · gain over the last dim; no mean, no bias.

Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
"""

from typing import Any

from mlm_mpi.backend.arrays import deposit, module_of, row_blocks, wide
from mlm_mpi.backend.registry import served
from mlm_mpi.ops.layernorm import blocks
from mlm_mpi.order import joined


@served
def forward(x: Any, gain: Any, epsilon: float) -> tuple[Any, Any]:
    """Shapes: x (N, C), gain (C,) -> y (N, C), inverse (N,): 1 / sqrt(mean(x²) + ε).

    y has the dtype of x; `inverse` is float32 where that is bfloat16.
    """
    xp, dtype = module_of(x), x.dtype
    x, gain = wide(x), wide(gain)
    y, inverse = xp.empty_like(x), xp.empty(x.shape[0], x.dtype)
    for rows in row_blocks(x):
        squares = xp.einsum("nc,nc->n", x[rows], x[rows]) / x.shape[1]
        inverse[rows] = 1.0 / xp.sqrt(squares + epsilon)
        xp.multiply(x[rows], inverse[rows, None], out=y[rows])
        y[rows] *= gain
    return y.astype(dtype, copy=False), inverse


@served
def backward(
    dy: Any, x: Any, gain: Any, inverse: Any, dgain: Any, accumulate: bool, add: Any = None, pieces: int = 1
) -> Any:
    """dx, plus `add` where given; writes or adds dgain. Shapes: dy, x, add (N, C), inverse (N,) -> (N, C).

    dx has the dtype of x; dgain may be wider. With n = x·inverse and g = dy·gain: dx = (g − n·mean(g·n))·inverse.
    dgain: `pieces` equal groups of rows are summed, each by itself, and joined by the tree.
    """
    xp, dtype = module_of(x), x.dtype
    dy, x, gain = wide(dy), wide(x), wide(gain)
    dx = xp.empty_like(x)
    sums = xp.zeros((pieces, x.shape[1]), gain.dtype)
    for piece, rows in blocks(x, pieces):
        normal = x[rows] * inverse[rows, None]
        sums[piece] += xp.einsum("nc,nc->c", dy[rows], normal)
        g = xp.multiply(dy[rows], gain, out=dx[rows])
        normal *= xp.einsum("nc,nc->n", g, normal)[:, None] / x.shape[1]
        g -= normal
        g *= inverse[rows, None]
    if add is not None:
        dx += wide(add)
    deposit(joined(sums), dgain, accumulate)
    return dx.astype(dtype, copy=False)
