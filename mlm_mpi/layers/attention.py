"""Causal multi-head self-attention with a fused query-key-value projection, and the key/value cache."""

from typing import Any

from mlm_mpi import order
from mlm_mpi.backend.arrays import module_of
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.linear import Linear, ResidualLinear
from mlm_mpi.ops import attention
from mlm_mpi.params.store import Parameter, equal


class KeyValueCache:
    """Keys and values of the positions seen so far, per layer; `length` positions are valid.

    `states`: what recurrent layers keep instead, arrays (B, C) of the last position by the layer's name.
    """

    def __init__(self, context: int) -> None:
        self.context, self.length = context, 0
        self.states: dict[str, tuple[Any, ...]] = {}
        self._held: dict[str, tuple[Any, Any]] = {}

    def extend(self, name: str, k: Any, v: Any) -> tuple[Any, Any]:
        """Appends k, v (B, H, T, D) and returns all keys and values so far (B, H, length + T, D)."""
        xp, (batch, heads, new, width) = module_of(k), k.shape
        if name not in self._held:
            empty = (batch, heads, self.context, width)
            self._held[name] = xp.empty(empty, k.dtype), xp.empty(empty, v.dtype)
        keys, values = self._held[name]
        stop = self.length + new
        keys[:, :, self.length : stop], values[:, :, self.length : stop] = k, v
        return keys[:, :, :stop], values[:, :, :stop]

    def advance(self, positions: int) -> None:
        """Counts positions that every layer has appended."""
        self.length += positions


class SelfAttention:
    """Shapes: (B, T, C) -> (B, T, C). tp cuts whole heads: qkv by dim 2, the projection by rows."""

    def __init__(
        self, name: str, heads: int, project: ResidualLinear, std: float, drop: Dropout, shares: int = order.MOST
    ) -> None:
        """`project` joins the heads' values to the residual stream; `drop` is for the probabilities; `shares`: at most,
        of a sum over heads or positions.
        """
        self.name, self.heads, self.project, self.drop = name, heads, project, drop
        width, self.most, self.width = project.inputs, shares, project.inputs // heads
        each = equal(1, 3), equal(2, heads, width // heads)
        self.qkv = Linear(
            f"{name}.qkv", width, (3, width), std, cut=2, unit=width // heads, shares=shares, matrices=each
        )

    def parameters(self) -> list[Parameter]:
        return [*self.qkv.parameters(), *self.project.parameters()]

    def _split(self, qkv: Any) -> tuple[Any, Any, Any]:
        parts = qkv.reshape(*qkv.shape[:2], 3, -1, self.width)  # heads of this rank
        parts = parts.transpose(2, 0, 3, 1, 4)  # (3, B, H, T, D), still views of qkv
        return parts[0], parts[1], parts[2]

    def forward(self, x: Any, ctx: Context, residual: Any = None) -> tuple[Any, Any]:
        """`residual` or None: what the result is added to."""
        qkv, _ = self.qkv.forward(x, ctx)  # (B, T, 3C)
        q, k, v = self._split(qkv)
        if ctx.cache is not None:
            k, v = ctx.cache.extend(self.name, k, v)
        draw = self.drop.of_heads(ctx, q.shape[1], k.shape[2])
        share = order.share_length(k.shape[2], self.most) if ctx.cache is None else 0
        starts = None if ctx.batch is None else ctx.batch.inputs.get("starts")  # of documents packed in a row
        o, lse = attention.forward(q, k, v, draw=draw, share=share, starts=starts)  # (B, T, H, D)
        y, s_project = self.project.join(o.reshape(*o.shape[:2], -1), residual, ctx)
        return y, (x, qkv, o, lse, draw, share, starts, s_project)

    def backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        x, qkv, o, lse, draw, share, starts, s_project = saved
        do = self.project.backward(dy, s_project, ctx).reshape(o.shape)
        q, k, v = self._split(qkv)
        dqkv = module_of(dy).empty_like(qkv)
        dq, dk, dv = self._split(dqkv)
        attention.backward(do, q, k, v, o, lse, dq, dk, dv, draw=draw, share=share, starts=starts)
        return self.qkv.backward(dqkv, x, ctx)
