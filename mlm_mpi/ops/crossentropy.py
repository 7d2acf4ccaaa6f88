"""Output projection and cross-entropy in chunks of rows: N·V logits never exist at once.

The loss is the turning point of a step: forward and backward of a chunk run together, so that no logits
are kept and none are computed twice. Losses are *sums* over targets; the division by the global target
count comes once, after the reduction.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import module_of, wide
from mlm_mpi.backend.registry import served
from mlm_mpi.ops import matmul

GPU_CHUNK_ROWS = 8192  # fills a GPU; logits of 50,304 tokens take 0.8 GB in bfloat16
CHUNK_ROWS = 512  # logits of 512 rows and 8192 tokens take 16 MiB; fewer rows cost BLAS more packing than they save


@served
def rows(logits: Any, targets: Any, mask: Any, gradient: bool) -> Any:
    """Losses, float64, 0 where masked; with `gradient`, the logits become softmax − onehot, 0 where masked.

    Without `gradient` nothing of use is left in the logits. A target outside the vocabulary raises IndexError on the
    CPU; the CUDA kernel makes its loss NaN.

    Shapes: logits (R, V), overwritten; targets (R,), mask (R,) or None -> (R,).
    """
    xp, stored, logits = module_of(logits), logits, wide(logits)
    index = xp.arange(logits.shape[0])
    logits -= logits.max(axis=1, keepdims=True)
    wanted = logits[index, targets].copy()
    xp.exp(logits, out=logits)
    total = logits.sum(axis=1, keepdims=True)
    losses = (xp.log(total[:, 0]) - wanted).astype("f8")
    if gradient:
        logits /= total
        logits[index, targets] -= 1.0
    if mask is not None:
        losses[~mask] = 0.0
        logits[~mask] = 0.0
    if stored is not logits:
        stored[...] = logits
    return losses


def _chunks(x: Any, mask: Any) -> Iterator[tuple[slice, Any]]:
    rows_at_once = CHUNK_ROWS if isinstance(x, np.ndarray) else GPU_CHUNK_ROWS
    for start in range(0, x.shape[0], rows_at_once):
        part = slice(start, min(start + rows_at_once, x.shape[0]))
        yield part, None if mask is None else mask[part]


def _logits(x: Any, w: Any) -> Any:
    # x wᵀ (R, V); on a GPU rows begin at whole 16 bytes, without which only the plain product takes a V such as 50,257
    xp, columns = module_of(x), w.shape[0]
    pitch = columns if xp is np else -(-columns // 8) * 8
    logits = xp.empty((x.shape[0], pitch), x.dtype)[:, :columns]
    matmul.add(x, w.T, logits, accumulate=False)
    return logits


def loss(x: Any, w: Any, targets: Any, mask: Any = None) -> Any:
    """Summed cross-entropy in nats, float64; a GPU is not awaited.

    Shapes: x (N, C), w (V, C), targets (N,), mask (N,) or None.
    """
    total: Any = 0.0
    for part, some in _chunks(x, mask):
        total = total + rows(_logits(x[part], w), targets[part], some, gradient=False).sum()
    return total


def loss_and_grad(x: Any, w: Any, targets: Any, mask: Any, dw: Any, accumulate: bool) -> tuple[Any, Any]:
    """(summed loss as in `loss`, dx); writes or adds dw. Shapes: as `loss`; dx (N, C). Cost: 6·N·C·V flops."""
    dx = module_of(x).empty_like(x)
    total: Any = 0.0
    for part, some in _chunks(x, mask):
        logits = _logits(x[part], w)  # (R, V)
        total = total + rows(logits, targets[part], some, gradient=True).sum()
        matmul.add(logits, w, dx[part], accumulate=False)
        matmul.add(logits.T, x[part], dw, accumulate or part.start > 0)
    return total, dx
