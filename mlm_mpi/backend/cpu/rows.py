"""Launches of the kernels over rows of matrices, or over blocks of a flat array."""

from typing import Any

import numpy as np

from mlm_mpi.backend.cpu.contracts import dense, equal_groups, halved, shaped, within
from mlm_mpi.backend.cpu.library import at
from mlm_mpi.backend.cpu.matmul import matrices, rowwise
from mlm_mpi.backend.registry import Table

KERNELS = Table()


# ---- linear


def _fit_bias_gradient(dy: Any, db: Any, accumulate: bool, pieces: int = 1) -> str:
    return dense(dy, db) or shaped(dy.shape[1:], db) or equal_groups(dy, pieces)


@KERNELS.kernel("linear.bias_gradient", _fit_bias_gradient)
def _bias_gradient(lib: Any, dy: Any, db: Any, accumulate: bool, pieces: int = 1) -> None:
    work = np.empty(lib.linear_work(db.size, pieces), np.float32)
    lib.linear_bias_gradient(*dy.shape, pieces, at(dy), at(db), accumulate, at(work))


# ---- layernorm


def _fit_norm(x: Any, gain: Any, bias: Any, epsilon: float) -> str:
    return dense(x, gain, bias) or shaped(x.shape[1:], gain, bias)


@KERNELS.kernel("layernorm.forward", _fit_norm)
def _layernorm_forward(lib: Any, x: Any, gain: Any, bias: Any, epsilon: float) -> tuple[Any, Any]:
    y, statistics = np.empty_like(x), np.empty((2, x.shape[0]), np.float32)
    lib.layernorm_forward(*x.shape, at(x), at(gain), at(bias), epsilon, at(y), at(statistics[0]), at(statistics[1]))
    return y, statistics


def _fit_norm_backward(
    dy: Any, x: Any, gain: Any, statistics: Any, dgain: Any, dbias: Any, accumulate: bool, add: Any = None,
    pieces: int = 1,
) -> str:  # fmt: skip
    return dense(dy, x, gain, statistics, dgain, dbias, add) or shaped(x.shape, dy, add) or (
        shaped(x.shape[1:], gain, dgain, dbias) or shaped((2, x.shape[0]), statistics) or equal_groups(x, pieces)
    )  # fmt: skip


@KERNELS.kernel("layernorm.backward", _fit_norm_backward)
def _layernorm_backward(
    lib: Any, dy: Any, x: Any, gain: Any, statistics: Any, dgain: Any, dbias: Any, accumulate: bool, add: Any = None,
    pieces: int = 1,
) -> Any:  # fmt: skip
    dx, work = np.empty_like(x), np.empty(2 * x.shape[1] * pieces.bit_length(), np.float32)
    lib.layernorm_backward(
        *x.shape, pieces, at(dy), at(x), at(gain), at(statistics[0]), at(statistics[1]), at(add), at(dx), at(dgain),
        at(dbias), accumulate, at(work),
    )  # fmt: skip
    return dx


# ---- embedding, crossentropy


@KERNELS.kernel("embedding.forward", lambda ids, table: dense(table) or within(ids, table.shape[0]))
def _embedding_forward(lib: Any, ids: Any, table: Any) -> Any:
    out = np.empty((*ids.shape, table.shape[1]), np.float32)
    lib.embedding_forward(ids.size, table.shape[1], at(ids), at(table), at(out))
    return out


def _fit_scatter(dy: Any, ids: Any, dtable: Any) -> str:
    return dense(dy, dtable) or within(ids, dtable.shape[0]) or shaped((ids.size, dtable.shape[1]), dy)


@KERNELS.kernel("embedding.backward", _fit_scatter)
def _embedding_backward(lib: Any, dy: Any, ids: Any, dtable: Any) -> None:
    order = np.argsort(ids, kind="stable")
    lib.embedding_backward(*dy.shape, at(dy), at(ids), at(order), at(dtable))


def _fit_rows(logits: Any, targets: Any, mask: Any, gradient: bool, shares: int = 1, cap: float = 0.0) -> str:
    if cap:
        return "a cap"
    return (
        dense(logits) or within(targets, logits.shape[1]) or dense(mask, dtype=np.bool_)
        or shaped(logits.shape[:1], targets, mask) or halved(logits.shape[1], shares)
    )  # fmt: skip


@KERNELS.kernel("crossentropy.rows", _fit_rows)
def _crossentropy_rows(
    lib: Any, logits: Any, targets: Any, mask: Any, gradient: bool, shares: int = 1, cap: float = 0.0
) -> Any:
    losses = np.empty(logits.shape[0])
    lib.crossentropy_rows(*logits.shape, at(logits), at(targets), at(mask), gradient, shares, at(losses))
    return losses


@KERNELS.kernel(
    "crossentropy.exponentials",
    lambda logits, top, shares=1: (
        dense(logits, top) or shaped(logits.shape[:1], top) or halved(logits.shape[1], shares)
    ),
)
def _crossentropy_exponentials(lib: Any, logits: Any, top: Any, shares: int = 1) -> Any:
    totals = np.empty(logits.shape[0], np.float32)
    lib.crossentropy_exponentials(*logits.shape, at(logits), at(top), shares, at(totals))
    return totals


@KERNELS.kernel(
    "crossentropy.losses", lambda totals, top, wanted: dense(totals, top, wanted) or shaped(totals.shape, top, wanted)
)
def _crossentropy_losses(lib: Any, totals: Any, top: Any, wanted: Any) -> Any:
    losses = np.empty(totals.size)
    lib.crossentropy_losses(totals.size, at(totals), at(top), at(wanted), at(losses))
    return losses


@KERNELS.kernel(
    "crossentropy.gradient",
    lambda exponentials, totals, targets, capped=None, cap=0.0: ("a cap" if cap else "")
    or dense(exponentials, totals) or dense(targets, dtype=np.int32)
    or shaped(exponentials.shape[:1], totals, targets),
)  # fmt: skip
def _crossentropy_gradient(
    lib: Any, exponentials: Any, totals: Any, targets: Any, capped: Any = None, cap: float = 0.0
) -> None:
    lib.crossentropy_gradient(*exponentials.shape, at(exponentials), at(totals), at(targets))


# ---- clip


@KERNELS.kernel("clip.squares", lambda x, block: matrices(x) or rowwise(x) if x.ndim == 2 else dense(x))
def _clip_squares(lib: Any, x: Any, block: int) -> Any:
    out = np.empty(-(-x.size // block))
    rows, pitch = (x.shape[0], x.strides[0] // 4) if x.ndim == 2 else (1, 0)
    lib.clip_squares(rows, x.shape[-1], pitch, block, at(x), at(out))
    return out
