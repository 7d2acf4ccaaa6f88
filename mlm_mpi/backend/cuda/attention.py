"""Launches of flash attention: which of the kernels serve which head widths and types, and their tiles.

A function has two variants: on the tensor cores for bfloat16, and a plain one for everything else.
"""

import math
from typing import Any

import numpy as np

from mlm_mpi.backend.cuda.contracts import ELEMENTS, dense, element, on_device, shaped
from mlm_mpi.backend.kernels import kernel

# attention.cuh: Problem, View
PROBLEM = np.dtype(
    [("lengths", "u8")]
    + [(name, "i4") for name in ("batch", "heads", "queries", "keys", "width", "causal", "group")]
    + [("scale", "f4")],
    align=True,
)
VIEW = np.dtype([("data", "u8"), ("batch", "i8"), ("head", "i8"), ("row", "i8")])

WIDEST = 128
L2_BYTES = 16 << 20  # of keys and values of heads worked on together; an A100 has 40 MiB of L2 cache, an H100 50


def _fit(
    q: Any, k: Any, v: Any, causal: bool = True, draw: Any = None, lengths: Any = None, others: tuple[Any, ...] = ()
) -> str:
    """Why a kernel cannot take these arguments, or "". `others`: more arrays (B, rows, H, D) or (B, H, rows, D)."""
    for x in (q, k, v, *others):
        if not on_device(x) or x.ndim != 4:
            return "not in the GPU's memory"
        if x.dtype.name not in ELEMENTS or x.dtype != q.dtype:
            return str(x.dtype)
        if (x.shape[3] > 1 and x.strides[3] != x.itemsize) or min(x.strides) < 0:
            return "not contiguous"
    if 0 in q.shape or 0 in k.shape:
        return "empty"
    if k.shape != v.shape or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        return "shapes differ"
    if q.shape[3] > WIDEST:
        return f"head width above {WIDEST}"
    if draw is not None:
        return "dropout"
    if lengths is not None and (reason := dense(lengths, dtype=np.int32) or shaped(q.shape[:1], lengths)):
        return f"lengths: {reason}"
    return "more queries than keys" if causal and q.shape[2] > k.shape[2] else ""


def _fit_backward(
    do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dq: Any, dk: Any, dv: Any,
    causal: bool = True, draw: Any = None, lengths: Any = None,
) -> str:  # fmt: skip
    reason = _fit(q, k, v, causal, draw, lengths, (do, o, dq, dk, dv)) or dense(lse, dtype=np.float32)
    batch, heads, queries, width = q.shape
    rows = (batch, queries, heads, width)
    return reason or shaped(rows, do, o) or shaped(q.shape, dq) or shaped(k.shape, dk, dv) or shaped(q.shape[:3], lse)


def _view(x: Any) -> Any:
    """Of an array (B, H, rows, D)."""
    return np.array([(x.data.ptr, *(stride // x.itemsize for stride in x.strides[:3]))], VIEW)


def _heads_first(x: Any) -> Any:
    return x.swapaxes(1, 2)  # (B, T, H, D) -> (B, H, T, D), a view


def _problem(q: Any, k: Any, causal: bool, lengths: Any) -> Any:
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    group = max(1, min(batch * heads, L2_BYTES // (2 * keys * width * k.itemsize)))
    address = 0 if lengths is None else lengths.data.ptr
    return np.array([(address, batch, heads, queries, keys, width, causal, group, 1.0 / math.sqrt(width))], PROBLEM)


def _blocks(q: Any, rows: int, tile: int) -> tuple[int]:
    return (q.shape[0] * q.shape[1] * -(-rows // tile),)


def _outputs(gpu: Any, q: Any) -> tuple[Any, Any]:
    batch, heads, queries, width = q.shape
    o = gpu.cupy.empty((batch, queries, heads, width), q.dtype)
    return o, gpu.cupy.empty((batch, heads, queries), np.float32)


PLAIN_THREADS = 256


def _plain_shape(width: int) -> tuple[int, int, int, int]:
    """HEAD and TILE of attention.cu, and the bytes of a tile of rows and of a tile of scores."""
    head = next(head for head in (32, 64, WIDEST) if width <= head)
    tile = 32 if head > 64 else 64
    return head, tile, 4 * tile * (head + 4), 4 * tile * (tile + 4)


def _delta(gpu: Any, problem: Any, do: Any, o: Any, lse: Any) -> Any:
    """Σ do·o per query, (B, H, T) float32."""
    delta = gpu.cupy.empty(lse.shape, np.float32)
    run = gpu.function("attention", "attention_delta", ELEMENT=element(do), HEAD=32)
    blocks = -(-delta.size // (PLAIN_THREADS // 32))
    run((blocks,), (PLAIN_THREADS,), (problem, _view(_heads_first(do)), _view(_heads_first(o)), delta))
    return delta


@kernel("attention.forward", _fit, device="cuda", variant="plain")
def _plain_forward(
    gpu: Any, q: Any, k: Any, v: Any, causal: bool = True, draw: None = None, lengths: Any = None
) -> tuple[Any, Any]:
    o, lse = _outputs(gpu, q)
    head, tile, rows, scores = _plain_shape(q.shape[3])
    shared = 3 * rows + scores
    run = gpu.function("attention", "attention_forward", shared, ELEMENT=element(q), HEAD=head)
    views = map(_view, (q, k, v, _heads_first(o)))
    arguments = (_problem(q, k, causal, lengths), *views, lse)
    run(_blocks(q, q.shape[2], tile), (PLAIN_THREADS,), arguments, shared_mem=shared)
    return o, lse


@kernel("attention.backward", _fit_backward, device="cuda", variant="plain")
def _plain_backward(
    gpu: Any, do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dq: Any, dk: Any, dv: Any,
    causal: bool = True, draw: None = None, lengths: Any = None,
) -> None:  # fmt: skip
    problem = _problem(q, k, causal, lengths)
    delta = _delta(gpu, problem, do, o, lse)
    head, tile, rows, scores = _plain_shape(q.shape[3])
    inputs = (problem, *map(_view, (_heads_first(do), q, k, v)), lse, delta)
    for name, length, matrices, outputs in (("queries", q.shape[2], 1, (dq,)), ("keys", k.shape[2], 2, (dk, dv))):
        shared = 4 * rows + matrices * scores + 8 * tile
        run = gpu.function("attention", f"attention_backward_{name}", shared, ELEMENT=element(q), HEAD=head)
        arguments = (*inputs, *map(_view, outputs))
        run(_blocks(q, length, tile), (PLAIN_THREADS,), arguments, shared_mem=shared)
