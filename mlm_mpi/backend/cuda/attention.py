"""Launches of flash attention: which of the kernels serve which head widths and types, and their tiles.

Variants, the preferred first: for bfloat16 "hopper" (wgmma and TMA) and "mma" (mma.sync, from compute capability 8.0
on), for everything else "plain".
"""

import math
from typing import Any

import numpy as np

from mlm_mpi.backend.cuda.contracts import ELEMENTS, dense, element, on_device, shaped
from mlm_mpi.backend.cuda.draws import DRAW, drawn
from mlm_mpi.backend.cuda.draws import fit as fit_draw
from mlm_mpi.backend.registry import Table

KERNELS = Table()

# attention.cuh: Problem, View
PROBLEM = np.dtype(
    [("lengths", "u8"), ("starts", "u8")]
    + [(name, "i4") for name in ("starts_batch", "batch", "groups", "heads", "queries", "keys", "width", "causal")]
    + [("close", "i4"), ("share", "i4"), ("scale", "f4"), ("draw", DRAW), ("first", "u8")]
    + [(name, "i8") for name in ("by_batch", "by_head", "by_query")],
    align=True,
)
VIEW = np.dtype([("data", "u8"), ("batch", "i8"), ("group", "i8"), ("head", "i8"), ("row", "i8")])

WIDEST = 128
PADDED = 128  # attention.cuh
STATISTICS_THREADS, STATISTICS_QUERIES = 256, 32  # attention_statistics.cu, a block's
L2_BYTES = 16 << 20  # of keys and values of heads worked on together; an A100 has 40 MiB of L2 cache, an H100 50


def _lacks(gpu: Any) -> str:
    """mma.sync of bfloat16 and cp.async for the one, up to 97 KiB of shared memory a block for the others."""
    return "" if gpu.capability >= (8, 0) else "needs compute capability 8.0"


def _fit(
    q: Any, k: Any, v: Any, causal: bool = True, draw: Any = None, lengths: Any = None, share: int = 0,
    positions: Any = None, starts: Any = None, others: tuple[Any, ...] = (),
) -> str:  # fmt: skip
    """Why a kernel cannot take these arguments, or "". `others`: more arrays (B, rows, H, D) or (B, H, rows, D)."""
    for x in (q, k, v, *others):
        if not on_device(x) or x.ndim not in (4, q.ndim):
            return "not in the GPU's memory"
        if x.dtype.name not in ELEMENTS or x.dtype != q.dtype:
            return str(x.dtype)
        if (x.shape[-1] > 1 and x.strides[-1] != x.itemsize) or min(x.strides) < 0:
            return "not contiguous"
    if 0 in q.shape or 0 in k.shape:
        return "empty"
    if k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[-1]) != (k.shape[0], k.shape[3]):
        return "shapes differ"
    if q.ndim not in (4, 5) or (q.shape[1] % k.shape[1] if q.ndim == 4 else q.shape[1] != k.shape[1]):
        return "heads do not fall into groups"
    batch, (queries, width) = q.shape[0], q.shape[-2:]
    if width > WIDEST:
        return f"head width above {WIDEST}"
    if lengths is not None and (reason := dense(lengths, dtype=np.int32) or shaped((batch,), lengths)):
        return f"lengths: {reason}"
    if starts is not None and (reason := dense(starts, dtype=np.int32) or shaped((len(starts), queries), starts)):
        return f"starts: {reason}"
    if starts is not None and len(starts) not in (1, batch):
        return "starts: shapes differ"
    if reason := fit_draw(draw, (batch, _heads(q), queries, k.shape[2])):
        return reason
    offset = k.shape[2] - queries
    if positions not in (None, (offset, 0)):
        return "positions of a ring"
    if _in_shares(k, share) and offset < 0:
        return "positions in shares, more queries than keys"
    return "more queries than keys" if (causal or starts is not None) and offset < 0 else ""


