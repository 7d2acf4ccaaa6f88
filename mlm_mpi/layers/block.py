"""The pre-norm transformer block, and its feed-forward half."""

from typing import Any

from mlm_mpi.layers.attention import SelfAttention
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.linear import Linear, ResidualLinear
from mlm_mpi.layers.norm import LayerNorm
from mlm_mpi.params.store import Parameter


class FeedForward:
    """x -> GELU(x W₁ + b₁) W₂ + b₂. Shapes: (N, C) -> (N, C), (N, F) in between."""

    def __init__(self, name: str, width: int, hidden: int, std: float, out_std: float, drop: Dropout) -> None:
        self.up = Linear(f"{name}.up", width, hidden, std, cut="out")
        self.down = ResidualLinear(f"{name}.down", hidden, width, out_std, drop)

    def parameters(self) -> list[Parameter]:
        return self.up.parameters() + self.down.parameters()

    def forward(self, x: Any, ctx: Context, residual: Any = None) -> tuple[Any, Any]:
        """`residual` (N, C) or None: what the result is added to."""
        hidden, pre = self.up.forward_gelu(x)  # (N, F)
        y, s_down = self.down.join(hidden, residual, ctx)  # (N, C)
        return y, (x, pre, s_down)

    def backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        x, pre, s_down = saved
        return self.up.backward(self.down.backward(dy, s_down, ctx, pre), x, ctx)


class Block:
    """x + attention(norm(x)), then x + feed_forward(norm(x)). Shapes: (B, T, C) -> (B, T, C).

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019.
    """

    def __init__(
        self, name: str, width: int, heads: int, hidden: int, std: float, out_std: float, epsilon: float, dropout: float
    ) -> None:
        self.norm1 = LayerNorm(f"{name}.norm1", width, epsilon)
        self.attention = SelfAttention(
            f"{name}.attention", width, heads, std, out_std, dropout, Dropout(f"{name}.drop1", dropout)
        )
        self.norm2 = LayerNorm(f"{name}.norm2", width, epsilon)
        self.feed_forward = FeedForward(
            f"{name}.feed_forward", width, hidden, std, out_std, Dropout(f"{name}.drop2", dropout)
        )

    def parameters(self) -> list[Parameter]:
        parts = (self.norm1, self.attention, self.norm2, self.feed_forward)
        return [p for part in parts for p in part.parameters()]

    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        flat = x.reshape(-1, x.shape[2])  # (N, C)
        n1, s_norm1 = self.norm1.forward(flat, ctx)
        a, s_attention = self.attention.forward(n1.reshape(x.shape), ctx, residual=flat)
        middle = a.reshape(flat.shape)
        n2, s_norm2 = self.norm2.forward(middle, ctx)
        y, s_feed = self.feed_forward.forward(n2, ctx, residual=middle)
        return y.reshape(x.shape), (s_norm1, s_attention, s_norm2, s_feed)

    def backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        s_norm1, s_attention, s_norm2, s_feed = saved
        flat = dy.reshape(-1, dy.shape[2])
        d = self.norm2.backward(self.feed_forward.backward(flat, s_feed, ctx), s_norm2, ctx, add=flat)  # (N, C)
        a = self.attention.backward(d.reshape(dy.shape), s_attention, ctx)
        return self.norm1.backward(a.reshape(flat.shape), s_norm1, ctx, add=d).reshape(dy.shape)
