"""Scaled dot-product attention in row tiles: o = softmax(q kᵀ / √D) v, causal or full, of all keys or some of them.

No (T, S) matrix is kept: backward recomputes a tile of probabilities from the saved log-sum-exp, and tiles above the
diagonal, or before the first key that a query may see (a window, a document), are never touched. Of bfloat16 arrays the
arithmetic is float32. Queries may come in groups that share keys and values: query head h meets head h // g of these.

The order of additions follows positions, so that ranks which hold some of them can follow it. Shares end at the
multiples of `share` (0: everything is one share). The softmax over the keys of a share is computed by itself, and
these partial results are merged in ascending order. dq is a sum for every share of keys, dk and dv are sums for every
share of queries, each begun anew and added in ascending order; within such a pair of shares, dk and dv are one chain
over the g heads of a group in ascending order, and over a head's queries within it. What sees nothing contributes
nothing. Tiles lie where positions put them, whatever is hidden: hidden keys of a tile weigh 0, and what is left out are
whole tiles, so the bits of what is visible do not depend on how much else is hidden in which way.

A rank of a ring has the queries of some shares and meets the keys of one share after the other: it calls `partial` for
each, `merge` in ascending order and `finish`; in `backward` of a pair of shares it gets that pair's part of dq, dk, dv,
and adds parts in ascending order. Partial values are not yet divided by their sum: this is what `forward` itself keeps
between shares, so the bits are its own; divided ones with a log-sum-exp would cost `forward` a division and a logarithm
for every query and share, and would round twice more.
Source: Dao et al., "FlashAttention", arXiv:2205.14135 (the recomputation), Rabe, Staats, arXiv:2112.05682 (partial
results), Liu et al., "Ring Attention", arXiv:2310.01889, Ainslie et al., arXiv:2305.13245 (grouped queries).
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import module_of, wide
from mlm_mpi.backend.registry import served
from mlm_mpi.ops import dropout

TILE = 128  # query rows at a time: a tile of scores of 6 heads and 256 columns is 786 KB

Positions = tuple[int, int] | None  # of the first query and of the first key


def _spans(count: int, position: int, share: int, most: int = 0) -> Iterator[tuple[int, int]]:
    # (start, stop) of rows whose first has that position, cut where shares end, and so that none has more than `most`
    start = 0
    while start < count:
        stop = min(count, start + most) if most else count
        if share:
            stop = min(stop, (position + start) // share * share + share - position)
        yield start, stop
        start = stop


def _seen(length: int, causal: bool, end: int) -> int:
    # how many keys the queries before position `end` may see together
    return max(0, min(length, end)) if causal else length


def _grouped(q: Any, k: Any) -> Any:
    # (B, H, T, D) or (B, G, g, T, D) -> a view (B, G, g, T, D), for G heads of keys
    return q if q.ndim == 5 else q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])


def _first_keys(starts: Any, batch: int, queries: int, key: int) -> Any:
    # (B, T): which of the keys is the first that a query sees
    if starts.shape not in ((batch, queries), (1, queries)) or (starts[:, 1:] < starts[:, :-1]).any():
        raise ValueError(f"starts of shape {starts.shape} for {batch} rows of {queries} queries, or they descend")
    return module_of(starts).broadcast_to(starts, (batch, queries)) - key


def _sight(rows: tuple[int, int], keys: tuple[int, int], causal: bool, offset: int, first: Any, xp: Any) -> Any:
    # of queries and keys start … stop − 1: slices of those that see and are seen, and which of the latter are hidden,
    # (rows, columns) or None; `offset`: where query 0 stands; `first` (T,) or None: the first key a query sees
    (start, stop), (low, high) = rows, keys
    if causal:
        start = max(start, low - offset)
    if first is not None:
        stop = start + int((first[start:stop] < high).sum())
        low = max(low, int(first[start])) if start < stop else high
    hidden, column, row = None, xp.arange(low, high), xp.arange(start, stop)[:, None]
    if causal and offset + start + 1 < high:
        hidden = column > row + offset
    if first is not None:
        before = column < first[start:stop, None]
        hidden = before if hidden is None else hidden | before
    return slice(start, stop), slice(low, high), hidden


def _scores(q: Any, k: Any, hidden: Any, scale: float) -> tuple[Any, Any]:
    # (G, rows, D), (G, columns, D) -> scaled q and masked scores (G, rows, columns)
    xp, scaled = module_of(q), q * scale
    scores = scaled @ k.swapaxes(1, 2)
    if hidden is not None:
        scores += xp.where(hidden, -xp.inf, 0.0).astype(q.dtype)
    return scaled, scores


def _lower(scores: Any, level: Any, hidden: Any) -> None:
    # scores −= level (G, rows, 1); of a query that sees nothing they stay −∞
    if hidden is not None:
        xp = module_of(scores)
        level = xp.where(hidden.all(axis=1)[:, None], 0, level)
    scores -= level


def _factors(
    draw: dropout.Draw, shape: tuple[int, int, int, int], b: int, start: int, stop: int, dtype: Any, xp: Any = np
) -> Any:
    # the dropout mask (H, rows, S) of queries start … stop − 1, of a local array (B, H, T, S)
    _, heads, _, keys = shape
    return dropout.mask(draw.cut(shape, (b, 0, start, 0)), (1, heads, stop - start, keys), 0, dtype, xp)[0]


def _offset(q: Any, k: Any, positions: Positions) -> tuple[int, int, int]:
    # positions of the first query and key, and where the first query stands, counted from the first key
    query, key = (k.shape[2] - q.shape[-2], 0) if positions is None else positions
    return query, key, query - key


def _merge(mine: list[Any], other: list[Any], xp: Any) -> None:
    # [maximum, sum, values] of some queries, the former two with a last dim of 1; what saw no key has (−inf, 0, 0)
    above = xp.maximum(mine[0], other[0])
    level = xp.where(above == -xp.inf, 0, above)
    first, second = xp.exp(mine[0] - level), xp.exp(other[0] - level)
    mine[0][...] = above
    for i in (1, 2):
        mine[i] *= first
        mine[i] += other[i] * second


def _partial(
    q: Any, k: Any, v: Any, causal: bool, draw: dropout.Draw | None, lengths: Any, share: int, positions: Positions,
    starts: Any,
) -> tuple[Any, Any]:  # fmt: skip
    xp = module_of(q)
    q, k, v = map(wide, (_grouped(q, k), k, v))
    (batch, groups, each, queries, width), keys = q.shape, k.shape[2]
    (query, key, offset), scale = _offset(q, k, positions), 1.0 / math.sqrt(width)
    o = xp.zeros((batch, queries, groups, each, width), q.dtype)
    statistics = xp.zeros((2, batch, groups, each, queries), q.dtype)
    statistics[0] = -xp.inf
    firsts = [None] * batch if starts is None else _first_keys(starts, batch, queries, key)
    for b in range(batch):
        length = keys if lengths is None else min(keys, int(lengths[b]))
        for start, stop in _spans(queries, query, share, TILE):
            seen = _seen(length, causal, offset + stop)
            if seen and draw is not None:
                drop = _factors(draw, (batch, groups * each, queries, keys), b, start, stop, q.dtype, xp)
                drop = drop.reshape(groups, each, stop - start, keys)
            for low, high in _spans(seen, key, share):
                rows, columns, hidden = _sight((start, stop), (low, high), causal, offset, firsts[b], xp)
                for i in range(each if rows.start < rows.stop else 0):
                    scores = _scores(q[b, :, i, rows], k[b, :, columns], hidden, scale)[1]
                    level = scores.max(axis=2, keepdims=True)
                    _lower(scores, level, hidden)
                    p = xp.exp(scores, out=scores)
                    total = p.sum(axis=2, keepdims=True)
                    if draw is not None:
                        p *= drop[:, i, rows.start - start : rows.stop - start, columns]
                    other = [level, total, p @ v[b, :, columns]]  # (G, rows, 1), (G, rows, 1), (G, rows, D)
                    mine = [*statistics[:, b, :, i, rows, None], o[b, rows, :, i].swapaxes(0, 1)]
                    if low:
                        _merge(mine, other, xp)
                    else:
                        for to, value in zip(mine, other, strict=True):
                            to[...] = value
    return o.reshape(batch, queries, -1, width), statistics.reshape(2, batch, -1, queries)


def _finish(o: Any, statistics: Any) -> tuple[Any, Any]:
    xp, (top, total) = module_of(o), statistics
    total = xp.where(total == 0, 1, total)  # what saw no key: o = 0, lse = -inf
    o /= total.swapaxes(1, 2)[..., None]
    return o, top + xp.log(total)


@served
def forward(
    q: Any, k: Any, v: Any, causal: bool = True, draw: dropout.Draw | None = None, lengths: Any = None,
    share: int = 0, positions: Positions = None, starts: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Shapes: q (B, H, T, D) or (B, G, g, T, D) with H = G·g, k and v (B, G, S, D) -> o (B, T, H, D) as q,
    lse (B, H, T) float32 or float64.

    `positions` of the first query and the first key: causal is what has a position not above one's own. None: the
    queries are the last T of S positions (a cache holds the others). `share`: positions in a share, 0 for one share.
    `draw` names a dropout mask of the probabilities, (B, H, T, S).
    `lengths` (B,) int32: row b sees its first lengths[b] keys only; a query that sees none gives o = 0, lse = -inf.
    `starts` (B, T) or (1, T) int32, never descending along T: the position of the first key that a query sees.
    Raises ValueError where they descend; on a GPU the caller sees to it.
    Cost: 4·B·H·T·S·D flops, half if causal.
    """
    o, lse = _finish(*_partial(q, k, v, causal, draw, lengths, share, positions, starts))
    return o.astype(q.dtype, copy=False), lse


