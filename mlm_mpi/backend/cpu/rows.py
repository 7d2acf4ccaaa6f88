"""Launches of the kernels over rows of matrices, or over blocks of a flat array."""

import ctypes
from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import BFLOAT16
from mlm_mpi.backend.cpu.contracts import FLOAT32, dense, elements, equal_groups, halved, shaped, within
from mlm_mpi.backend.cpu.library import at
from mlm_mpi.backend.cpu.matmul import floats, rowwise
from mlm_mpi.backend.registry import Table

KERNELS = Table()


# ---- linear


def _fit_bias_gradient(dy: Any, db: Any, accumulate: bool, pieces: int = 1) -> str:
    return elements(dy) or dense(db) or shaped(dy.shape[1:], db) or equal_groups(dy, pieces)


@KERNELS.kernel("linear.bias_gradient", _fit_bias_gradient)
def _bias_gradient(lib: Any, dy: Any, db: Any, accumulate: bool, pieces: int = 1) -> None:
    work = np.empty(lib.linear_work(db.size, pieces), np.float32)
    lib.of("linear_bias_gradient", dy)(*dy.shape, pieces, at(dy), at(db), accumulate, at(work))


# ---- layernorm


def _fit_norm(x: Any, gain: Any, bias: Any, epsilon: float) -> str:
    return elements(x, gain, bias) or shaped(x.shape[1:], gain, bias)


@KERNELS.kernel("layernorm.forward", _fit_norm)
def _layernorm_forward(lib: Any, x: Any, gain: Any, bias: Any, epsilon: float) -> tuple[Any, Any]:
    y, statistics = np.empty_like(x), np.empty((2, x.shape[0]), np.float32)
    lib.of("layernorm_forward", x)(
        *x.shape, at(x), at(gain), at(bias), epsilon, at(y), at(statistics[0]), at(statistics[1])
    )
    return y, statistics


def _fit_norm_backward(
    dy: Any, x: Any, gain: Any, statistics: Any, dgain: Any, dbias: Any, accumulate: bool, add: Any = None,
    pieces: int = 1,
) -> str:  # fmt: skip
    return elements(dy, x, gain, add) or dense(statistics, dgain, dbias) or shaped(x.shape, dy, add) or (
        shaped(x.shape[1:], gain, dgain, dbias) or shaped((2, x.shape[0]), statistics) or equal_groups(x, pieces)
    )  # fmt: skip


@KERNELS.kernel("layernorm.backward", _fit_norm_backward)
def _layernorm_backward(
    lib: Any, dy: Any, x: Any, gain: Any, statistics: Any, dgain: Any, dbias: Any, accumulate: bool, add: Any = None,
    pieces: int = 1,
) -> Any:  # fmt: skip
    dx, work = np.empty_like(x), np.empty(2 * x.shape[1] * pieces.bit_length(), np.float32)
    lib.of("layernorm_backward", x)(
        *x.shape, pieces, at(dy), at(x), at(gain), at(statistics[0]), at(statistics[1]), at(add), at(dx), at(dgain),
        at(dbias), accumulate, at(work),
    )  # fmt: skip
    return dx


# ---- rmsnorm


@KERNELS.kernel("rmsnorm.forward", lambda x, gain, epsilon: elements(x, gain) or shaped(x.shape[1:], gain))
def _rmsnorm_forward(lib: Any, x: Any, gain: Any, epsilon: float) -> tuple[Any, Any]:
    y, inverse = np.empty_like(x), np.empty(x.shape[0], np.float32)
    lib.of("rmsnorm_forward", x)(*x.shape, at(x), at(gain), epsilon, at(y), at(inverse))
    return y, inverse


def _fit_rms_backward(
    dy: Any, x: Any, gain: Any, inverse: Any, dgain: Any, accumulate: bool, add: Any = None, pieces: int = 1
) -> str:
    return elements(dy, x, gain, add) or dense(inverse, dgain) or shaped(x.shape, dy, add) or (
        shaped(x.shape[1:], gain, dgain) or shaped(x.shape[:1], inverse) or equal_groups(x, pieces)
    )  # fmt: skip


