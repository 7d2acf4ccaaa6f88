"""The pre-norm transformer block, composed of what it is given, and GPT's feed-forward half."""

from typing import Any, Protocol

from mlm_mpi.layers.base import Array, Context, Flow
from mlm_mpi.layers.linear import Linear, ResidualLinear
from mlm_mpi.params.store import Parameter


class Norm(Protocol):
    """A normalisation whose backward can add the gradient that went past its branch. Shapes: (N, C) -> (N, C)."""

    def parameters(self) -> list[Parameter]: ...
    def forward(self, x: Array, ctx: Context) -> tuple[Array, Any]: ...
    def backward(self, dy: Array, saved: Any, ctx: Context, add: Array = None) -> Array: ...


class Branch(Protocol):
    """A mixer of positions, (B, T, C) -> (B, T, C), or an mlp, (N, C) -> (N, C); adds `residual` (N, C) at its end."""

    def parameters(self) -> list[Parameter]: ...
    def forward(self, x: Array, ctx: Context, residual: Array = None) -> tuple[Array, Any]: ...
    def backward(self, dy: Array, saved: Any, ctx: Context) -> Array: ...


class FeedForward:
    """x -> GELU(x W₁ + b₁) W₂ + b₂. Shapes: (N, C) -> (N, C), (N, F) in between."""

    def __init__(self, up: Linear, down: ResidualLinear) -> None:
        self.up, self.down = up, down

    def parameters(self) -> list[Parameter]:
        return self.up.parameters() + self.down.parameters()

    def forward(self, x: Array, ctx: Context, residual: Array = None) -> tuple[Array, Any]:
        """`residual` (N, C) or None: what the result is added to."""
        hidden, pre = self.up.forward_gelu(x)  # (N, F)
        y, s_down = self.down.join(hidden, residual, ctx)  # (N, C)
        return y, (x, pre, s_down)

    def backward(self, dy: Array, saved: Any, ctx: Context) -> Array:
        x, pre, s_down = saved
        return self.up.backward(self.down.backward(dy, s_down, ctx, pre), x, ctx)


class Block:
    """x + mixer(norm1(x)), then x + mlp(norm2(x)). Shapes: (B, T, C) -> (B, T, C).

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019.
    """

    def __init__(self, norm1: Norm, mixer: Branch, norm2: Norm, mlp: Branch) -> None:
        self.norm1, self.mixer, self.norm2, self.mlp = norm1, mixer, norm2, mlp

    def parameters(self) -> list[Parameter]:
        parts = (self.norm1, self.mixer, self.norm2, self.mlp)
        return [p for part in parts for p in part.parameters()]

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, Any]:
        shape = x[0].shape
        flat = x[0].reshape(-1, shape[2])  # (N, C)
        n1, s_norm1 = self.norm1.forward(flat, ctx)
        a, s_mixer = self.mixer.forward(n1.reshape(shape), ctx, residual=flat)
        middle = a.reshape(flat.shape)
        n2, s_norm2 = self.norm2.forward(middle, ctx)
        y, s_mlp = self.mlp.forward(n2, ctx, residual=middle)
        return (y.reshape(shape),), (s_norm1, s_mixer, s_norm2, s_mlp)

    def backward(self, dy: Flow, saved: Any, ctx: Context) -> Flow:
        s_norm1, s_mixer, s_norm2, s_mlp = saved
        shape = dy[0].shape
        flat = dy[0].reshape(-1, shape[2])
        d = self.norm2.backward(self.mlp.backward(flat, s_mlp, ctx), s_norm2, ctx, add=flat)  # (N, C)
        a = self.mixer.backward(d.reshape(shape), s_mixer, ctx)
        return (self.norm1.backward(a.reshape(flat.shape), s_norm1, ctx, add=d).reshape(shape),)
