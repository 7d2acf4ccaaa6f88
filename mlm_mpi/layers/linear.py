"""Affine map with its weight stored (in, out); the two gradients can be asked for separately."""

import math
from typing import Any

from mlm_mpi import order
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.ops import dropout, linear
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import Cuts, Parameter


def flat(x: Any) -> Any:
    """(…, C) -> (N, C), a view."""
    return x.reshape(-1, x.shape[-1])


class Linear:
    """y = x W + b. Shapes: (…, K) -> (…, F), where F may be the product of several dims of the weight (K, *outputs).

    `cut`: the dim of the weight that the tp axis will cut, 0 for the inputs; `unit`: how many of its elements stay
    together; `shares`: how many shares a sum over that dim has at most. `init`: standard deviation, or "zeros".
    `matrices`: what an optimiser of matrices sees in the weight (`Parameter.matrices`).
    """

    def __init__(
        self, name: str, inputs: int, outputs: int | tuple[int, ...], init: float | str, cut: int | None = None,
        unit: int = 1, shares: int = order.MOST, bias: bool = True, matrices: Cuts = (),
    ) -> None:  # fmt: skip
        shape = inputs, *((outputs,) if isinstance(outputs, int) else outputs)
        self.inputs, self.outputs = inputs, shape[1:]
        count = 1 if cut is None else order.shares(shape[cut] // unit, shares)
        self.shares_in, self.shares_out = (count, 1) if cut == 0 else (1, count)  # of the forward, of the backward
        self.segments = math.prod(shape[1:cut]) if cut else 1  # of the outputs, each of them cut alike
        axes = tuple("tp" if dim == cut else None for dim in range(len(shape)))
        units = tuple(unit if dim == cut else 1 for dim in range(len(shape)))
        self.weight = Parameter(
            f"{name}.weight", Layout(shape, axes, units, count), init, decay=True, matrices=matrices
        )
        self.bias = None
        if bias:
            self.bias = Parameter(f"{name}.bias", Layout(shape[1:], axes[1:], units[1:], self.shares_out), "zeros")

    def parameters(self) -> list[Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        return self._map(x), x

    def _matrices(self) -> tuple[Any, Any]:
        """Weight (K, F) and bias (F,) or None."""
        return self.weight.data.reshape(self.inputs, -1), None if self.bias is None else self.bias.data.reshape(-1)

    def _map(self, x: Any, residual: Any = None) -> Any:
        added = None if residual is None else flat(residual)
        y = linear.forward(flat(x), *self._matrices(), added, self.shares_in)
        return y.reshape(*x.shape[:-1], -1)

    def forward_gelu(self, x: Any) -> tuple[Any, Any]:
        """(gelu(pre), pre) with pre what `forward` gives."""
        y, pre = linear.forward_gelu(flat(x), *self._matrices())
        return y.reshape(*x.shape[:-1], -1), pre.reshape(*x.shape[:-1], -1)

    def backward_input(self, dy: Any, pre: Any = None) -> Any:
        weight, before = self._matrices()[0], None if pre is None else flat(pre)
        dx = linear.backward_input(flat(dy), weight, before, self.shares_out, self.segments)
        return dx.reshape(*dy.shape[:-1], -1)

    def backward_weight(self, dy: Any, saved: Any, ctx: Context) -> None:
        dw = ctx.grad(self.weight).reshape(self.inputs, -1)
        db = None if self.bias is None else ctx.grad(self.bias).reshape(-1)
        linear.backward_weight(flat(dy), flat(saved), dw, db, ctx.accumulate, ctx.pieces(dy))

    def backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        ctx.owe(lambda at: self.backward_weight(dy, saved, at))
        return self.backward_input(dy)


class ResidualLinear(Linear):
    """y = residual + dropout(x W + b): how a branch joins the residual stream. Shapes: (…, K), (…, F) -> (…, F)."""

    def __init__(
        self, name: str, inputs: int, outputs: int, init: float | str, drop: Dropout, unit: int = 1,
        shares: int = order.MOST, bias: bool = True, matrices: Cuts = (),
    ) -> None:  # fmt: skip
        super().__init__(name, inputs, outputs, init, 0, unit, shares, bias, matrices)
        self.drop = drop

    def join(self, x: Any, residual: Any, ctx: Context) -> tuple[Any, Any]:
        """As `forward`, with what the result is added to (None: nothing)."""
        draw = self.drop.draw(ctx)
        if draw is None:
            return self._map(x, residual), (x, None)
        return dropout.forward(self._map(x), draw, residual), (x, draw)

    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        return self.join(x, None, ctx)

    def backward(self, dy: Any, saved: Any, ctx: Context, pre: Any = None) -> Any:
        """dx, or that of `pre` where x was gelu(pre); the residual's gradient is dy itself."""
        x, draw = saved
        dy = self.drop.backward(dy, draw, ctx)
        ctx.owe(lambda at: self.backward_weight(dy, x, at))
        return self.backward_input(dy, pre)
