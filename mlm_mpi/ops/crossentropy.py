"""Output projection and cross-entropy in chunks of rows: N·V logits never exist at once.

The loss is the turning point of a step: forward and backward of a chunk run together, so that no logits
are kept and none are computed twice. Losses are *sums* over targets; the division by the global target
count comes once, after the reduction. Sums over the vocabulary have *shares*, as those of `ops.matmul`; the loss is
summed in *pieces*, equal groups of rows that a tree joins, of which a chunk may hold any part.

Logits z may have a soft cap, so that none is greater: l = cap·tanh(z/cap), slope 1 − (l/cap)²; a cap of 0 is none.
Source: Gemma team, "Gemma 2", arXiv:2408.00118, section 2.

Targets may be smoothed: a part ε of each is shared by all V tokens. Then the loss is greater by ε·(wanted logit − mean
logit of its row), the gradient is softmax − (1 − ε) onehot − ε/V. Source: Szegedy et al., arXiv:1512.00567, section 7.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import module_of, wide
from mlm_mpi.backend.registry import served
from mlm_mpi.ops import matmul
from mlm_mpi.order import joined

GPU_CHUNK_ROWS = 8192  # fills a GPU; logits of 50,304 tokens take 0.8 GB in bfloat16
CHUNK_ROWS = 512  # logits of 512 rows and 8192 tokens take 16 MiB; fewer rows cost BLAS more packing than they save


@served
def capped(logits: Any, cap: float) -> Any:
    """cap·tanh(logits/cap), a new array; with a cap of 0 the logits themselves. Shapes: (R, V) -> (R, V)."""
    if not cap:
        return logits
    values = wide(logits) / cap
    module_of(logits).tanh(values, out=values)
    values *= cap
    return values.astype(logits.dtype, copy=False)


def _slope(capped: Any, cap: float) -> Any:
    # of `capped` where it gave these values
    part = capped / cap
    part *= part
    return 1.0 - part


@served
def rows(logits: Any, targets: Any, mask: Any, gradient: bool, shares: int = 1, cap: float = 0.0) -> Any:
    """Losses, float64, 0 where masked; with `gradient`, the logits become the loss's gradient, 0 where masked.

    That is softmax − onehot of the capped logits, times the cap's slope. The sum of exp over V has so many shares.
    Without `gradient` nothing of use is left in the logits. A target outside the vocabulary raises IndexError on the
    CPU; the CUDA kernel makes its loss NaN.

    Shapes: logits (R, V), overwritten; targets (R,), mask (R,) or None -> (R,).
    """
    xp, stored, logits = module_of(logits), logits, wide(logits)
    index = xp.arange(logits.shape[0])
    slope = None
    if cap:
        logits = capped(logits, cap)
        slope = _slope(logits, cap) if gradient else None
    logits -= logits.max(axis=1, keepdims=True)
    wanted = logits[index, targets].copy()
    xp.exp(logits, out=logits)
    total = joined([part.sum(axis=1, keepdims=True) for part in xp.split(logits, shares, axis=1)])
    losses = (xp.log(total[:, 0]) - wanted).astype("f8")
    if gradient:
        logits /= total
        logits[index, targets] -= 1.0
        if slope is not None:
            logits *= slope
    if mask is not None:
        losses[~mask] = 0.0
        logits[~mask] = 0.0
    if stored is not logits:
        stored[...] = logits
    return losses


@served
def exponentials(logits: Any, top: Any, shares: int = 1) -> Any:
    """The logits become exp(logit − top); returns their sums. What a rank does that holds some columns of V.

    `rows` is `capped`, `exponentials` with the maxima of whole rows, its sums joined by the tree, `losses` and
    `gradient`, to the last bit where logits are float32.
    Shapes: logits (R, V / ranks), top (R,) -> (R,).
    """
    xp = module_of(logits)
    logits -= top[:, None]
    xp.exp(logits, out=logits)
    return joined([part.sum(axis=1) for part in xp.split(logits, shares, axis=1)])


@served
def losses(totals: Any, top: Any, wanted: Any) -> Any:
    """−log softmax in nats, float64. Shapes: sums over whole rows, maxima and wanted logits (R,) -> (R,)."""
    return module_of(totals).log(totals) + (top.astype("f8") - wanted)


@served
def gradient(exponentials: Any, totals: Any, targets: Any, capped: Any = None, cap: float = 0.0) -> None:
    """exp(…) becomes softmax − onehot; a target below zero lies among other columns. Shapes: as `exponentials`.

    With a cap, times its slope at the capped logits, which the caller has kept: `capped` (R, V / ranks).
    """
    exponentials /= totals[:, None]
    here = (targets >= 0).nonzero()[0]
    exponentials[here, targets[here]] -= 1.0
    if cap:
        exponentials *= _slope(capped, cap)


def logit_sums(logits: Any, shares: int = 1) -> Any:
    """Sums over the columns, in shares, float32 or float64. Shapes: (R, V) -> (R,)."""
    xp = module_of(logits)
    sums = xp.empty((logits.shape[0], 1), wide(logits[:0]).dtype)
    matmul.add(logits, xp.ones((logits.shape[1], 1), logits.dtype), sums, False, shares)
    return sums[:, 0]


def above_mean(wanted: Any, sums: Any, columns: int, mask: Any) -> Any:
    """How far wanted logits are above the mean of their rows, float64, 0 where masked. Shapes: (R,), (R,) -> (R,)."""
    above = wanted.astype("f8") - sums.astype("f8") / columns
    if mask is not None:
        above[~mask] = 0.0
    return above


def smooth(gradient: Any, targets: Any, mask: Any, smoothing: float, columns: int) -> None:
    """softmax − onehot becomes softmax − (1 − ε) onehot − ε/V. A target below zero lies among other columns.

    Shapes: gradient (R, V), or what a rank has of V = `columns`; targets (R,), mask (R,) or None.
    """
    xp, values, here = module_of(gradient), wide(gradient), targets >= 0
    counted = xp.ones(len(targets), values.dtype) if mask is None else mask.astype(values.dtype)
    values[xp.arange(len(targets)), xp.where(here, targets, 0)] += counted * here * smoothing
    values -= (counted * (smoothing / columns))[:, None]
    if values is not gradient:
        gradient[...] = values


def _rows_at_once(x: Any) -> int:
    return CHUNK_ROWS if isinstance(x, np.ndarray) else GPU_CHUNK_ROWS


def chunks(x: Any, mask: Any) -> list[tuple[slice, Any]]:
    """(rows, their part of the mask) of what is computed at once."""
    # a last row does not stay alone: products of one row are not our kernels', and their bits not ours
    rows_at_once, count = _rows_at_once(x), x.shape[0]
    edges = [*range(0, max(1, count - 1), rows_at_once), count]
    parts = [slice(start, stop) for start, stop in pairwise(edges)]
    return [(part, None if mask is None else mask[part]) for part in parts]


def logits_of(x: Any, w: Any) -> Any:
    """x wᵀ. Shapes: (R, C), (V, C) -> (R, V)."""
    # x wᵀ (R, V); on a GPU rows begin at whole 16 bytes, without which only the plain product takes a V such as 50,257
    xp, columns = module_of(x), w.shape[0]
    pitch = columns if xp is np else -(-columns // 8) * 8
    logits = xp.empty((x.shape[0], pitch), x.dtype)[:, :columns]
    matmul.add(x, w.T, logits, accumulate=False)
    return logits


def summed(losses: Any, pieces: int) -> Any:
    """The sum of losses, a piece at a time; on a CPU a piece is rounded once, so that no library's order decides."""
    parts = losses.reshape(pieces, -1)
    if not isinstance(losses, np.ndarray):
        return joined(list(parts.sum(axis=1)))
    return np.float64(joined([math.fsum(part) if np.isfinite(part).all() else part.sum() for part in parts]))


