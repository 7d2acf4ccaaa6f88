"""Output projection and cross-entropy in chunks of rows: N·V logits never exist at once.

The loss is the turning point of a step: forward and backward of a chunk run together, so that no logits
are kept and none are computed twice. Losses are *sums* over targets; the division by the global target
count comes once, after the reduction.
"""

from typing import Any

from mlm_mpi.backend.arrays import add_product, module_of

CHUNK_ROWS = 256  # logits of 256 rows and 8192 tokens take 8 MiB


def _chunk_loss(logits: Any, targets: Any) -> tuple[Any, Any]:
    # (R, V), (R,) -> losses (R,) and, in place of the logits, exp(logits − max) with its sums (R, 1)
    xp = module_of(logits)
    rows = xp.arange(logits.shape[0])
    logits -= logits.max(axis=1, keepdims=True)
    wanted = logits[rows, targets].copy()
    xp.exp(logits, out=logits)
    total = logits.sum(axis=1, keepdims=True)
    return xp.log(total[:, 0]) - wanted, total


def loss(x: Any, w: Any, targets: Any, mask: Any = None) -> float:
    """Summed cross-entropy in nats, float64. Shapes: x (N, C), w (V, C), targets (N,), mask (N,) or None."""
    total = 0.0
    for start in range(0, x.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        losses, _ = _chunk_loss(x[rows] @ w.T, targets[rows])
        total += float((losses if mask is None else losses[mask[rows]]).astype("f8").sum())
    return total


def loss_and_grad(x: Any, w: Any, targets: Any, mask: Any, dw: Any, accumulate: bool) -> tuple[float, Any]:
    """(summed loss, dx); writes or adds dw. Shapes: as `loss`; dx (N, C). Cost: 6·N·C·V flops."""
    xp = module_of(x)
    dx = xp.empty_like(x)
    total = 0.0
    for start in range(0, x.shape[0], CHUNK_ROWS):
        rows = slice(start, min(start + CHUNK_ROWS, x.shape[0]))
        logits = x[rows] @ w.T  # (R, V)
        losses, sums = _chunk_loss(logits, targets[rows])
        logits /= sums
        logits[xp.arange(logits.shape[0]), targets[rows]] -= 1.0
        if mask is not None:
            losses = losses[mask[rows]]
            logits *= mask[rows, None]
        total += float(losses.astype("f8").sum())
        xp.matmul(logits, w, out=dx[rows])
        add_product(logits.T, x[rows], dw, accumulate or start > 0)
    return total, dx
