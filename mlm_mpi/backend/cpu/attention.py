"""Launches of attention, any strides of batch, heads and rows."""

import ctypes
import math
from typing import Any

import numpy as np

from mlm_mpi.backend.cpu.contracts import dense, shaped
from mlm_mpi.backend.cpu.library import at, c_draw
from mlm_mpi.backend.registry import Table

KERNELS = Table()


class _Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("b", "h", "t")]


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "heads", "queries", "keys", "width")] + [
        ("causal", ctypes.c_int)
    ]


def _heads_first(x: Any) -> Any:
    return x.swapaxes(1, 2)  # (B, T, H, D) -> (B, H, T, D), a view


def _matrices(*arrays: Any) -> list[_Matrix]:
    return [_Matrix(x.ctypes.data, *(stride // 4 for stride in x.strides[:3])) for x in arrays]


def _fit_attention(
    q: Any, k: Any, v: Any, causal: bool = True, draw: Any = None, lengths: Any = None, others: tuple[Any, ...] = ()
) -> str:
    if lengths is not None:
        return "lengths"
    for x in (q, k, v, *others):
        if not isinstance(x, np.ndarray) or x.ndim != 4:
            return "not in the CPU's memory"
        if x.dtype != np.float32:
            return str(x.dtype)
        if (x.shape[3] > 1 and x.strides[3] != 4) or any(stride % 4 or stride < 0 for stride in x.strides):
            return "not contiguous"
    if 0 in q.shape or 0 in k.shape:
        return "empty"
    if k.shape != v.shape or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        return "shapes differ"
    return "more queries than keys" if causal and q.shape[2] > k.shape[2] else ""


def _attention_arguments(lib: Any, q: Any, k: Any, causal: bool) -> tuple[_Shape, float, Any]:
    batch, heads, queries, width = q.shape
    shape = _Shape(batch, heads, queries, k.shape[2], width, causal)
    return shape, 1.0 / math.sqrt(width), np.empty(lib.attention_work(k.shape[2], width), np.float32)


@KERNELS.kernel("attention.forward", _fit_attention)
def _attention_forward(
    lib: Any, q: Any, k: Any, v: Any, causal: bool = True, draw: Any = None, lengths: None = None
) -> tuple[Any, Any]:
    batch, heads, queries, width = q.shape
    o, lse = np.empty((batch, queries, heads, width), np.float32), np.empty((batch, heads, queries), np.float32)
    shape, scale, work = _attention_arguments(lib, q, k, causal)
    drawn, matrices = c_draw(draw), _matrices(q, k, v, _heads_first(o))
    lib.attention_forward(lib.pointer(shape), lib.pointer(drawn), *map(lib.pointer, matrices), scale, at(lse), at(work))
    return o, lse


def _fit_attention_backward(
    do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dq: Any, dk: Any, dv: Any,
    causal: bool = True, draw: Any = None, lengths: Any = None,
) -> str:  # fmt: skip
    reason = _fit_attention(q, k, v, causal, draw, lengths, (do, o, dq, dk, dv)) or dense(lse)
    batch, heads, queries, width = q.shape
    rows = (batch, queries, heads, width)
    return reason or shaped(rows, do, o) or shaped(q.shape, dq) or shaped(k.shape, dk, dv) or shaped(q.shape[:3], lse)


@KERNELS.kernel("attention.backward", _fit_attention_backward)
def _attention_backward(
    lib: Any, do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dq: Any, dk: Any, dv: Any,
    causal: bool = True, draw: Any = None, lengths: None = None,
) -> None:  # fmt: skip
    shape, scale, work = _attention_arguments(lib, q, k, causal)
    drawn, matrices = c_draw(draw), _matrices(_heads_first(do), q, k, v, _heads_first(o), dq, dk, dv)
    lib.attention_backward(
        lib.pointer(shape), lib.pointer(drawn), *map(lib.pointer, matrices), scale, at(lse), at(work)
    )
