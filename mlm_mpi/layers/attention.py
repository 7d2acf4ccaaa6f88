"""Causal multi-head self-attention with a fused query-key-value projection, and the key/value cache."""

from typing import Any

from mlm_mpi import order
from mlm_mpi.backend.arrays import module_of
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.linear import ResidualLinear
from mlm_mpi.ops import attention, linear
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import Parameter


class KeyValueCache:
    """Keys and values of the positions seen so far, per layer; `length` positions are valid."""

    def __init__(self, context: int) -> None:
        self.context, self.length = context, 0
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
    """Shapes: (B, T, C) -> (B, T, C). Heads will be cut along tp: qkv by dim 2, the projection by rows."""

    def __init__(
        self, name: str, heads: int, project: ResidualLinear, std: float, drop: Dropout, shares: int = order.MOST
    ) -> None:
        """`project` joins the heads' values to the residual stream; `drop` is for the probabilities; `shares`: at most,
        of a sum over heads or positions.
        """
        self.name, self.heads, self.project, self.drop = name, heads, project, drop
        width, unit = project.inputs, project.inputs // heads
        self.most, self.shares = shares, order.shares(heads, shares)
        layout = Layout((width, 3, width), (None, None, "tp"), (1, 1, unit), self.shares)
        self.qkv_weight = Parameter(f"{name}.qkv.weight", layout, std, decay=True, matrices=(1, (1, 1, 1)))
        self.qkv_bias = Parameter(f"{name}.qkv.bias", Layout((3, width), (None, "tp"), (1, unit), self.shares), "zeros")

    def parameters(self) -> list[Parameter]:
        return [self.qkv_weight, self.qkv_bias, *self.project.parameters()]

    def _split(self, qkv: Any, batch: int) -> tuple[Any, Any, Any]:
        parts = qkv.reshape(batch, -1, 3, self.heads, qkv.shape[1] // (3 * self.heads))
        parts = parts.transpose(2, 0, 3, 1, 4)  # (3, B, H, T, D), still views of qkv
        return parts[0], parts[1], parts[2]

    def forward(self, x: Any, ctx: Context, residual: Any = None) -> tuple[Any, Any]:
        """`residual` or None: what the result is added to."""
        batch, length, width = x.shape
        flat = x.reshape(-1, width)
        qkv = linear.forward(flat, self.qkv_weight.data.reshape(width, -1), self.qkv_bias.data.reshape(-1))  # (N, 3C)
        q, k, v = self._split(qkv, batch)
        if ctx.cache is not None:
            k, v = ctx.cache.extend(self.name, k, v)
        draw = self.drop.draw(ctx)
        share = order.share_length(k.shape[2], self.most) if ctx.cache is None else 0
        o, lse = attention.forward(q, k, v, draw=draw, share=share)  # (B, T, H, D)
        y, s_project = self.project.join(o.reshape(batch, length, -1), residual, ctx)
        return y, (flat, qkv, o, lse, draw, share, s_project)

    def backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        flat, qkv, o, lse, draw, share, s_project = saved
        batch, _, width = dy.shape
        do = self.project.backward(dy, s_project, ctx).reshape(o.shape)
        q, k, v = self._split(qkv, batch)
        dqkv = module_of(dy).empty_like(qkv)
        dq, dk, dv = self._split(dqkv, batch)
        attention.backward(do, q, k, v, o, lse, dq, dk, dv, draw=draw, share=share)
        weight, dweight = self.qkv_weight.data.reshape(width, -1), ctx.grad(self.qkv_weight).reshape(width, -1)
        dbias, pieces = ctx.grad(self.qkv_bias).reshape(-1), ctx.pieces(dy)
        linear.backward_weight(dqkv, flat, dweight, dbias, ctx.accumulate, pieces)
        return linear.backward_input(dqkv, weight, shares=self.shares, segments=3).reshape(dy.shape)