def _fit_backward(
    do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dq: Any, dk: Any, dv: Any,
    causal: bool = True, draw: Any = None, lengths: Any = None, share: int = 0,
    positions: Any = None, starts: Any = None,
) -> str:  # fmt: skip
    arrays = (do, o, dq, dk, dv)
    reason = _fit(q, k, v, causal, draw, lengths, share, positions, starts, arrays) or dense(lse, dtype=np.float32)
    if reason:
        return reason
    batch, heads, (queries, width) = q.shape[0], _heads(q), q.shape[-2:]
    rows = (batch, queries, heads, width)
    lines = shaped(rows, do, o) or shaped((batch, heads, queries), lse)
    return lines or shaped(q.shape, dq) or shaped(k.shape, dk, dv)


def _heads(q: Any) -> int:
    return q.shape[1] if q.ndim == 4 else q.shape[1] * q.shape[2]


def _view(x: Any, head: int, group: int) -> Any:
    strides = (x.strides[0], group, head, x.strides[-2])
    return np.array([(x.data.ptr, *(stride // x.itemsize for stride in strides))], VIEW)


def _views(*arrays: Any) -> list[Any]:
    """Of arrays of queries (B, H, rows, D), or (B, G, heads of a group, rows, D)."""
    return [
        _view(x, x.strides[-3], x.strides[1] - x.shape[2] * x.strides[2] if x.ndim == 5 else 0) for x in arrays
    ]  # fmt: skip


def _key_views(*arrays: Any) -> list[Any]:
    """Of arrays of keys (B, G, rows, D)."""
    return [_view(x, 0, x.strides[1]) for x in arrays]


def _heads_first(x: Any) -> Any:
    return x.swapaxes(1, 2)  # (B, T, H, D) -> (B, H, T, D), a view


def _problem(q: Any, k: Any, causal: bool, draw: Any, lengths: Any, share: int = 0, starts: Any = None) -> Any:
    (batch, groups, keys, width), heads, queries = k.shape, _heads(q), q.shape[-2]
    close = max(1, min(batch * groups, L2_BYTES // (2 * keys * width * k.itemsize)))
    addresses = (0 if x is None else x.data.ptr for x in (lengths, starts))
    by_row = queries if starts is not None and len(starts) > 1 else 0
    numbers = (by_row, batch, groups, heads // groups, queries, keys, width, causal, close, share or keys)
    first, by = (0, (0, 0, 0)) if draw is None else (draw.start, draw.along((batch, heads, queries, keys))[:3])
    return np.array([(*addresses, *numbers, 1.0 / math.sqrt(width), drawn(draw)[0], first, *by)], PROBLEM)


def _blocks(batch: int, heads: int, rows: int, tile: int) -> tuple[int]:
    return (batch * heads * -(-rows // tile),)


def _blocks_of(q: Any, tile: int) -> tuple[int]:
    return _blocks(q.shape[0], _heads(q), q.shape[-2], tile)


def _outputs(gpu: Any, q: Any) -> tuple[Any, Any]:
    batch, heads, (queries, width) = q.shape[0], _heads(q), q.shape[-2:]
    o = gpu.cupy.empty((batch, queries, heads, width), q.dtype)
    return o, gpu.cupy.empty((batch, heads, queries), np.float32)


def _in_pieces(x: Any) -> bool:
    """Whether the rows of (…, rows, D) are whole pieces of 16 bytes, at addresses that are multiples of 16."""
    return x.shape[-1] * x.itemsize % 16 == 0 and not any(n % 16 for n in (x.data.ptr, *x.strides[:-1]))


def _statistics(gpu: Any, problem: Any, do: Any, o: Any, lse: Any) -> Any:
    """Of every query the log-sum-exp in base 2 and Σ do·o: (B, H, T rounded up, 2) float32."""
    batch, heads, queries = lse.shape
    statistics = gpu.cupy.empty((batch, heads, -(-queries // PADDED) * PADDED, 2), np.float32)
    do, o = _heads_first(do), _heads_first(o)
    pack = 16 // do.itemsize if _in_pieces(do) and _in_pieces(o) else 1
    run = gpu.function("attention_statistics", "attention_statistics", ELEMENT=element(do), PACK=pack)
    blocks = statistics.size // 2 // STATISTICS_QUERIES
    run((blocks,), (STATISTICS_THREADS,), (problem, *_views(do, o), lse, statistics))
    return statistics


# ---- tensor cores: what both variants ask for


def _fit_tiles(*arrays: Any) -> str:
    for x in arrays:
        if x.dtype.name != "bfloat16":
            return str(x.dtype)
        if not _in_pieces(x):
            return "rows are not in whole pieces of 16 bytes"
    return ""


def _in_shares(k: Any, share: int) -> bool:
    return 0 < share < k.shape[2]


def _fit_one_share(k: Any, share: int) -> str:
    return "positions in shares" if _in_shares(k, share) else ""


def _fit_mma(
    q: Any, k: Any, v: Any, causal: bool = True, draw: Any = None, lengths: Any = None, share: int = 0,
    positions: Any = None, starts: Any = None,
) -> str:  # fmt: skip
    return (
        _fit(q, k, v, causal, draw, lengths, share, positions, starts)
        or _fit_tiles(q, k, v)
        or _fit_one_share(k, share)
    )


def _fit_mma_backward(
    do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dq: Any, dk: Any, dv: Any,
    causal: bool = True, draw: Any = None, lengths: Any = None, share: int = 0,
    positions: Any = None, starts: Any = None,
) -> str:  # fmt: skip
    reason = _fit_backward(do, q, k, v, o, lse, dq, dk, dv, causal, draw, lengths, share, positions, starts)
    return reason or _fit_tiles(do, q, k, v, dq, dk, dv) or _fit_one_share(k, share)


def _head(width: int) -> int:
    return 64 if width <= 64 else WIDEST


# ---- Hopper

HOPPER_THREADS = 384
HOPPER_ROWS = 64  # of a warpgroup that multiplies; a block has two
HOPPER_OWNED = 128
HOPPER_KEYS = 128


def _lacks_hopper(gpu: Any) -> str:
    return "" if gpu.capability == (9, 0) else "needs compute capability 9.0"


def _fit_plain_heads(q: Any, k: Any, draw: Any, starts: Any) -> str:
    if draw is not None:
        return "dropout"
    if starts is not None:
        return "first visible keys"
    return "" if q.shape[1] == k.shape[1] and q.ndim == 4 else "queries in groups"


def _fit_hopper(
    q: Any, k: Any, v: Any, causal: bool = True, draw: Any = None, lengths: Any = None, share: int = 0,
    positions: Any = None, starts: Any = None,
) -> str:  # fmt: skip
    return _fit_mma(q, k, v, causal, draw, lengths, share, positions, starts) or _fit_plain_heads(q, k, draw, starts)


def _fit_hopper_backward(
    do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dq: Any, dk: Any, dv: Any,
    causal: bool = True, draw: Any = None, lengths: Any = None, share: int = 0,
    positions: Any = None, starts: Any = None,
) -> str:  # fmt: skip
    reason = _fit_mma_backward(do, q, k, v, o, lse, dq, dk, dv, causal, draw, lengths, share, positions, starts)
    return reason or _fit_plain_heads(q, k, draw, starts)


def _map(gpu: Any, x: Any, rows: int = HOPPER_ROWS) -> Any:
    """For tiles of `rows` rows, and 64 columns at a time, of an array (B, H, rows, D)."""
    return gpu.tensor_map(x, (1, 1, rows, 64))


@KERNELS.kernel("attention.forward", _fit_hopper, variant="hopper", lacks=_lacks_hopper)
def _hopper_forward(
    gpu: Any, q: Any, k: Any, v: Any, causal: bool = True, draw: Any = None, lengths: Any = None, share: int = 0,
    positions: Any = None, starts: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    o, lse = _outputs(gpu, q)
    head = _head(q.shape[3])
    stages = 4 if head == 64 else 2
    shared = 2 * head * (HOPPER_OWNED + 2 * stages * HOPPER_KEYS)
    run = gpu.function("attention_hopper", "attention_forward", shared, ELEMENT="bf16", HEAD=head)
    inputs = (_map(gpu, q), _map(gpu, k, HOPPER_KEYS), _map(gpu, v, HOPPER_KEYS))
    arguments = (_problem(q, k, causal, draw, lengths), *inputs, _map(gpu, _heads_first(o)), lse)
    run(_blocks_of(q, HOPPER_OWNED), (HOPPER_THREADS,), arguments, shared_mem=shared)
    return o, lse


@KERNELS.kernel("attention.backward", _fit_hopper_backward, variant="hopper", lacks=_lacks_hopper)
def _hopper_backward(
    gpu: Any, do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dq: Any, dk: Any, dv: Any,
    causal: bool = True, draw: Any = None, lengths: Any = None, share: int = 0,
    positions: Any = None, starts: Any = None,
) -> None:  # fmt: skip
    problem = _problem(q, k, causal, draw, lengths)
    statistics = _statistics(gpu, problem, do, o, lse)
    head, slopes, stages = _head(q.shape[3]), _heads_first(do), 4

    def run(name: str, rows: int, streamed: int, arguments: tuple[Any, ...]) -> None:
        shared = 4 * head * (HOPPER_OWNED + stages * streamed) + 8 * stages * HOPPER_ROWS
        launch = gpu.function("attention_hopper_backward", name, shared, ELEMENT="bf16", HEAD=head)
        blocks = _blocks(q.shape[0], q.shape[1], rows, HOPPER_OWNED)
        launch(blocks, (HOPPER_THREADS,), (problem, *arguments), shared_mem=shared)

    keys = 128 if head == 64 else 64
    inputs = (_map(gpu, slopes), _map(gpu, q), _map(gpu, k, keys), _map(gpu, v, keys), statistics)
    run("attention_backward_queries", q.shape[2], keys, (*inputs, _map(gpu, dq)))
    rows = statistics.reshape(-1, 2 * statistics.shape[2])
    inputs = (*inputs[:2], _map(gpu, k), _map(gpu, v), gpu.tensor_map(rows, (1, 2 * HOPPER_ROWS), 0))
    run("attention_backward_keys", k.shape[2], HOPPER_ROWS, (*inputs, _map(gpu, dk), _map(gpu, dv)))


# ---- mma.sync

MMA_THREADS = 128  # attention_bf16.cu
MMA_OWNED = 128  # rows of a block of attention_bf16_backward.cu


def _mma_kind(draw: Any, starts: Any) -> dict[str, int]:
    return {"DROPOUT": int(draw is not None), "STARTS": int(starts is not None)}


@KERNELS.kernel("attention.forward", _fit_mma, variant="mma", lacks=_lacks)
def _mma_forward(
    gpu: Any, q: Any, k: Any, v: Any, causal: bool = True, draw: Any = None, lengths: Any = None, share: int = 0,
    positions: Any = None, starts: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    o, lse = _outputs(gpu, q)
    head, kind = _head(q.shape[-1]), _mma_kind(draw, starts)
    queries, keys = 64 if any(kind.values()) else 128, 64 if head == 64 else 48
    shared = 2 * head * (queries + 2 * keys)
    run = gpu.function("attention_bf16", "attention_forward", shared, ELEMENT="bf16", HEAD=head, **kind)
    views = (*_views(q), *_key_views(k, v), *_views(_heads_first(o)))
    arguments = (_problem(q, k, causal, draw, lengths, 0, starts), *views, lse)
    run(_blocks_of(q, queries), (MMA_THREADS,), arguments, shared_mem=shared)
    return o, lse


@KERNELS.kernel("attention.backward", _fit_mma_backward, variant="mma", lacks=_lacks)
def _mma_backward(
    gpu: Any, do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dq: Any, dk: Any, dv: Any,
    causal: bool = True, draw: Any = None, lengths: Any = None, share: int = 0,
    positions: Any = None, starts: Any = None,
) -> None:  # fmt: skip
    problem = _problem(q, k, causal, draw, lengths, 0, starts)
    statistics = _statistics(gpu, problem, do, o, lse)
    head, kind = _head(q.shape[-1]), _mma_kind(draw, starts)
    threads, streamed = 256 if any(kind.values()) or head > 64 else 128, 64 if head == 64 else 32
    shared = 4 * head * (MMA_OWNED + 2 * streamed) + 16 * streamed
    inputs = (problem, *_views(_heads_first(do), q), *_key_views(k, v), statistics)
    for name, x, outputs in (("queries", q, _views(dq)), ("keys", k, _key_views(dk, dv))):
        run = gpu.function(
            "attention_bf16_backward", f"attention_backward_{name}", shared, ELEMENT="bf16", HEAD=head, **kind
        )
        arguments = (*inputs, *outputs)
        run(_blocks_of(x, MMA_OWNED), (threads,), arguments, shared_mem=shared)


# ---- everything else

PLAIN_THREADS = 256


def _plain_shape(width: int) -> tuple[int, int, int, int]:
    """HEAD and TILE of attention.cu, and the bytes of a tile of rows and of a tile of scores."""
    head = next(head for head in (32, 64, WIDEST) if width <= head)
    tile = 32 if head > 64 else 64
    return head, tile, 4 * tile * (head + 4), 4 * tile * (tile + 4)


@KERNELS.kernel("attention.forward", _fit, variant="plain", lacks=_lacks)
def _plain_forward(
    gpu: Any, q: Any, k: Any, v: Any, causal: bool = True, draw: Any = None, lengths: Any = None, share: int = 0,
    positions: Any = None, starts: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    o, lse = _outputs(gpu, q)
    head, tile, rows, scores = _plain_shape(q.shape[-1])
    shared = 3 * rows + scores
    run = gpu.function(
        "attention", "attention_forward", shared, ELEMENT=element(q), HEAD=head, DROPOUT=int(draw is not None),
        SHARED=int(_in_shares(k, share)),
    )  # fmt: skip
    views = (*_views(q), *_key_views(k, v), *_views(_heads_first(o)))
    arguments = (_problem(q, k, causal, draw, lengths, share, starts), *views, lse)
    run(_blocks_of(q, tile), (PLAIN_THREADS,), arguments, shared_mem=shared)
    return o, lse


@KERNELS.kernel("attention.backward", _fit_backward, variant="plain", lacks=_lacks)
def _plain_backward(
    gpu: Any, do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dq: Any, dk: Any, dv: Any,
    causal: bool = True, draw: Any = None, lengths: Any = None, share: int = 0,
    positions: Any = None, starts: Any = None,
) -> None:  # fmt: skip
    problem = _problem(q, k, causal, draw, lengths, share, starts)
    statistics = _statistics(gpu, problem, do, o, lse)
    head, tile, rows, scores = _plain_shape(q.shape[-1])
    inputs = (problem, *_views(_heads_first(do), q), *_key_views(k, v), statistics)
    shared = 4 * rows + scores + 8 * tile
    for name, x, outputs in (("queries", q, _views(dq)), ("keys", k, _key_views(dk, dv))):
        run = gpu.function(
            "attention", f"attention_backward_{name}", shared, ELEMENT=element(q), HEAD=head,
            DROPOUT=int(draw is not None), SHARED=int(_in_shares(k, share)),
        )  # fmt: skip
        arguments = (*inputs, *outputs)
        run(_blocks_of(x, tile), (PLAIN_THREADS,), arguments, shared_mem=shared)
