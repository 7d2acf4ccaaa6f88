"""Multi-head attention, of positions to each other and to a memory, and the cache of keys and values."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

import numpy as np

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

    `states`: what recurrent layers keep instead, arrays (B, C) of the last position by the layer's name. `memory`: keys
    and values (2, H, N, D) of what an encoder has made, by the layer's name, of all sources one behind the other; they
    are computed once. `sources`: their lengths. `readers`: so many rows of the batch read each.
    """

    def __init__(self, context: int) -> None:
        self.context, self.length = context, 0
        self.states: dict[str, tuple[Any, ...]] = {}
        self.memory: dict[str, Any] = {}
        self.sources: tuple[int, ...] = ()
        self.readers: tuple[int, ...] = ()
        self._held: dict[str, tuple[Any, Any]] = {}

    def extend(self, name: str, k: Any, v: Any) -> tuple[Any, Any]:
        """Appends k, v (B, H, T, D) and returns all keys and values so far (B, H, length + T, D)."""
        stop = self.length + k.shape[2]
        keys, values = held = self._roomy(name, k, v, stop)
        for array, new in zip(held, (k, v), strict=True):
            array[:, :, self.length : stop] = new
        return keys[:, :, :stop], values[:, :, :stop]

    def _roomy(self, name: str, k: Any, v: Any, positions: int) -> tuple[Any, Any]:
        """The layer's arrays, with room for so many positions."""
        held = self._held.get(name)
        if held is None or held[0].shape[2] < positions:
            batch, heads, _, width = k.shape
            shape = (batch, heads, max(self.context, positions), width)
            roomy = module_of(k).empty(shape, k.dtype), module_of(v).empty(shape, v.dtype)
            for array, old in zip(roomy, held or (), strict=False):
                array[:, :, : self.length] = old[:, :, : self.length]
            held = self._held[name] = roomy
        return held

    def advance(self, positions: int) -> None:
        """Counts positions that every layer has appended."""
        self.length += positions

    def remember(self, name: str, memory: Any, lengths: Iterable[int]) -> None:
        """Keeps a layer's keys and values (2, H, N, D) of sources of these lengths, each of which a row of the batch
        reads."""
        self.memory[name] = memory
        self.sources = tuple(lengths)
        self.readers = (1,) * len(self.sources)

    def take(self, rows: np.ndarray) -> None:
        """Goes on with these rows of the batch, each as often as it is named; no memory is copied for that.

        Shapes: (n,) int64, on the host; where there is a memory, rows of a source side by side, sources in their order.
        """
        if self.memory:
            self._let_go(rows)
        roomy = slice(self.length + 1)  # for one position more than is valid: then a single copy will do
        self._held = {
            name: (_rows(k[:, :, roomy], rows), _rows(v[:, :, roomy], rows)) for name, (k, v) in self._held.items()
        }
        self.states = {name: tuple(_rows(x, rows) for x in arrays) for name, arrays in self.states.items()}

    def _let_go(self, rows: np.ndarray) -> None:
        """Counts who reads a source from now on, and forgets those that nobody reads."""
        taken = np.repeat(np.arange(len(self.sources)), self.readers)[rows]
        assert (taken[1:] >= taken[:-1]).all(), "rows of a source lie side by side, sources in their order"
        readers = np.bincount(taken, minlength=len(self.sources)).tolist()
        if not all(readers):
            kept = np.repeat(np.array(readers) > 0, self.sources).nonzero()[0]
            for name, kv in self.memory.items():
                self.memory[name] = module_of(kv).take(kv, module_of(kv).asarray(kept), axis=2)
        self.sources = tuple(size for size, count in zip(self.sources, readers, strict=True) if count)
        self.readers = tuple(count for count in readers if count)


def _rows(array: Any, rows: np.ndarray) -> Any:
    return array[module_of(array).asarray(rows)]


class _Run(NamedTuple):
    """The positions of each row, or of each of some texts of one length that lie one behind the other, from `start` on,
    as all rows do."""

    start: int
    texts: int  # 0: rows
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.texts * self.length

    def own(self, array: Any) -> Any:
        """Theirs of an array, a view. Shapes: (B, T, …) -> the same, or (texts, length, …)."""
        if not self.texts:
            return array
        some = array.reshape(-1, *array.shape[2:])[self.start : self.stop]
        return some.reshape(self.texts, self.length, *array.shape[2:])


