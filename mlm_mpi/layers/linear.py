"""Affine map with its weight stored (in, out); the two gradients can be asked for separately."""

from typing import Any

from mlm_mpi import order
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.ops import dropout, linear
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import Parameter


def flat(x: Any) -> Any:
    """(…, C) -> (N, C), a view."""
    return x.reshape(-1, x.shape[-1])


class Linear:
    """y = x W + b. Shapes: (…, K) -> (…, F). `cut` names which side the tp axis will cut, "in" or "out", `unit` how
    many of its elements stay together, and `shares` how many shares a sum over that side has at most.
    """

    def __init__(
        self, name: str, inputs: int, outputs: int, std: float, cut: str | None = None, unit: int = 1,
        shares: int = order.MOST,
    ) -> None:  # fmt: skip
        self.inputs, self.outputs = inputs, outputs
        axes = {"in": ("tp", None), "out": (None, "tp"), None: (None, None)}[cut]
        units = {"in": (unit, 1), "out": (1, unit), None: (1, 1)}[cut]
        self.shares_in = order.shares(inputs // unit, shares) if cut == "in" else 1  # of the forward
        self.shares_out = order.shares(outputs // unit, shares) if cut == "out" else 1  # of the backward
        count = max(self.shares_in, self.shares_out)
        layout = Layout((inputs, outputs), axes, units, count)
        self.weight = Parameter(f"{name}.weight", layout, std, decay=True, matrices=(1, (outputs,)))
        self.bias = Parameter(f"{name}.bias", Layout((outputs,), axes[1:], units[1:], self.shares_out), "zeros")

    def parameters(self) -> list[Parameter]:
        return [self.weight, self.bias]

    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        return self._map(x), x

    def _map(self, x: Any, residual: Any = None) -> Any:
        added = None if residual is None else flat(residual)
        y = linear.forward(flat(x), self.weight.data, self.bias.data, added, self.shares_in)
        return y.reshape(*x.shape[:-1], -1)

    def forward_gelu(self, x: Any) -> tuple[Any, Any]:
        """(gelu(pre), pre) with pre what `forward` gives."""
        y, pre = linear.forward_gelu(flat(x), self.weight.data, self.bias.data)
        return y.reshape(*x.shape[:-1], -1), pre.reshape(*x.shape[:-1], -1)

    def backward_input(self, dy: Any, pre: Any = None) -> Any:
        dx = linear.backward_input(flat(dy), self.weight.data, None if pre is None else flat(pre), self.shares_out)
        return dx.reshape(*dy.shape[:-1], -1)

    def backward_weight(self, dy: Any, saved: Any, ctx: Context) -> None:
        dw, db = ctx.grad(self.weight), ctx.grad(self.bias)
        linear.backward_weight(flat(dy), flat(saved), dw, db, ctx.accumulate, ctx.pieces(dy))

    def backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        self.backward_weight(dy, saved, ctx)
        return self.backward_input(dy)


class ResidualLinear(Linear):
    """y = residual + dropout(x W + b): how a branch joins the residual stream. Shapes: (…, K), (…, F) -> (…, F)."""

    def __init__(
        self, name: str, inputs: int, outputs: int, std: float, drop: Dropout, unit: int = 1, shares: int = order.MOST
    ) -> None:
        super().__init__(name, inputs, outputs, std, "in", unit, shares)
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
        self.backward_weight(dy, x, ctx)
        return self.backward_input(dy, pre)