def weigh(gradient: Any, weights: Any) -> None:
    """The gradient of each row's loss becomes that of its loss times its weight. Shapes: (R, V), (R,)."""
    values = wide(gradient)
    values *= weights.astype(values.dtype, copy=False)[:, None]
    if values is not gradient:
        gradient[...] = values


def each(x: Any, w: Any, targets: Any, mask: Any = None, shares: int = 1, cap: float = 0.0) -> Any:
    """The cross-entropy of each row in nats, float64, 0 where masked. Shapes: as `loss` -> (N,)."""
    losses = module_of(x).empty(x.shape[0])
    for part, some in chunks(x, mask):
        losses[part] = rows(logits_of(x[part], w), targets[part], some, False, shares, cap)
    return losses


def loss(x: Any, w: Any, targets: Any, mask: Any = None, shares: int = 1, pieces: int = 1, cap: float = 0.0) -> Any:
    """Summed cross-entropy in nats, float64; a GPU is not awaited.

    `shares`: of sums over V. `pieces`: of the sum over N. `cap`: of the logits, 0 for none.
    Shapes: x (N, C), w (V, C), targets (N,), mask (N,) or None.
    """
    return summed(each(x, w, targets, mask, shares, cap), pieces)


def loss_and_grad(
    x: Any, w: Any, targets: Any, mask: Any, dw: Any, accumulate: bool, shares: int = 1, pieces: int = 1,
    cap: float = 0.0, smoothing: float = 0.0, weights: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """(summed loss as in `loss`, dx); writes dw, or adds the whole of it. Shapes: as `loss`; dx (N, C).

    `dw`: None for a w that is not trained. `smoothing`: ε of the targets, of logits without a cap. `weights` (N,): of
    the rows' losses in the gradient, which alone they change.

    Cost: 6·N·C·V flops, 4·N·C·V without dw; with `accumulate` and more than one chunk, memory for one more dw.
    """
    xp = module_of(x)
    losses, dx, parts = xp.empty(x.shape[0]), xp.empty_like(x), chunks(x, mask)
    several = len(parts) > 1
    whole = xp.empty_like(dw) if accumulate and several and dw is not None else dw
    for part, some in parts:
        logits, wanted = logits_of(x[part], w), targets[part]  # (R, V), (R,)
        if smoothing:
            known, sums = logits[xp.arange(len(wanted)), wanted], logit_sums(logits, shares)
        losses[part] = rows(logits, wanted, some, True, shares, cap)
        if smoothing:
            losses[part] += smoothing * above_mean(known, sums, w.shape[0], some)
            smooth(logits, wanted, some, smoothing, w.shape[0])
        if weights is not None:
            weigh(logits, weights[part])
        matmul.add(logits, w, dx[part], False, shares)
        if whole is not None:
            matmul.add(logits.T, x[part], whole, part.start > 0 or (accumulate and not several))
        del logits  # its memory is the next chunk's
    if whole is not dw:
        dw += whole
    return summed(losses, pieces), dx
