"""Layer normalisation with gain and bias."""

from typing import Any

from mlm_mpi.layers.base import Context
from mlm_mpi.ops import layernorm
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import Parameter


class LayerNorm:
    """Shapes: (N, C) -> (N, C)."""

    def __init__(self, name: str, width: int, epsilon: float) -> None:
        self.gain = Parameter(f"{name}.gain", Layout((width,)), "ones")
        self.bias = Parameter(f"{name}.bias", Layout((width,)), "zeros")
        self.epsilon = epsilon

    def parameters(self) -> list[Parameter]:
        return [self.gain, self.bias]

    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        y, statistics = layernorm.forward(x, self.gain.data, self.bias.data, self.epsilon)
        return y, (x, statistics)

    def backward(self, dy: Any, saved: Any, ctx: Context, add: Any = None) -> Any:
        """dx, plus `add` (N, C) where given: the gradient that went past this branch."""
        x, statistics = saved
        dgain, dbias = ctx.grad(self.gain), ctx.grad(self.bias)
        return layernorm.backward(dy, x, self.gain.data, statistics, dgain, dbias, ctx.accumulate, add)
