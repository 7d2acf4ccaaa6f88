"""Multi-head self-attention with a fused query-key-value projection, and the key/value cache."""

from itertools import groupby
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
    """Who attends to each other: the positions of each row, or of each of some texts of one length that lie one behind
    the other in row 0, from `start` on; with what its backward needs."""

    start: int
    texts: int  # 0: rows
    length: int
    draw: Draw | None
    share: int
    lse: Any = None

    @property
    def stop(self) -> int:
        return self.start + self.texts * self.length

    def own(self, array: Any) -> Any:
        """Theirs of an array, a view. Shapes: (B, T, …), or (1, T, …) -> (texts, length, …)."""
        if not self.texts:
            return array
        return array[0, self.start : self.stop].reshape(self.texts, self.length, *array.shape[2:])


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
        """All of them."""
        spans = [] if ctx.batch is None else ctx.batch.spans()
        if not spans:
            share = order.share_length(keys, self.most) if ctx.cache is None else 0
            return [_Look(0, 0, keys, self.drop.of_heads(ctx, heads, keys), share)]
        lengths = [stop - start for start, stop in spans]
        longest, looks, number = max(lengths), [], 0
        draw, shape = self.drop.of_heads(ctx, heads, longest), (len(spans), heads, longest, longest)
        for length, some in groupby(lengths):
            own = None if draw is None else draw.cut(shape, (number, 0, 0, 0))
            count = len(list(some))
            looks.append(_Look(spans[number][0], count, length, own, order.share_length(length, self.most)))
            number += count
        return looks

    def forward(self, x: Any, ctx: Context, residual: Any = None) -> tuple[Any, Any]:
        """`residual` or None: what the result is added to."""
        qkv, _ = self.qkv.forward(x, ctx)  # (B, T, 3C)
        starts = None if ctx.batch is None else ctx.batch.inputs.get("starts")  # of documents packed in a row
        heads, past = qkv.shape[2] // (3 * self.width), 0 if ctx.cache is None else ctx.cache.length
        found, looks = [], []
        for look in self._looks(ctx, heads, past + qkv.shape[1]):
            q, k, v = self._split(look.own(qkv))
            if ctx.cache is not None:
                k, v = ctx.cache.extend(self.name, k, v)
            o, lse = attention.forward(q, k, v, self.causal, draw=look.draw, share=look.share, starts=starts)
            found.append(o)  # (B, T, H, D)
            looks.append(look._replace(lse=lse))
        o = _in_row(found, looks, qkv.shape[1]) if looks[0].texts else found[0]
        y, s_project = self.project.join(o.reshape(*o.shape[:2], -1), residual, ctx)
        return y, (x, qkv, o, looks, starts, s_project)

    def backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        x, qkv, o, looks, starts, s_project = saved
        do = self.project.backward(dy, s_project, ctx).reshape(o.shape)
        dqkv = module_of(dy).empty_like(qkv)
        for look in looks:
            attention.backward(
                look.own(do), *self._split(look.own(qkv)), look.own(o), look.lse, *self._split(look.own(dqkv)),
                self.causal, draw=look.draw, share=look.share, starts=starts,
            )  # fmt: skip
        if looks[-1].texts:
            dqkv[:, looks[-1].stop :] = 0.0  # nobody has looked at what fills the row up
        return self.qkv.backward(dqkv, x, ctx)

    def maps(self, x: Any, ctx: Context) -> Any:
        """Who attends to whom, in float64: rows look at columns. Shapes: (B, T, C) -> (B, H, T, T).

        Texts that lie one behind the other see nothing of each other, and nobody looks at what fills their row up.
        """
        qkv, _ = self.qkv.forward(x, ctx)
        spans = [] if ctx.batch is None else ctx.batch.spans()
        starts = None if ctx.batch is None else ctx.batch.inputs.get("starts")
        if not spans:
            return attention.probabilities(*self._split(qkv)[:2], self.causal, starts)
        batch, length, _ = qkv.shape
        found = module_of(x).zeros((batch, qkv.shape[2] // (3 * self.width), length, length))
        for start, stop in spans:
            own = self._split(qkv[:, start:stop])[:2]
            found[:, :, start:stop, start:stop] = attention.probabilities(*own, self.causal)
        return found


def _in_row(parts: list[Any], looks: list[_Look], length: int) -> Any:
    """Values of texts where they lie in their row, zeros behind them. Shapes: (texts, t, H, D) each -> (1, T, H, D)."""
    o = module_of(parts[0]).zeros((1, length, *parts[0].shape[2:]), parts[0].dtype)
    for part, look in zip(parts, looks, strict=True):
        look.own(o)[...] = part
    return o