@KERNELS.kernel("rmsnorm.backward", _fit_rms_backward)
def _rmsnorm_backward(
    lib: Any, dy: Any, x: Any, gain: Any, inverse: Any, dgain: Any, accumulate: bool, add: Any = None, pieces: int = 1
) -> Any:
    dx, work = np.empty_like(x), np.empty(x.shape[1] * pieces.bit_length(), np.float32)
    lib.of("rmsnorm_backward", x)(
        *x.shape, pieces, at(dy), at(x), at(gain), at(inverse), at(add), at(dx), at(dgain), accumulate, at(work)
    )
    return dx


# ---- rotary


class _Heads(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("batch", "length", "groups", "units", "width", "half", "pieces", "shares")
    ]  # fmt: skip


class _Units(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("b", "t", "g", "u")]


def _units(x: Any) -> _Units:
    return _Units(x.ctypes.data, *(stride // x.itemsize for stride in x.strides[:4]))


def _fit_heads(cos: Any, sin: Any, gain: Any, inverse: Any, *heads: Any) -> str:
    """`heads`: arrays (B, T, G, U, D) of one shape, whose last dim is contiguous; None is left out."""
    present = [x for x in heads if x is not None]
    dtype = present[0].dtype
    for x in present:
        if not isinstance(x, np.ndarray) or x.ndim != 5:
            return "not heads in the CPU's memory"
        if x.dtype not in (FLOAT32, BFLOAT16) or x.dtype != dtype:
            return str(x.dtype)
        if x.size == 0:
            return "empty"
        if (x.shape[4] > 1 and x.strides[4] != x.itemsize) or not x.flags.aligned:
            return "not contiguous"
    batch, length, groups, units, width = shape = present[0].shape
    reason = dense(cos, sin, inverse) or dense(gain, dtype=dtype) or shaped(shape, *present) or shaped((2, width), gain)
    reason = reason or shaped((length, cos.shape[1]), cos, sin) or shaped((batch, length, groups, units), inverse)
    return reason or ("" if 2 * cos.shape[1] <= width else "a rotation of more than there is")


def _fit_rotary(x: Any, cos: Any, sin: Any, gain: Any = None, epsilon: float = 0.0) -> str:
    return _fit_heads(cos, sin, gain, None, x)


@KERNELS.kernel("rotary.forward", _fit_rotary)
def _rotary_forward(lib: Any, x: Any, cos: Any, sin: Any, gain: Any = None, epsilon: float = 0.0) -> tuple[Any, Any]:
    y, inverse = np.empty(x.shape, x.dtype), None if gain is None else np.empty(x.shape[:4], np.float32)
    heads, units = _Heads(*x.shape, cos.shape[1], 1, 1), _units(x)
    lib.of("rotary_forward", x)(
        lib.pointer(heads), lib.pointer(units), at(cos), at(sin), at(gain), epsilon, at(y), at(inverse)
    )
    return y, inverse


def _fit_rotary_backward(
    dy: Any, x: Any, cos: Any, sin: Any, gain: Any = None, inverse: Any = None, dgain: Any = None,
    accumulate: bool = False, pieces: int = 1, shares: int = 1, out: Any = None,
) -> str:  # fmt: skip
    if gain is None:
        return _fit_heads(cos, sin, None, None, dy, out)
    reason = _fit_heads(cos, sin, gain, inverse, dy, x, out) or dense(dgain) or shaped(gain.shape, dgain)
    batch, length, groups = dy.shape[:3]
    equal = pieces > 0 and shares > 0 and batch * length % pieces == 0 and groups % shares == 0
    return reason or ("" if equal else "rows or groups do not fall into equal ranges")


@KERNELS.kernel("rotary.backward", _fit_rotary_backward)
def _rotary_backward(
    lib: Any, dy: Any, x: Any, cos: Any, sin: Any, gain: Any = None, inverse: Any = None, dgain: Any = None,
    accumulate: bool = False, pieces: int = 1, shares: int = 1, out: Any = None,
) -> Any:  # fmt: skip
    dx, work = np.empty(dy.shape, dy.dtype) if out is None else out, None
    heads = _Heads(*dy.shape, cos.shape[1], *((1, 1) if gain is None else (pieces, shares)))
    pointer = lib.pointer(heads)
    if gain is not None:
        work = np.empty(lib.of("rotary_work", dy)(pointer), np.float32)
    units = [None if each is None else _units(each) for each in (dy, None if gain is None else x, dx)]
    at_dy, at_x, at_dx = map(lib.pointer, units)
    lib.of("rotary_backward", dy)(
        pointer, at_dy, at_x, at(cos), at(sin), at(gain), at(inverse), at_dx, at(dgain), accumulate, at(work)
    )
    return dx


# ---- embedding, crossentropy


@KERNELS.kernel("embedding.forward", lambda ids, table: elements(table) or within(ids, table.shape[0]))
def _embedding_forward(lib: Any, ids: Any, table: Any) -> Any:
    out = np.empty((*ids.shape, table.shape[1]), table.dtype)
    lib.of("embedding_forward", table)(ids.size, table.shape[1], at(ids), at(table), at(out))
    return out


def _fit_scatter(dy: Any, ids: Any, dtable: Any) -> str:
    return elements(dy) or dense(dtable) or within(ids, dtable.shape[0]) or shaped((ids.size, dtable.shape[1]), dy)


@KERNELS.kernel("embedding.backward", _fit_scatter)
def _embedding_backward(lib: Any, dy: Any, ids: Any, dtable: Any) -> None:
    order = np.argsort(ids, kind="stable")
    lib.of("embedding_backward", dy)(*dy.shape, at(dy), at(ids), at(order), at(dtable))


def _fit_rows(logits: Any, targets: Any, mask: Any, gradient: bool, shares: int = 1, cap: float = 0.0) -> str:
    return (
        elements(logits) or within(targets, logits.shape[1]) or dense(mask, dtype=np.bool_)
        or shaped(logits.shape[:1], targets, mask) or halved(logits.shape[1], shares)
    )  # fmt: skip


@KERNELS.kernel("crossentropy.rows", _fit_rows)
def _crossentropy_rows(
    lib: Any, logits: Any, targets: Any, mask: Any, gradient: bool, shares: int = 1, cap: float = 0.0
) -> Any:
    rows = (cap != 0) + (logits.dtype == BFLOAT16)
    losses, work = np.empty(logits.shape[0]), np.empty(rows * logits.shape[1], np.float32) if rows else None
    lib.of("crossentropy_rows", logits)(
        *logits.shape, at(logits), at(targets), at(mask), gradient, shares, at(losses), cap, at(work)
    )
    return losses


@KERNELS.kernel("crossentropy.capped", lambda logits, cap: elements(logits) if cap else "")
def _crossentropy_capped(lib: Any, logits: Any, cap: float) -> Any:
    if not cap:
        return logits
    capped = np.empty_like(logits)
    lib.of("crossentropy_capped", logits)(logits.size, at(logits), cap, at(capped))
    return capped


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
    lambda exponentials, totals, targets, capped=None, cap=0.0: dense(exponentials, totals)
    or dense(targets, dtype=np.int32) or shaped(exponentials.shape[:1], totals, targets)
    or (dense(capped) or shaped(exponentials.shape, capped) if cap else ""),
)  # fmt: skip
def _crossentropy_gradient(
    lib: Any, exponentials: Any, totals: Any, targets: Any, capped: Any = None, cap: float = 0.0
) -> None:
    at_capped = at(capped) if cap else None
    lib.crossentropy_gradient(*exponentials.shape, at(exponentials), at(totals), at(targets), at_capped, cap)


# ---- clip


@KERNELS.kernel("clip.squares", lambda x, block: floats(x) or rowwise(x) if x.ndim == 2 else dense(x))
def _clip_squares(lib: Any, x: Any, block: int) -> Any:
    out = np.empty(-(-x.size // block))
    rows, pitch = (x.shape[0], x.strides[0] // 4) if x.ndim == 2 else (1, 0)
    lib.clip_squares(rows, x.shape[-1], pitch, block, at(x), at(out))
    return out
