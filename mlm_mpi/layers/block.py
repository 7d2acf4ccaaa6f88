"""The pre-norm transformer block, and its feed-forward half."""

from typing import Any

from mlm_mpi.layers.attention import SelfAttention
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.linear import Linear
from mlm_mpi.layers.norm import LayerNorm
from mlm_mpi.ops import gelu
from mlm_mpi.params.store import Parameter


class FeedForward:
    """x -> GELU(x W₁ + b₁) W₂ + b₂. Shapes: (N, C) -> (N, C), (N, F) in between."""

    def __init__(self, name: str, width: int, hidden: int, std: float, out_std: float) -> None:
        self.up = Linear(f"{name}.up", width, hidden, std, cut="out")
        self.down = Linear(f"{name}.down", hidden, width, out_std, cut="in")

    def parameters(self) -> list[Parameter]:
        return self.up.parameters() + self.down.parameters()

    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        hidden, _ = self.up.forward(x, ctx)  # (N, F)
        active, t = gelu.forward(hidden)
        y, _ = self.down.forward(active, ctx)  # (N, C)
        return y, (x, hidden, active, t)

    def backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        x, hidden, active, t = saved
        dactive = self.down.backward(dy, active, ctx)
        return self.up.backward(gelu.backward(dactive, hidden, t), x, ctx)


class Block:
    """x + attention(norm(x)), then x + feed_forward(norm(x)). Shapes: (B, T, C) -> (B, T, C).

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019.
    """

    def __init__(
        self, name: str, width: int, heads: int, hidden: int, std: float, out_std: float, epsilon: float, dropout: float
    ) -> None:
        self.norm1 = LayerNorm(f"{name}.norm1", width, epsilon)
        self.attention = SelfAttention(f"{name}.attention", width, heads, std, out_std, dropout)
        self.drop1 = Dropout(f"{name}.drop1", dropout)
        self.norm2 = LayerNorm(f"{name}.norm2", width, epsilon)
        self.feed_forward = FeedForward(f"{name}.feed_forward", width, hidden, std, out_std)
        self.drop2 = Dropout(f"{name}.drop2", dropout)

    def parameters(self) -> list[Parameter]:
        parts = (self.norm1, self.attention, self.norm2, self.feed_forward)
        return [p for part in parts for p in part.parameters()]

    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        flat = x.reshape(-1, x.shape[2])  # (N, C)
        n1, s_norm1 = self.norm1.forward(flat, ctx)
        a, s_attention = self.attention.forward(n1.reshape(x.shape), ctx)
        a, s_drop1 = self.drop1.forward(a, ctx)
        a += x
        middle = a.reshape(flat.shape)
        n2, s_norm2 = self.norm2.forward(middle, ctx)
        m, s_feed = self.feed_forward.forward(n2, ctx)
        m, s_drop2 = self.drop2.forward(m, ctx)
        m += middle
        return m.reshape(x.shape), (s_norm1, s_attention, s_drop1, s_norm2, s_feed, s_drop2)

    def backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        s_norm1, s_attention, s_drop1, s_norm2, s_feed, s_drop2 = saved
        flat = dy.reshape(-1, dy.shape[2])
        d = self.drop2.backward(flat, s_drop2, ctx)
        d = self.norm2.backward(self.feed_forward.backward(d, s_feed, ctx), s_norm2, ctx)
        d += flat  # (N, C)
        a = self.drop1.backward(d.reshape(dy.shape), s_drop1, ctx)
        a = self.attention.backward(a, s_attention, ctx)
        dx = self.norm1.backward(a.reshape(flat.shape), s_norm1, ctx)
        dx += d
        return dx.reshape(dy.shape)