@served
def partial(
    q: Any, k: Any, v: Any, causal: bool = True, draw: dropout.Draw | None = None, lengths: Any = None,
    share: int = 0, positions: Positions = None, starts: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """What `forward` has before `finish`. Shapes: as `forward` -> o (B, T, H, D), statistics (2, B, H, T).

    Statistics are the maxima of the scores and the sums of the weights. Both are float32 or float64.
    """
    return _partial(q, k, v, causal, draw, lengths, share, positions, starts)


@served
def merge(o: Any, statistics: Any, other_o: Any, other_statistics: Any) -> None:
    """o, statistics = they and others, whose keys come behind theirs. Shapes: as `partial` returns.

    With m the greater maximum: sum = sum·exp(max − m) + other·exp(other max − m), and so o.
    """
    mine, other = (
        [*s[..., None], x.swapaxes(1, 2)] for s, x in ((statistics, o), (other_statistics, other_o))
    )  # fmt: skip
    _merge(mine, other, module_of(o))


@served
def finish(o: Any, statistics: Any) -> tuple[Any, Any]:
    """(o, lse) of all keys: o divided by the sums, in place. Shapes: as `partial` returns -> as `forward`."""
    return _finish(o, statistics)


@served
def backward(
    do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dq: Any, dk: Any, dv: Any,
    causal: bool = True, draw: dropout.Draw | None = None, lengths: Any = None,
    share: int = 0, positions: Positions = None, starts: Any = None,
) -> None:  # fmt: skip
    """Writes dq, dk, dv, which may be strided views. Shapes: do and o (B, T, H, D), the rest as `forward`.

    o and lse are those of all keys, also where k and v are some of them.
    With P the probabilities and δ = Σ do·o per query: dv = Pᵀdo, dS = P (do vᵀ − δ), dq = dS k, dk = dSᵀq.
    Cost: 10·B·H·T·S·D flops, half if causal.
    """
    xp = module_of(q)
    do, q, k, v, o = map(wide, (do, _grouped(q, k), k, v, o))
    (batch, groups, each, queries, width), keys = q.shape, k.shape[2]
    do, o = (x.reshape(batch, queries, groups, each, width) for x in (do, o))
    lse, dqueries = lse.reshape(batch, groups, each, queries), _grouped(dq, k)
    (query, key, offset), scale = _offset(q, k, positions), 1.0 / math.sqrt(width)
    firsts = [None] * batch if starts is None else _first_keys(starts, batch, queries, key)
    for b in range(batch):
        length = keys if lengths is None else min(keys, int(lengths[b]))
        dquery = xp.zeros((groups, each, queries, width), q.dtype)
        dkey, dvalue = xp.zeros((groups, keys, width), q.dtype), xp.zeros((groups, keys, width), q.dtype)
        begun = 0  # keys whose gradients have begun
        for first, last in _spans(queries, query, share):
            seen = _seen(length, causal, offset + last)
            part_k, part_v = xp.zeros_like(dkey), xp.zeros_like(dvalue)
            tiles = [(first + i, first + j) for i, j in _spans(last - first, 0, 0, TILE)]
            for i, (start, stop) in product(range(each), tiles):
                dot = do[b, start:stop, :, i].swapaxes(0, 1)  # (G, rows, D)
                delta = xp.einsum("tgd,tgd->gt", do[b, start:stop, :, i], o[b, start:stop, :, i])
                visible = _seen(length, causal, offset + stop)
                if visible and draw is not None:
                    drop = _factors(draw, (batch, groups * each, queries, keys), b, start, stop, q.dtype, xp)
                    drop = drop.reshape(groups, each, stop - start, keys)[:, i]
                for low, high in _spans(visible, key, share):
                    rows, columns, hidden = _sight((start, stop), (low, high), causal, offset, firsts[b], xp)
                    if rows.start >= rows.stop:
                        continue
                    own = slice(rows.start - start, rows.stop - start)
                    scaled, p = _scores(q[b, :, i, rows], k[b, :, columns], hidden, scale)
                    _lower(p, lse[b, :, i, rows, None], hidden)
                    xp.exp(p, out=p)
                    ds = dot[:, own] @ v[b, :, columns].swapaxes(1, 2)  # (G, rows, columns)
                    kept = p
                    if draw is not None:
                        kept = p * drop[:, own, columns]
                        ds *= drop[:, own, columns]
                    ds -= delta[:, own, None]
                    ds *= p
                    part = (ds @ k[b, :, columns]) * scale
                    dquery[:, i, rows] = dquery[:, i, rows] + part if low else part
                    part_v[:, columns] += kept.swapaxes(1, 2) @ dot[:, own]
                    part_k[:, columns] += ds.swapaxes(1, 2) @ scaled
            dkey[:, :begun] += part_k[:, :begun]
            dvalue[:, :begun] += part_v[:, :begun]
            dkey[:, begun:seen], dvalue[:, begun:seen] = part_k[:, begun:seen], part_v[:, begun:seen]
            begun = max(begun, seen)
        dqueries[b], dk[b], dv[b] = dquery, dkey, dvalue


def probabilities(q: Any, k: Any, causal: bool = True, starts: Any = None) -> Any:
    """softmax(q kᵀ / √D) in float64, the whole matrix that `forward` spares itself: for who wants to look at it.

    Shapes: q (B, H, T, D) or (B, G, g, T, D), k (B, G, S, D), starts (B, T) or (1, T) as `forward` -> (B, H, T, S).
    """
    xp = module_of(q)
    q, k = (wide(x).astype("f8") for x in (_grouped(q, k), k))
    (batch, _, _, length, width), column = q.shape, xp.arange(k.shape[2])
    scores = q @ k[:, :, None].swapaxes(3, 4) / math.sqrt(width)  # (B, G, g, T, S)
    if causal:
        scores = xp.where(column > xp.arange(length)[:, None], -xp.inf, scores)
    if starts is not None:
        scores = xp.where((column < starts[:, :, None])[:, None, None], -xp.inf, scores)
    p = xp.exp(scores - scores.max(axis=4, keepdims=True))
    return (p / p.sum(axis=4, keepdims=True)).reshape(batch, -1, length, k.shape[2])