class _Look(NamedTuple):
    """Whose queries attend to whose keys, with what its backward needs."""

    queries: _Run
    keys: _Run
    draw: Draw | None
    share: int
    lse: Any = None


def _spans(lengths: Iterable[int]) -> list[tuple[int, int]]:
    """[start, stop) of texts of these lengths, one behind the other."""
    return list(pairwise(accumulate(lengths, initial=0)))


def _looks(
    queries: Sequence[tuple[int, int]], keys: Sequence[tuple[int, int]], drop: Dropout, ctx: Context, heads: int
) -> list[_Look]:  # fmt: skip
    """Those of texts [start, stop), each to the keys in its place. Neighbours of equal lengths attend together.

    Probabilities are drawn as of texts that are all as long as the longest one.
    """
    lengths = [(b - a, d - c) for (a, b), (c, d) in zip(queries, keys, strict=True)]
    most = max(length for length, _ in lengths), max(other for _, other in lengths)
    draw, looks, number = drop.of_heads(ctx, heads, *most), [], 0
    for (length, other), some in groupby(lengths):
        own = None if draw is None else draw.cut((len(lengths), heads, *most), (number, 0, 0, 0))
        count = len(list(some))
        runs = _Run(queries[number][0], count, length), _Run(keys[number][0], count, other)
        looks.append(_Look(*runs, own, 0))
        number += count
    return looks


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
        if spans:
            looks = _looks(spans, spans, self.drop, ctx, heads)
        else:
            row = _Run(0, 0, keys)
            looks = [_Look(row, row, self.drop.of_heads(ctx, heads, keys, keys), 0)]
        if ctx.cache is not None:
            return looks
        return [look._replace(share=order.share_length(look.keys.length, self.most)) for look in looks]

    def forward(self, x: Any, ctx: Context, residual: Any = None) -> tuple[Any, Any]:
        """`residual` or None: what the result is added to."""
        qkv, _ = self.qkv.forward(x, ctx)  # (B, T, 3C)
        starts = None if ctx.batch is None else ctx.batch.inputs.get("starts")  # of documents packed in a row
        cache = ctx.cache if self.causal else None  # what sees all of its text at once keeps nothing
        heads, past = qkv.shape[2] // (3 * self.width), 0 if cache is None else cache.length
        found, looks = [], []
        for look in self._looks(ctx, heads, past + qkv.shape[1]):
            q, k, v = self._split(look.queries.own(qkv))
            if cache is not None:
                k, v = cache.extend(self.name, k, v)
            o, lse = attention.forward(q, k, v, self.causal, draw=look.draw, share=look.share, starts=starts)
            found.append(o)  # (B, T, H, D)
            looks.append(look._replace(lse=lse))
        o = _in_row(found, looks, qkv.shape[:2])
        y, s_project = self.project.join(o.reshape(*o.shape[:2], -1), residual, ctx)
        return y, (x, qkv, o, looks, starts, s_project)

    def backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        x, qkv, o, looks, starts, s_project = saved
        do = self.project.backward(dy, s_project, ctx).reshape(o.shape)
        dqkv = module_of(dy).empty_like(qkv)
        for look in looks:
            run = look.queries
            attention.backward(
                run.own(do), *self._split(run.own(qkv)), run.own(o), look.lse, *self._split(run.own(dqkv)),
                self.causal, draw=look.draw, share=look.share, starts=starts,
            )  # fmt: skip
        _clear_behind(dqkv, looks[-1].queries)
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


