"""Normalisations of rows, with what they learn."""

from typing import Any

from mlm_mpi.layers.base import Context
from mlm_mpi.layers.linear import flat
from mlm_mpi.ops import layernorm, rmsnorm
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import Parameter


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
        dx = rmsnorm.backward(
            flat(dy), flat(x), self.gain.data, inverse, ctx.grad(self.gain), ctx.accumulate,
            None if add is None else flat(add), ctx.pieces(x),
        )  # fmt: skip
        return dx.reshape(x.shape)
