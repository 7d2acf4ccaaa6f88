"""Scaled dot-product attention in row tiles: o = softmax(q kᵀ / √D) v, causal or full.

No (T, S) matrix is kept: backward recomputes a tile of probabilities from the saved log-sum-exp, and
tiles above the diagonal are never touched.
Source: Dao et al., "FlashAttention", arXiv:2205.14135 (the recomputation), Rabe, Staats, arXiv:2112.05682.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import module_of
from mlm_mpi.backend.kernels import served
from mlm_mpi.ops import dropout

TILE = 128  # query rows at a time: a tile of scores of 6 heads and 256 columns is 786 KB


def _tiles(queries: int) -> Iterator[tuple[int, int]]:
    for start in range(0, queries, TILE):
        yield start, min(start + TILE, queries)


def _scores(q: Any, k: Any, causal: bool, start: int, offset: int, scale: float) -> tuple[Any, Any]:
    # (H, rows, D), (H, S, D) -> scaled q and masked scores (H, rows, columns) of the columns a row may see
    xp = module_of(q)
    rows = q.shape[1]
    columns = min(k.shape[1], start + offset + rows) if causal else k.shape[1]
    scaled = q * scale
    scores = scaled @ k[:, :columns].swapaxes(1, 2)  # (H, rows, columns)
    if causal and rows > 1:
        hidden = xp.triu(xp.full((rows, rows), -xp.inf, q.dtype), 1)
        scores[:, :, columns - rows :] += hidden
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
def forward(q: Any, k: Any, v: Any, causal: bool = True, draw: dropout.Draw | None = None) -> tuple[Any, Any]:
    """Shapes: q (B, H, T, D), k and v (B, H, S, D) -> o (B, T, H, D), lse (B, H, T).

    Causal with S > T: the queries are the last T of S positions (a cache holds the others).
    `draw` names a dropout mask of the probabilities, (B, H, T, S). Cost: 4·B·H·T·S·D flops, half if causal.
    """
    xp = module_of(q)
    batch, heads, queries, width = q.shape
    offset, scale = k.shape[2] - queries, 1.0 / math.sqrt(width)
    o = xp.empty((batch, queries, heads, width), q.dtype)
    lse = xp.empty((batch, heads, queries), q.dtype)
    for b in range(batch):
        for start, stop in _tiles(queries):
            _, p = _scores(q[b, :, start:stop], k[b], causal, start, offset, scale)
            top = p.max(axis=2, keepdims=True)
            p -= top
            xp.exp(p, out=p)
            total = p.sum(axis=2, keepdims=True)
            lse[b, :, start:stop] = (top + xp.log(total))[:, :, 0]
            if draw is not None:
                drop = _factors(draw, (batch, heads, queries, k.shape[2]), b, start, stop, q.dtype, xp)
                p *= drop[:, :, : p.shape[2]]
            part = p @ v[b, :, : p.shape[2]]  # (H, rows, D)
            part /= total
            o[b, start:stop] = part.swapaxes(0, 1)
    return o, lse


@served
def backward(
    do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dq: Any, dk: Any, dv: Any,
    causal: bool = True, draw: dropout.Draw | None = None,
) -> None:  # fmt: skip
    """Writes dq, dk, dv, which may be strided views. Shapes: do and o (B, T, H, D), the rest as `forward`.

    With P the probabilities and δ = Σ do·o per query: dv = Pᵀdo, dS = P (do vᵀ − δ), dq = dS k, dk = dSᵀq.
    Cost: 10·B·H·T·S·D flops, half if causal.
    """
    xp = module_of(q)
    batch, heads, queries, width = q.shape
    offset, scale = k.shape[2] - queries, 1.0 / math.sqrt(width)
    for b in range(batch):
        first = True  # the last tile sees every column: it writes dk and dv, the others add
        for start, stop in reversed(list(_tiles(queries))):
            scaled, p = _scores(q[b, :, start:stop], k[b], causal, start, offset, scale)
            columns = p.shape[2]
            p -= lse[b, :, start:stop, None]
            xp.exp(p, out=p)
            dot = do[b, start:stop].swapaxes(0, 1)  # (H, rows, D)
            ds = dot @ v[b, :, :columns].swapaxes(1, 2)  # (H, rows, columns)
            delta = xp.einsum("thd,thd->ht", do[b, start:stop], o[b, start:stop])
            kept = p
            if draw is not None:
                drop = _factors(draw, (batch, heads, queries, k.shape[2]), b, start, stop, q.dtype, xp)
                drop = drop[:, :, :columns]
                kept = p * drop
                ds *= drop
            ds -= delta[:, :, None]
            ds *= p
            dq[b, :, start:stop] = (ds @ k[b, :, :columns]) * scale
            for out, left, right in ((dv, kept, dot), (dk, ds, scaled)):
                if first:
                    xp.matmul(left.swapaxes(1, 2), right, out=out[b])
                else:
                    out[b, :, :columns] += left.swapaxes(1, 2) @ right
            first = False