class CrossAttention:
    """Positions that attend to all of a memory. Shapes: x (B, T, C), memory (B, S, C) -> (B, T, C).

    tp cuts whole heads: queries by dim 1, keys and values by dim 2, the projection by rows. Texts that lie one behind
    the other in a row each attend to the one in their place of the batch's source. A rank has whole heads and all
    positions here, so no sum over positions has shares. Source: Vaswani et al., arXiv:1706.03762, section 3.2.3.
    """

    def __init__(
        self, name: str, heads: int, project: ResidualLinear, std: float, drop: Dropout, shares: int = order.MOST
    ) -> None:
        """As of `SelfAttention`."""
        self.name, self.heads, self.project, self.drop = name, heads, project, drop
        width, self.width = project.inputs, project.inputs // heads
        self.query = self._by_head("query", std, shares)
        self.of_memory = self._of_memory(width, std, shares)

    def _by_head(self, what: str, std: float, shares: int, bias: bool = True) -> Linear:
        width, each = self.project.inputs, equal(1, self.heads, self.width)
        return Linear(f"{self.name}.{what}", width, width, std, 1, self.width, shares, bias, matrices=(each,))

    def _of_memory(self, width: int, std: float, shares: int) -> Linear:
        """What reads the memory: keys and values."""
        each = equal(1, 2), equal(2, self.heads, self.width)
        return Linear(f"{self.name}.key_value", width, (2, width), std, 2, self.width, shares, matrices=each)

    def parameters(self) -> list[Parameter]:
        return [*self.query.parameters(), *self.of_memory.parameters(), *self.project.parameters()]

    def forward(self, x: Any, memory: Any, ctx: Context, residual: Any = None) -> tuple[Any, Any]:
        """`residual` or None: what the result is added to. `memory`: None where the cache has seen it."""
        q, kv = self.query.forward(x, ctx)[0], self._remembered(memory, ctx)
        found, looks = [], []
        for look in self._looks(ctx, q, kv):
            arrays = self._split(look.queries.own(q), look.keys.own(kv))
            o, lse = attention.forward(*arrays, causal=False, draw=look.draw)
            found.append(o)  # (B, T, H, D)
            looks.append(look._replace(lse=lse))
        o = _in_row(found, looks, q.shape[:2])
        y, s_project = self.project.join(o.reshape(*o.shape[:2], -1), residual, ctx)
        return y, (x, memory, q, kv, o, looks, s_project)

    def backward(self, dy: Any, saved: Any, ctx: Context) -> tuple[Any, Any]:
        """(gradient of x, gradient of the memory)."""
        x, memory, q, kv, o, looks, s_project = saved
        do = self.project.backward(dy, s_project, ctx).reshape(o.shape)
        dq, dkv = module_of(dy).empty_like(q), module_of(dy).empty_like(kv)
        for look in looks:
            rows, keys = look.queries, look.keys
            attention.backward(
                rows.own(do), *self._split(rows.own(q), keys.own(kv)), rows.own(o), look.lse,
                *self._split(rows.own(dq), keys.own(dkv)), causal=False, draw=look.draw,
            )  # fmt: skip
        _clear_behind(dq, looks[-1].queries)
        _clear_behind(dkv, looks[-1].keys)
        return self.query.backward(dq, x, ctx), self._memory_backward(dkv, memory, ctx)

    def _memory_backward(self, dkv: Any, memory: Any, ctx: Context) -> Any:
        return self.of_memory.backward(dkv, memory, ctx)

    def maps(self, x: Any, memory: Any, ctx: Context) -> Any:
        """Who attends to whom, in float64, of rows of one text: (B, T, C), (B, S, C) -> (B, H, T, S)."""
        q, kv = self.query.forward(x, ctx)[0], self._keys_and_values(memory, ctx)
        return attention.probabilities(*self._split(q, kv)[:2], causal=False)

    def _remembered(self, memory: Any, ctx: Context) -> Any:
        """Keys and values (B, S, 2 C), or a cache's (1, N, 2, H, D), of all positions and this rank's heads."""
        if ctx.cache is None:
            return self._keys_and_values(memory, ctx)
        if self.name not in ctx.cache.memory:
            source, kv = None if ctx.batch is None else ctx.batch.source, self._keys_and_values(memory, ctx)
            lengths = [stop - start for start, stop in source.spans()] if source is not None else []
            rows, length, _ = kv.shape
            by_head = kv.reshape(rows * length, 2, -1, self.width).transpose(1, 2, 0, 3)  # each token reads it so
            ctx.cache.remember(self.name, module_of(kv).ascontiguousarray(by_head), lengths or [length] * rows)
        return ctx.cache.memory[self.name].transpose(2, 0, 1, 3)[None]

    def _keys_and_values(self, memory: Any, ctx: Context) -> Any:
        return self.of_memory.forward(memory, ctx)[0]

    def _split(self, q: Any, kv: Any) -> tuple[Any, Any, Any]:
        """Queries, keys and values by head, (B, H, T, D) and twice (B, H, S, D), views."""
        q = q.reshape(*q.shape[:2], -1, self.width).swapaxes(1, 2)
        k, v = kv.reshape(*kv.shape[:2], 2, -1, self.width).transpose(2, 0, 3, 1, 4)
        return q, k, v

    def _looks(self, ctx: Context, q: Any, kv: Any) -> list[_Look]:
        batch, heads = ctx.batch, q.shape[2] // self.width
        if ctx.cache is not None:  # rows that read one memory are as many queries of it
            queries = _spans(count * q.shape[1] for count in ctx.cache.readers)
            return _looks(queries, _spans(ctx.cache.sources), self.drop, ctx, heads)
        if batch is None or batch.source is None or not batch.texts:
            queries, keys = q.shape[1], kv.shape[1]
            return [_Look(_Run(0, 0, queries), _Run(0, 0, keys), self.drop.of_heads(ctx, heads, queries, keys), 0)]
        return _looks(batch.spans(), batch.source.spans(), self.drop, ctx, heads)


