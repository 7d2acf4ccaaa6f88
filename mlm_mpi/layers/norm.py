"""Normalisations of rows, with what they learn."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlm_mpi import order
from mlm_mpi.backend.arrays import deposit
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.linear import flat
from mlm_mpi.ops import layernorm, rmsnorm
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import Parameter


def _row_by_row(
    backward: Callable[..., Any], learned: Sequence[Parameter], arrays: tuple[Any, Any, Any], statistics: Any,
    ctx: Context,
) -> Any:  # fmt: skip
    """The backward of ranks that hold some positions of each row of a batch: those of one row are a subtree of its sum.

    `arrays`: dy, x, and add or None (B, t, C). Collective over tp, of B vectors for each that is learned.
    """
    dy, x, add = arrays
    (rows, length, width), pieces = x.shape, ctx.pieces_of_mine(x)
    dx, sums = np.empty_like(x), np.empty((rows, len(learned), width), learned[0].data.dtype)
    for row in range(rows):
        part = np.ascontiguousarray(statistics[..., row * length : (row + 1) * length])
        more = None if add is None else add[row]
        dx[row] = backward(dy[row], x[row], learned[0].data, part, *sums[row], False, more, pieces)
    every = ctx.tp.allgather_array(sums.reshape(-1), "sums over positions").reshape(-1, *sums.shape)
    whole = order.joined([order.joined(list(every[:, row])) for row in range(rows)])
    for parameter, gradient in zip(learned, whole, strict=True):
        deposit(gradient, ctx.grad(parameter), ctx.accumulate)
    return dx


class LayerNorm:
    """Shapes: (…, C) -> (…, C)."""

    def __init__(self, name: str, width: int, epsilon: float) -> None:
        self.gain = Parameter(f"{name}.gain", Layout((width,)), "ones")
        self.bias = Parameter(f"{name}.bias", Layout((width,)), "zeros")
        self.epsilon = epsilon

    def parameters(self) -> list[Parameter]:
        return [self.gain, self.bias]

    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        y, statistics = layernorm.forward(flat(x), self.gain.data, self.bias.data, self.epsilon)
        return y.reshape(x.shape), (x, statistics)

    def backward(self, dy: Any, saved: Any, ctx: Context, add: Any = None) -> Any:
        """dx, plus `add` (…, C) where given: the gradient that went past this branch."""
        x, statistics = saved
        if ctx.cuts_positions:
            return _row_by_row(layernorm.backward, [self.gain, self.bias], (dy, x, add), statistics, ctx)
        dx = layernorm.backward(
            flat(dy), flat(x), self.gain.data, statistics, ctx.grad(self.gain), ctx.grad(self.bias), ctx.accumulate,
            None if add is None else flat(add), ctx.pieces(x),
        )  # fmt: skip
        return dx.reshape(x.shape)


class RMSNorm:
    """x over the root of its mean square, with gain. Shapes: (…, C) -> (…, C)."""

    def __init__(self, name: str, width: int, epsilon: float) -> None:
        self.gain = Parameter(f"{name}.gain", Layout((width,)), "ones")
        self.epsilon = epsilon

    def parameters(self) -> list[Parameter]:
        return [self.gain]

    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        y, inverse = rmsnorm.forward(flat(x), self.gain.data, self.epsilon)
        return y.reshape(x.shape), (x, inverse)

    def backward(self, dy: Any, saved: Any, ctx: Context, add: Any = None) -> Any:
        """dx, plus `add` (…, C) where given: the gradient that went past this branch."""
        x, inverse = saved
        if ctx.cuts_positions:
            return _row_by_row(rmsnorm.backward, [self.gain], (dy, x, add), inverse, ctx)
        dx = rmsnorm.backward(
            flat(dy), flat(x), self.gain.data, inverse, ctx.grad(self.gain), ctx.accumulate,
            None if add is None else flat(add), ctx.pieces(x),
        )  # fmt: skip
        return dx.reshape(x.shape)
