"""Scaled dot-product attention in row tiles: o = softmax(q kᵀ / √D) v, causal or full, of all keys or a row's first.

No (T, S) matrix is kept: backward recomputes a tile of probabilities from the saved log-sum-exp, and
tiles above the diagonal are never touched. Of bfloat16 arrays the arithmetic is float32.
Source: Dao et al., "FlashAttention", arXiv:2205.14135 (the recomputation), Rabe, Staats, arXiv:2112.05682.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import module_of, wide
from mlm_mpi.backend.registry import served
from mlm_mpi.ops import dropout

TILE = 128  # query rows at a time: a tile of scores of 6 heads and 256 columns is 786 KB


def _tiles(queries: int) -> Iterator[tuple[int, int]]:
    for start in range(0, queries, TILE):
        yield start, min(start + TILE, queries)


def _seen(length: int, causal: bool, end: int) -> int:
    # how many keys the queries before position `end` may see together
    return max(0, min(length, end)) if causal else length


def _scores(q: Any, k: Any, causal: bool, position: int, scale: float) -> tuple[Any, Any]:
    # (H, rows, D) from `position` on, (H, columns, D) -> scaled q and masked scores (H, rows, columns)
    xp = module_of(q)
    rows = q.shape[1]
    scaled = q * scale
    scores = scaled @ k.swapaxes(1, 2)
    if causal and rows > 1:
        hidden = xp.triu(xp.full((rows, rows), -xp.inf, q.dtype), 1)
        scores[:, :, position:] += hidden[:, : max(0, k.shape[1] - position)]
    return scaled, scores


def _factors(
    draw: dropout.Draw, shape: tuple[int, int, int, int], b: int, start: int, stop: int, dtype: Any, xp: Any = np
) -> Any:
    # the dropout mask (H, rows, S) of queries start … stop − 1, a slice of the global (B, H, T, S)
    _, heads, queries, keys = shape
    drawn = [
        dropout.mask(draw, (stop - start, keys), ((b * heads + h) * queries + start) * keys, dtype, xp)
        for h in range(heads)
    ]  # fmt: skip
    return xp.stack(drawn)


@served
def forward(
    q: Any, k: Any, v: Any, causal: bool = True, draw: dropout.Draw | None = None, lengths: Any = None
) -> tuple[Any, Any]:
    """Shapes: q (B, H, T, D), k and v (B, H, S, D) -> o (B, T, H, D) as q, lse (B, H, T) float32 or float64.

    Causal with S > T: the queries are the last T of S positions (a cache holds the others).
    `draw` names a dropout mask of the probabilities, (B, H, T, S).
    `lengths` (B,) int32: row b sees its first lengths[b] keys only; a query that sees none gives o = 0, lse = -inf.
    Cost: 4·B·H·T·S·D flops, half if causal.
    """
    xp, dtype = module_of(q), q.dtype
    q, k, v = map(wide, (q, k, v))
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    offset, scale = keys - queries, 1.0 / math.sqrt(width)
    o = xp.empty((batch, queries, heads, width), dtype)
    lse = xp.empty((batch, heads, queries), q.dtype)
    for b in range(batch):
        length = keys if lengths is None else min(keys, int(lengths[b]))
        for start, stop in _tiles(queries):
            columns = _seen(length, causal, offset + stop)
            if not columns:
                o[b, start:stop], lse[b, :, start:stop] = 0.0, -xp.inf
                continue
            _, p = _scores(q[b, :, start:stop], k[b, :, :columns], causal, offset + start, scale)
            top = p.max(axis=2, keepdims=True)
            p -= top
            xp.exp(p, out=p)
            total = p.sum(axis=2, keepdims=True)
            lse[b, :, start:stop] = (top + xp.log(total))[:, :, 0]
            if draw is not None:
                drop = _factors(draw, (batch, heads, queries, keys), b, start, stop, q.dtype, xp)
                p *= drop[:, :, :columns]
            part = p @ v[b, :, :columns]  # (H, rows, D)
            part /= total
            o[b, start:stop] = part.swapaxes(0, 1)
    return o, lse


@served
def backward(
    do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dq: Any, dk: Any, dv: Any,
    causal: bool = True, draw: dropout.Draw | None = None, lengths: Any = None,
) -> None:  # fmt: skip
    """Writes dq, dk, dv, which may be strided views. Shapes: do and o (B, T, H, D), the rest as `forward`.

    With P the probabilities and δ = Σ do·o per query: dv = Pᵀdo, dS = P (do vᵀ − δ), dq = dS k, dk = dSᵀq.
    Cost: 10·B·H·T·S·D flops, half if causal.
    """
    xp = module_of(q)
    do, q, k, v, o = map(wide, (do, q, k, v, o))
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    offset, scale = keys - queries, 1.0 / math.sqrt(width)
    for b in range(batch):
        length = keys if lengths is None else min(keys, int(lengths[b]))
        dkey, dvalue = xp.zeros((heads, keys, width), q.dtype), xp.zeros((heads, keys, width), q.dtype)
        for start, stop in _tiles(queries):
            columns = _seen(length, causal, offset + stop)
            if not columns:
                dq[b, :, start:stop] = 0.0
                continue
            scaled, p = _scores(q[b, :, start:stop], k[b, :, :columns], causal, offset + start, scale)
            p -= lse[b, :, start:stop, None]
            xp.exp(p, out=p)
            dot = do[b, start:stop].swapaxes(0, 1)  # (H, rows, D)
            ds = dot @ v[b, :, :columns].swapaxes(1, 2)  # (H, rows, columns)
            delta = xp.einsum("thd,thd->ht", do[b, start:stop], o[b, start:stop])
            kept = p
            if draw is not None:
                drop = _factors(draw, (batch, heads, queries, keys), b, start, stop, q.dtype, xp)
                drop = drop[:, :, :columns]
                kept = p * drop
                ds *= drop
            ds -= delta[:, :, None]
            ds *= p
            dq[b, :, start:stop] = (ds @ k[b, :, :columns]) * scale
            dvalue[:, :columns] += kept.swapaxes(1, 2) @ dot
            dkey[:, :columns] += ds.swapaxes(1, 2) @ scaled
        dk[b], dv[b] = dkey, dvalue
