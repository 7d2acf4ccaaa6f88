"""Layer normalisation: y = (x − mean) / sqrt(var + ε) · gain + bias over the last dim.

Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
"""

from collections.abc import Iterator
from typing import Any

from mlm_mpi.backend.arrays import deposit, module_of, row_blocks, wide
from mlm_mpi.backend.registry import served
from mlm_mpi.order import joined


@served
def forward(x: Any, gain: Any, bias: Any, epsilon: float) -> tuple[Any, Any]:
    """Shapes: x (N, C), gain and bias (C,) -> y (N, C), statistics (2, N): mean and 1/deviation.

    y has the dtype of x; statistics are float32 where that is bfloat16.
    """
    xp, dtype = module_of(x), x.dtype
    x, gain, bias = wide(x), wide(gain), wide(bias)
    y = xp.empty_like(x)
    statistics = xp.empty((2, x.shape[0]), x.dtype)
    for rows in row_blocks(x):
        mean = x[rows].mean(axis=1)
        centred = xp.subtract(x[rows], mean[:, None], out=y[rows])
        variance = xp.einsum("nc,nc->n", centred, centred) / x.shape[1]
        inverse = 1.0 / xp.sqrt(variance + epsilon)
        centred *= inverse[:, None]
        centred *= gain
        centred += bias
        statistics[0, rows], statistics[1, rows] = mean, inverse
    return y.astype(dtype, copy=False), statistics


@served
def backward(
    dy: Any, x: Any, gain: Any, statistics: Any, dgain: Any, dbias: Any, accumulate: bool, add: Any = None,
    pieces: int = 1,
) -> Any:  # fmt: skip
    """dx, plus `add` where given; writes or adds dgain, dbias. Shapes: dy, x, add (N, C), statistics (2, N) -> (N, C).

    dx has the dtype of x; dgain and dbias may be wider.
    With n = normalised x and g = dy·gain: dx = (g − mean(g) − n·mean(g·n)) / deviation.
    dgain and dbias: `pieces` equal groups of rows are summed, each by itself, and joined by the tree.
    """
    xp, dtype = module_of(x), x.dtype
    dy, x, gain = wide(dy), wide(x), wide(gain)
    dx = xp.empty_like(x)
    sums = xp.zeros((pieces, 2, x.shape[1]), gain.dtype)  # gain's and bias' of every piece
    for piece, rows in blocks(x, pieces):
        mean, inverse = statistics[0, rows, None], statistics[1, rows, None]
        normal = (x[rows] - mean) * inverse
        sums[piece, 0] += xp.einsum("nc,nc->c", dy[rows], normal)
        sums[piece, 1] += dy[rows].sum(axis=0)
        g = xp.multiply(dy[rows], gain, out=dx[rows])
        along = xp.einsum("nc,nc->n", g, normal)[:, None] / x.shape[1]
        g -= g.mean(axis=1, keepdims=True)
        normal *= along
        g -= normal
        g *= inverse
    if add is not None:
        dx += wide(add)
    whole = joined(sums)
    deposit(whole[0], dgain, accumulate)
    deposit(whole[1], dbias, accumulate)
    return dx.astype(dtype, copy=False)


def blocks(x: Any, pieces: int) -> Iterator[tuple[int, slice]]:
    """(piece, its rows) in blocks that stay in cache, in ascending order. ValueError where rows do not divide so."""
    group, rest = divmod(x.shape[0], pieces)
    if rest:
        raise ValueError(f"{x.shape[0]} rows in {pieces} equal pieces")
    for piece in range(pieces):
        for rows in row_blocks(x[piece * group : (piece + 1) * group]):
            yield piece, slice(piece * group + rows.start, piece * group + rows.stop)
