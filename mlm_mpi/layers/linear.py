"""Affine map with its weight stored (in, out); the two gradients can be asked for separately."""

import math
from typing import Any, Protocol

from mlm_mpi import order
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.ops import dropout, gelu, linear, matmul
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import Cuts, Parameter


def flat(x: Any) -> Any:
    """(…, C) -> (N, C), a view."""
    return x.reshape(-1, x.shape[-1])


class Beside(Protocol):
    """What is added to an affine map (layers/adapters.py). Shapes: x (…, K), y (…, F)."""

    def parameters(self) -> list[Parameter]: ...
    def added(self, x: Any, y: Any, ctx: Context) -> Any: ...
    def backward(self, dy: Any, x: Any, dx: Any, ctx: Context) -> Any: ...


class Linear:
    """y = x W + b. Shapes: (…, K) -> (…, F), where F may be the product of several dims of the weight (K, *outputs).

    `cut`: the dim of the weight that the tp axis cuts, 0 for the inputs; `unit`: how many of its elements stay
    together; `shares`: how many shares a sum over that dim has at most. Where outputs are cut, a rank's y is a part of
    them, and dx a sum over ranks; where inputs are, x is a part of them, and y the sum. Source: Shoeybi et al.,
    Megatron-LM, arXiv:1909.08053. `init`: standard deviation, or "zeros".
    `matrices`: what an optimiser of matrices sees in the weight (`Parameter.matrices`).
    """

    def __init__(
        self, name: str, inputs: int, outputs: int | tuple[int, ...], init: float | str, cut: int | None = None,
        unit: int = 1, shares: int = order.MOST, bias: bool = True, matrices: Cuts = (),
    ) -> None:  # fmt: skip
        shape = inputs, *((outputs,) if isinstance(outputs, int) else outputs)
        self.name, self.inputs, self.cut = name, inputs, cut
        self.beside: Beside | None = None
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
        own = [self.weight] if self.bias is None else [self.weight, self.bias]
        return own if self.beside is None else [*own, *self.beside.parameters()]

    @property
    def outputs(self) -> tuple[int, ...]:
        """The dims of what this rank computes."""
        return tuple(self.weight.data.shape[1:])

    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        return self.mapped(x, ctx), x

    def _matrices(self) -> tuple[Any, Any]:
        """Weight (K, F) and bias (F,) or None: what this rank holds of them."""
        weight = self.weight.data
        return weight.reshape(weight.shape[0], -1), None if self.bias is None else self.bias.data.reshape(-1)

    def mapped(self, x: Any, ctx: Context, residual: Any = None) -> Any:
        """y, plus `residual` (…, F) where given."""
        if self.cut == 0 and ctx.tp.size > 1:
            return self._sum(x, ctx, residual)
        x = self._entered(x, ctx)
        y = linear.forward(flat(x), *self._matrices(), None if residual is None else flat(residual), self.shares_in)
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.beside is None else self.beside.added(x, y, ctx)

    def _entered(self, x: Any, ctx: Context) -> Any:
        """All positions of what comes in, where my outputs are a part."""
        return ctx.entered(x, f"the inputs of {self.name}") if self.cut else x

    def _sum(self, x: Any, ctx: Context, residual: Any) -> Any:
        """Σ over ranks of what each has of x W, then bias and residual. Collective over tp."""
        weight, bias = self._matrices()
        part = matmul.product(flat(x), weight, self.shares_in // ctx.tp.size)
        y = ctx.left(part.reshape(*x.shape[:-1], -1), f"the sum of {self.name}")
        linear.completed(flat(y), bias, None if residual is None else flat(residual))
        return y

    def forward_gelu(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        """(gelu(pre), pre) with pre what `forward` gives."""
        if self.beside is not None:
            pre = self.mapped(x, ctx)
            return gelu.forward(pre), pre
        x = self._entered(x, ctx)
        y, pre = linear.forward_gelu(flat(x), *self._matrices())
        return y.reshape(*x.shape[:-1], -1), pre.reshape(*x.shape[:-1], -1)

    def backward_input(self, dy: Any, ctx: Context, pre: Any = None) -> Any:
        weight, before = self._matrices()[0], None if pre is None else flat(pre)
        ranks = ctx.tp.size if self.cut else 1
        dx = linear.backward_input(flat(dy), weight, before, self.shares_out // ranks, self.segments)
        dx = dx.reshape(*dy.shape[:-1], -1)
        return ctx.left(dx, f"the gradient of {self.name}'s inputs") if ranks > 1 else dx

    def backward_weight(self, dy: Any, saved: Any, ctx: Context) -> None:
        if self.weight.frozen and (self.bias is None or self.bias.frozen):
            return
        dw = ctx.grad(self.weight)
        dw = dw.reshape(dw.shape[0], -1)
        db = None if self.bias is None else ctx.grad(self.bias).reshape(-1)
        x = flat(self._entered(saved, ctx))
        linear.backward_weight(flat(dy), x, dw, db, ctx.accumulate, ctx.pieces(dy))

    def backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        return self._backward(dy, saved, ctx)

    def _backward(self, dy: Any, x: Any, ctx: Context, pre: Any = None) -> Any:
        """dx, or that of `pre` where x was gelu(pre)."""
        ctx.owe(lambda at: self.backward_weight(dy, x, at))
        if self.beside is None:
            return self.backward_input(dy, ctx, pre)
        dx = self.beside.backward(dy, x, self.backward_input(dy, ctx), ctx)
        return dx if pre is None else gelu.backward(dx, pre)


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
        if not self.drop.active(ctx):
            return self.mapped(x, ctx, residual), (x, None)
        y = self.mapped(x, ctx)
        draw = self.drop.of_rows(ctx, y.shape)
        return dropout.forward(y, draw, residual), (x, draw)

    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        return self.join(x, None, ctx)

    def backward(self, dy: Any, saved: Any, ctx: Context, pre: Any = None) -> Any:
        """dx, or that of `pre` where x was gelu(pre); the residual's gradient is dy itself."""
        x, draw = saved
        dy = ctx.entered(self.drop.backward(dy, draw, ctx), f"the gradient of {self.name}'s sum")
        return self._backward(dy, x, ctx, pre)
