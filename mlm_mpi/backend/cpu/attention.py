"""Launches of attention, any strides of batch, heads and rows."""

import ctypes
import math
from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import BFLOAT16
from mlm_mpi.backend.cpu.contracts import FLOAT32, dense, shaped
from mlm_mpi.backend.cpu.library import at, c_draw
from mlm_mpi.backend.registry import Table

KERNELS = Table()

ONE_SHARE = 1 << 62  # positions in a share where nothing is cut


class _Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("b", "g", "h", "t")]


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "groups", "heads", "queries", "keys", "width")),
        *((name, ctypes.c_int64) for name in ("query", "key", "share")),
        ("starts", ctypes.c_void_p),
        ("starts_b", ctypes.c_int64),
        ("causal", ctypes.c_int),
    ]


def _in_groups(x: Any, groups: int) -> Any:
    """A view (B, G, heads of a group, rows, D) of (B, H, rows, D), or what it is already."""
    return x if x.ndim == 5 else x.reshape(x.shape[0], groups, -1, *x.shape[2:])


def _heads_first(x: Any) -> Any:
    return x.swapaxes(1, 2)  # (B, T, H, D) -> (B, H, T, D), a view


def _matrices(groups: int, *arrays: Any) -> list[_Matrix]:
    views = [_in_groups(x, groups) for x in arrays]
    return [_Matrix(x.ctypes.data, *(stride // x.itemsize for stride in x.strides[:4])) for x in views]


def _heads(q: Any) -> int:
    return q.shape[1] if q.ndim == 4 else q.shape[1] * q.shape[2]


def _fit_starts(starts: Any, batch: int, queries: int) -> str:
    if starts is None:
        return ""
    if reason := dense(starts, dtype=np.int32):
        return f"starts: {reason}"
    if starts.shape not in ((batch, queries), (1, queries)) or (starts[:, 1:] < starts[:, :-1]).any():
        return "starts: shapes differ, or they descend"
    return ""


def _fit_attention(
    q: Any, k: Any, v: Any, causal: bool = True, draw: Any = None, lengths: Any = None,
    share: int = 0, positions: Any = None, starts: Any = None, others: tuple[Any, ...] = (),
) -> str:  # fmt: skip
    if lengths is not None:
        return "lengths"
    if isinstance(q, np.ndarray) and q.ndim not in (4, 5):
        return "shapes differ"
    for x in (q, k, v, *others):
        if not isinstance(x, np.ndarray) or x.ndim not in (4, q.ndim):
            return "not in the CPU's memory"
        if x.dtype not in (FLOAT32, BFLOAT16) or x.dtype != q.dtype:
            return str(x.dtype)
        if (x.shape[-1] > 1 and x.strides[-1] != x.itemsize) or not x.flags.aligned or min(x.strides) < 0:
            return "not contiguous"
    if 0 in q.shape or 0 in k.shape:
        return "empty"
    groups = k.shape[1]
    if k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[-1]) != (k.shape[0], k.shape[3]):
        return "shapes differ"
    if q.shape[1] != groups if q.ndim == 5 else q.shape[1] % groups:
        return "heads do not fall into groups"
    if min(share, *(positions or (0, 0))) < 0:
        return "negative positions"
    last = positions is None and (causal or share or starts is not None)  # the queries are the last of the positions
    if last and q.shape[-2] > k.shape[2]:
        return "more queries than keys"
    return _fit_starts(starts, q.shape[0], q.shape[-2])


def _attention_arguments(
    lib: Any, q: Any, k: Any, causal: bool, draw: Any, share: int, positions: Any, starts: Any
) -> tuple[_Shape, Any, float, Any]:
    # shape, draw, scale, work space
    batch, groups, heads, queries, width = _in_groups(q, k.shape[1]).shape
    keys = k.shape[2]
    query, key = (max(0, keys - queries), 0) if positions is None else positions
    shape = _Shape(batch, groups, heads, queries, keys, width, query, key, share or ONE_SHARE)
    shape.causal = causal
    if starts is not None:
        shape.starts, shape.starts_b = starts.ctypes.data, queries if len(starts) > 1 else 0
    drawn = None
    if draw is not None:
        drawn = c_draw(draw, draw.start, draw.along((batch, groups * heads, queries, keys))[:3])
    return shape, drawn, 1.0 / math.sqrt(width), np.empty(lib.of("attention_work", q)(lib.pointer(shape)), np.float32)


def _softmax(lib: Any, q: Any, k: Any, v: Any, arguments: tuple[_Shape, Any, float, Any], first: Any, sums: Any) -> Any:
    """o. Writes lse into `first`; with `sums`, maxima and sums, and o is not yet divided by these."""
    shape, drawn, scale, work = arguments
    o = np.empty((q.shape[0], q.shape[-2], _heads(q), q.shape[-1]), q.dtype if sums is None else np.float32)
    structures = (shape, drawn, *_matrices(k.shape[1], q, k, v, _heads_first(o)))
    lib.of("attention_forward", q)(*map(lib.pointer, structures), scale, at(first), at(sums), at(work))
    return o


@KERNELS.kernel("attention.forward", _fit_attention)
def _attention_forward(
    lib: Any, q: Any, k: Any, v: Any, causal: bool = True, draw: Any = None, lengths: None = None,
    share: int = 0, positions: Any = None, starts: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    lse = np.empty((q.shape[0], _heads(q), q.shape[-2]), np.float32)
    return _softmax(
        lib, q, k, v, _attention_arguments(lib, q, k, causal, draw, share, positions, starts), lse, None
    ), lse


@KERNELS.kernel("attention.partial", _fit_attention)
def _attention_partial(
    lib: Any, q: Any, k: Any, v: Any, causal: bool = True, draw: Any = None, lengths: None = None,
    share: int = 0, positions: Any = None, starts: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    statistics = np.empty((2, q.shape[0], _heads(q), q.shape[-2]), np.float32)
    arguments = _attention_arguments(lib, q, k, causal, draw, share, positions, starts)
    return _softmax(lib, q, k, v, arguments, statistics[0], statistics[1]), statistics


def _fit_partial(o: Any, statistics: Any, *others: Any) -> str:
    reason = dense(o, statistics, *others)
    if not reason and o.ndim != 4:
        return "shapes differ"
    return reason or shaped(o.shape, *others[:1]) or (
        shaped((2, o.shape[0], o.shape[2], o.shape[1]), statistics, *others[1:])
    )  # fmt: skip


def _partial_shape(o: Any) -> _Shape:
    batch, queries, heads, width = o.shape
    return _Shape(batch, heads, 1, queries, 0, width)


@KERNELS.kernel("attention.merge", _fit_partial)
def _attention_merge(lib: Any, o: Any, statistics: Any, other_o: Any, other_statistics: Any) -> None:
    shape, (mine, other) = _partial_shape(o), _matrices(o.shape[2], _heads_first(o), _heads_first(other_o))
    lib.attention_merge(
        lib.pointer(shape), lib.pointer(mine), at(statistics[0]), at(statistics[1]),
        lib.pointer(other), at(other_statistics[0]), at(other_statistics[1]),
    )  # fmt: skip


@KERNELS.kernel("attention.finish", _fit_partial)
def _attention_finish(lib: Any, o: Any, statistics: Any) -> tuple[Any, Any]:
    shape, (matrix,) = _partial_shape(o), _matrices(o.shape[2], _heads_first(o))
    lse = np.empty(statistics.shape[1:], np.float32)
    lib.attention_finish(lib.pointer(shape), lib.pointer(matrix), at(statistics[0]), at(statistics[1]), at(lse))
    return o, lse


def _fit_attention_backward(
    do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dq: Any, dk: Any, dv: Any,
    causal: bool = True, draw: Any = None, lengths: Any = None, share: int = 0, positions: Any = None,
    starts: Any = None,
) -> str:  # fmt: skip
    reason = _fit_attention(q, k, v, causal, draw, lengths, share, positions, starts, (do, o, dq, dk, dv)) or dense(lse)
    if reason:
        return reason
    batch, heads, (queries, width) = q.shape[0], _heads(q), q.shape[-2:]
    rows = (batch, queries, heads, width)
    lines = shaped(rows, do, o) or shaped((batch, heads, queries), lse)
    return lines or shaped(q.shape, dq) or shaped(k.shape, dk, dv)


@KERNELS.kernel("attention.backward", _fit_attention_backward)
def _attention_backward(
    lib: Any, do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dq: Any, dk: Any, dv: Any,
    causal: bool = True, draw: Any = None, lengths: None = None, share: int = 0, positions: Any = None,
    starts: Any = None,
) -> None:  # fmt: skip
    shape, drawn, scale, work = _attention_arguments(lib, q, k, causal, draw, share, positions, starts)
    matrices = _matrices(k.shape[1], _heads_first(do), q, k, v, _heads_first(o), dq, dk, dv)
    structures = (shape, drawn, *matrices)
    lib.of("attention_backward", q)(*map(lib.pointer, structures), scale, at(lse), at(work))
