"""Affine map with its weight stored (in, out); the two gradients can be asked for separately."""

from typing import Any

from mlm_mpi.layers.base import Context
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.ops import dropout, linear
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import Parameter


class Linear:
    """y = x W + b. Shapes: (N, K) -> (N, F). `cut` names which side the tp axis will cut: "in" or "out", and
    `unit` how many of its elements stay together.
    """

    def __init__(self, name: str, inputs: int, outputs: int, std: float, cut: str | None = None, unit: int = 1) -> None:
        self.inputs, self.outputs = inputs, outputs
        axes = {"in": ("tp", None), "out": (None, "tp"), None: (None, None)}[cut]
        units = {"in": (unit, 1), "out": (1, unit), None: (1, 1)}[cut]
        self.weight = Parameter(f"{name}.weight", Layout((inputs, outputs), axes, units), std, decay=True)
        self.bias = Parameter(f"{name}.bias", Layout((outputs,), axes[1:], units[1:]), "zeros")

    def parameters(self) -> list[Parameter]:
        return [self.weight, self.bias]

    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        return linear.forward(x, self.weight.data, self.bias.data), x

    def forward_gelu(self, x: Any) -> tuple[Any, Any]:
        """(gelu(pre), pre) with pre what `forward` gives."""
        return linear.forward_gelu(x, self.weight.data, self.bias.data)

    def backward_input(self, dy: Any, pre: Any = None) -> Any:
        return linear.backward_input(dy, self.weight.data, pre)

    def backward_weight(self, dy: Any, saved: Any, ctx: Context) -> None:
        linear.backward_weight(dy, saved, ctx.grad(self.weight), ctx.grad(self.bias), ctx.accumulate)

    def backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        self.backward_weight(dy, saved, ctx)
        return self.backward_input(dy)


class ResidualLinear(Linear):
    """y = residual + dropout(x W + b): how a branch joins the residual stream. Shapes: (N, K), (N, F) -> (N, F)."""

    def __init__(self, name: str, inputs: int, outputs: int, std: float, drop: Dropout, unit: int = 1) -> None:
        super().__init__(name, inputs, outputs, std, cut="in", unit=unit)
        self.drop = drop

    def join(self, x: Any, residual: Any, ctx: Context) -> tuple[Any, Any]:
        """As `forward`, with what the result is added to (None: nothing)."""
        draw = self.drop.draw(ctx)
        if draw is None:
            return linear.forward(x, self.weight.data, self.bias.data, residual), (x, None)
        return dropout.forward(linear.forward(x, self.weight.data, self.bias.data), draw, residual), (x, draw)

    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        return self.join(x, None, ctx)

    def backward(self, dy: Any, saved: Any, ctx: Context, pre: Any = None) -> Any:
        """dx, or that of `pre` where x was gelu(pre); the residual's gradient is dy itself."""
        x, draw = saved
        dy = self.drop.backward(dy, draw, ctx)
        self.backward_weight(dy, x, ctx)
        return self.backward_input(dy, pre)
