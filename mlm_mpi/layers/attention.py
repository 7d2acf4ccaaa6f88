"""Multi-head self-attention with a fused query-key-value projection, and the key/value cache."""

from typing import Any, NamedTuple

from mlm_mpi import order
from mlm_mpi.backend.arrays import module_of
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.linear import Linear, ResidualLinear
from mlm_mpi.ops import attention
from mlm_mpi.ops.dropout import Draw
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


class _Look(NamedTuple):
    """What attends to each other: all rows, or the positions of one text; with what its backward needs."""

    at: slice
    draw: Draw | None
    share: int
    lse: Any = None


class SelfAttention:
    """Shapes: (B, T, C) -> (B, T, C). tp cuts whole heads: qkv by dim 2, the projection by rows.

    Of a batch of texts that lie one behind the other in a row (`Batch.texts`), each attends to itself alone.
    """

    def __init__(
        self, name: str, heads: int, project: ResidualLinear, std: float, drop: Dropout, shares: int = order.MOST,
        causal: bool = True,
    ) -> None:  # fmt: skip
        """`project` joins the heads' values to the residual stream; `drop` is for the probabilities; `shares`: at most,
        of a sum over heads or positions; `causal`: no position sees a later one.
        """
        self.name, self.heads, self.project, self.drop, self.causal = name, heads, project, drop, causal
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

    def _looks(self, ctx: Context, heads: int, keys: int) -> list[_Look]:
        """Who attends to whom."""
        spans = [] if ctx.batch is None else ctx.batch.spans()
        if not spans:
            share = order.share_length(keys, self.most) if ctx.cache is None else 0
            return [_Look(slice(None), self.drop.of_heads(ctx, heads, keys), share)]
        longest = max(stop - start for start, stop in spans)
        draw, shape = self.drop.of_heads(ctx, heads, longest), (len(spans), heads, longest, longest)
        return [
            _Look(
                slice(start, stop), None if draw is None else draw.cut(shape, (number, 0, 0, 0)),
                order.share_length(stop - start, self.most),
            )
            for number, (start, stop) in enumerate(spans)
        ]  # fmt: skip

    def forward(self, x: Any, ctx: Context, residual: Any = None) -> tuple[Any, Any]:
        """`residual` or None: what the result is added to."""
        qkv, _ = self.qkv.forward(x, ctx)  # (B, T, 3C)
        q, k, v = self._split(qkv)
        if ctx.cache is not None:
            k, v = ctx.cache.extend(self.name, k, v)
        starts = None if ctx.batch is None else ctx.batch.inputs.get("starts")  # of documents packed in a row
        found, looks = [], []
        for look in self._looks(ctx, q.shape[1], k.shape[2]):
            qs, ks, vs = (array[:, :, look.at] for array in (q, k, v))
            o, lse = attention.forward(qs, ks, vs, self.causal, draw=look.draw, share=look.share, starts=starts)
            found.append(o)  # (B, T, H, D)
            looks.append(look._replace(lse=lse))
        o = found[0] if looks[0].at == slice(None) else _in_row(found, looks, q.shape[2])
        y, s_project = self.project.join(o.reshape(*o.shape[:2], -1), residual, ctx)
        return y, (x, qkv, o, looks, starts, s_project)

    def backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        x, qkv, o, looks, starts, s_project = saved
        do = self.project.backward(dy, s_project, ctx).reshape(o.shape)
        dqkv = module_of(dy).empty_like(qkv)
        arrays = [*self._split(qkv), *self._split(dqkv)]
        for look in looks:
            q, k, v, dq, dk, dv = (array[:, :, look.at] for array in arrays)
            attention.backward(
                do[:, look.at], q, k, v, o[:, look.at], look.lse, dq, dk, dv, self.causal, draw=look.draw,
                share=look.share, starts=starts,
            )  # fmt: skip
        if looks[-1].at.stop is not None:
            dqkv[:, looks[-1].at.stop :] = 0.0  # nobody has looked at what fills the row up
        return self.qkv.backward(dqkv, x, ctx)


def _in_row(parts: list[Any], looks: list[_Look], length: int) -> Any:
    """Values of texts, where they lie in their row. Shapes: (1, t, H, D) each -> (1, T, H, D), zeros behind them."""
    o = module_of(parts[0]).zeros((1, length, *parts[0].shape[2:]), parts[0].dtype)
    for part, look in zip(parts, looks, strict=True):
        o[:, look.at] = part
    return o