class LexicalAttention(CrossAttention):
    """Attention to a memory that hands on the vectors of the source's own tokens, which no matrix has mixed.

    Its memory is two arrays, what an encoder has made, which gives the keys, and the vectors, which are the values.
    Shapes: x (B, T, C), memory twice (B, S, C) -> (B, T, C). Source: Nguyen and Chiang, arXiv:1710.01329, section 4,
    with several heads.
    """

    def _of_memory(self, width: int, std: float, shares: int) -> Linear:
        return self._by_head("key", std, shares, bias=False)  # one of keys moves no softmax

    def _keys_and_values(self, memory: Any, ctx: Context) -> Any:
        encoded, vectors = memory
        keys, mine = self.of_memory.forward(encoded, ctx)[0], self._columns(ctx)
        return module_of(keys).concatenate([keys, ctx.entered(vectors, "the source's tokens")[:, :, mine]], axis=2)

    def _memory_backward(self, dkv: Any, memory: Any, ctx: Context) -> Any:
        xp, mine, (batch, length, both) = module_of(dkv), self._columns(ctx), dkv.shape
        dkeys, dmine = (xp.ascontiguousarray(dkv[:, :, part]) for part in (slice(both // 2), slice(both // 2, both)))
        if ctx.tp.size > 1:  # the others have −0 there, which changes nothing that is added to it
            whole = xp.full((batch, length, self.project.inputs), -0.0, dkv.dtype)
            whole[:, :, mine] = dmine
            dmine = ctx.left(whole, "the gradient of the source's tokens")
        return self.of_memory.backward(dkeys, memory[0], ctx), dmine

    def _columns(self, ctx: Context) -> slice:
        """Those of this rank's heads."""
        box = self.query.weight.layout.box(ctx.mesh)
        return slice(box.starts[1], box.stops[1])


def _in_row(parts: list[Any], looks: list[_Look], shape: tuple[int, int]) -> Any:
    """Values where their queries lie: of rows as they are, of texts in their row, zeros behind them.

    Shapes: `shape` (B, T); (texts, t, H, D) each -> (B, T, H, D).
    """
    if not looks[0].queries.texts:
        return parts[0]
    o = module_of(parts[0]).zeros((*shape, *parts[0].shape[2:]), parts[0].dtype)
    for part, look in zip(parts, looks, strict=True):
        look.queries.own(o)[...] = part
    return o


def _clear_behind(gradient: Any, last: _Run) -> None:
    """Nobody has looked at what fills the row up behind its texts."""
    if last.texts:
        gradient[:, last.stop :] = 0.0
