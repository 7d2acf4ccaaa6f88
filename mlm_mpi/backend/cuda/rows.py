"""Launches of the kernels over rows and columns of matrices.

Where rows are summed they are cut into parts by their number alone, never by what a GPU has, so that every GPU gives
the same bits. `pieces` of them are summed each by itself and join in a tree (kernels/cuda/columns.cu).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlm_mpi.backend.cuda.contracts import ELEMENTS, dense, element, on_device, shaped, width
from mlm_mpi.backend.cuda.elementwise import LEAVES, sums_tree
from mlm_mpi.backend.registry import Table

KERNELS = Table()

LANES = 32
ROWS = 8  # warps of a block that share the columns, each with rows of its own
THREADS = 2048  # that fit on a processor
PARTS = 256  # at most, of the rows of a piece: two blocks on each processor of an H100
PART_ROWS = 32  # at the least: four of a warp
MAX_PARTS = 0xFFFF  # of all pieces: a grid's y
SHORT_ROW = 8192  # logits; a longer row gets more warps
MOST_SHARES = 64  # crossentropy.cu
CHUNK = 32  # positions that a warp of embedding_backward sums: as many as it has lanes
CLIP_WARPS = 16  # of a block of elements


def _strips(columns: int, wide: int) -> int:
    return max(1, -(-columns // (LANES * wide)))


def _grid(gpu: Any, rows: int, columns: int, wide: int) -> tuple[int, int]:
    # (strips of columns, blocks that share the rows)
    strips = _strips(columns, wide)
    most = max(1, gpu.processors * THREADS // (LANES * ROWS) // strips)
    return strips, max(1, min(-(-rows // ROWS), most))


@dataclass(frozen=True)
class Cut:
    """Rows cut into `pieces`, each of `rows`, and those into `parts` of `each` rows, of which the last may have fewer.

    The parts of a piece depend on its rows alone: whoever has some of the pieces only sums them in the same order.
    """

    pieces: int
    rows: int
    parts: int
    each: int

    @property
    def blocks(self) -> int:
        """Parts of all pieces."""
        return self.pieces * self.parts


def _cut(rows: int, pieces: int, unit: int = 1) -> Cut:
    # `unit`: rows that stay together
    own = rows // pieces
    each = max(1, -(-own // max(1, min(PARTS, own // PART_ROWS))))
    each = -(-each // unit) * unit
    return Cut(pieces, own, max(1, -(-own // each)), each)


def _fit_pieces(rows: int, pieces: int) -> str:
    if pieces < 1 or rows % pieces:
        return "rows are no whole pieces"
    return "" if _cut(rows, pieces).blocks <= MAX_PARTS else "too many pieces"


# ---- linear


def _fit_bias_gradient(dy: Any, db: Any, accumulate: bool, pieces: int = 1) -> str:
    why = dense(dy) or dense(db, dtype=np.float32) or ("" if dy.ndim == 2 else "no matrix")
    return why or shaped(dy.shape[1:], db) or _fit_pieces(dy.shape[0], pieces)


@KERNELS.kernel("linear.bias_gradient", _fit_bias_gradient)
def _bias_gradient(gpu: Any, dy: Any, db: Any, accumulate: bool, pieces: int = 1) -> None:
    rows, columns = dy.shape
    wide, cut = width(dy, columns=columns), _cut(rows, pieces)
    alone = cut.blocks == 1
    sums = db if alone else gpu.cupy.empty((cut.blocks, columns), db.dtype)
    run = gpu.function("columns", "columns_sum", ELEMENT=element(dy), WIDTH=wide, WARPS=ROWS)
    sizes = (np.int64(cut.rows), np.int64(columns), np.int64(cut.each), np.int32(cut.parts))
    run((_strips(columns, wide), cut.blocks), (LANES, ROWS), (dy, sums, *sizes, np.int32(accumulate and alone)))
    if not alone:
        _add_parts(gpu, sums, cut, (db,), accumulate)


def _add_parts(gpu: Any, sums: Any, cut: Cut, out: tuple[Any, ...], accumulate: bool) -> None:
    # shapes: sums (cut.blocks, len(out) · C), out (C,) each
    columns = out[0].size
    run = gpu.function("columns", "columns_add", ELEMENT="float", WIDTH=1, WARPS=ROWS)
    first, second = (*out, None)[:2]
    numbers = (np.int32(cut.parts), np.int32(cut.pieces), np.int64(columns), np.int32(accumulate))
    run((_strips(columns, 1), len(out)), (LANES, ROWS), (sums, first, second, *numbers))


# ---- layernorm


def _layout(x: Any, gain: Any, *arrays: Any) -> dict[str, Any]:
    """How kernels/cuda/layernorm.cu is compiled for rows of x, or {} where a row is too long.

    A thread of the backward keeps four numbers an element: 16 elements of float32, 24 of bfloat16, which it holds as
    they are stored, or 12 that are loaded one by one need no more than 128 registers (NVRTC 13.0, no spills).
    """
    columns = x.shape[1]
    wide = width(x, gain, *arrays, columns=columns)
    most = 12 if wide == 1 else 16 if x.itemsize == 4 else 24
    for warps in (1, 2, 4, 8, 16):
        packs = max(1, -(-columns // (LANES * warps * wide)))
        if packs * wide <= most:
            shape = {"WIDTH": wide, "PACKS": packs, "WARPS": warps, "ROWS": max(1, ROWS // warps)}
            return {"ELEMENT": element(x), "WEIGHT": element(gain), **shape}
    return {}


def _fit_norm(x: Any, weights: tuple[Any, ...], *arrays: Any) -> str:
    if why := dense(x, *arrays) or dense(*weights) or shaped(x.shape[1:], *weights):
        return why
    if x.ndim != 2:
        return "no matrix"
    return "" if _layout(x, *weights, *arrays) else "rows too long"


def _fit_norm_forward(x: Any, gain: Any, bias: Any, epsilon: float) -> str:
    return _fit_norm(x, (gain, bias))


@KERNELS.kernel("layernorm.forward", _fit_norm_forward)
def _layernorm_forward(gpu: Any, x: Any, gain: Any, bias: Any, epsilon: float) -> tuple[Any, Any]:
    rows, columns = x.shape
    y, statistics = gpu.cupy.empty(x.shape, x.dtype), gpu.cupy.empty((2, rows), np.float32)
    defines = _layout(x, gain, bias)
    block = LANES * defines["WARPS"], defines["ROWS"]
    grid = (max(1, -(-rows // block[1])),)
    arguments = (x, gain, bias, np.float32(epsilon), y, statistics[0], statistics[1], np.int64(rows), np.int32(columns))
    gpu.function("layernorm", "layernorm_forward", **defines)(grid, block, arguments)
    return y, statistics


def _fit_norm_backward(
    dy: Any, x: Any, gain: Any, statistics: Any, dgain: Any, dbias: Any, accumulate: bool, add: Any = None,
    pieces: int = 1,
) -> str:  # fmt: skip
    return (
        _fit_norm(x, (gain,), dy, add) or dense(statistics, dgain, dbias, dtype=np.float32) or shaped(x.shape, dy, add)
        or shaped(x.shape[1:], dgain, dbias) or shaped((2, x.shape[0]), statistics) or _fit_pieces(x.shape[0], pieces)
    )  # fmt: skip


@KERNELS.kernel("layernorm.backward", _fit_norm_backward)
def _layernorm_backward(
    gpu: Any, dy: Any, x: Any, gain: Any, statistics: Any, dgain: Any, dbias: Any, accumulate: bool, add: Any = None,
    pieces: int = 1,
) -> Any:  # fmt: skip
    rows, columns = x.shape
    dx = gpu.cupy.empty(x.shape, x.dtype)
    defines = _layout(x, gain, dy, add)
    cut = _cut(rows, pieces, defines["ROWS"])
    sums = gpu.cupy.empty((cut.blocks, 2 * columns), np.float32)
    sizes = (np.int64(cut.rows), np.int64(cut.each), np.int32(cut.parts), np.int32(columns))
    arguments = (dy, x, gain, statistics[0], statistics[1], add, dx, sums, *sizes)
    block = LANES * defines["WARPS"], defines["ROWS"]
    gpu.function("layernorm", "layernorm_backward", **defines)((cut.blocks,), block, arguments)
    _add_parts(gpu, sums, cut, (dgain, dbias), accumulate)
    return dx


# ---- rmsnorm


@KERNELS.kernel("rmsnorm.forward", lambda x, gain, epsilon: _fit_norm(x, (gain,)))
def _rmsnorm_forward(gpu: Any, x: Any, gain: Any, epsilon: float) -> tuple[Any, Any]:
    rows, columns = x.shape
    y, inverse = gpu.cupy.empty(x.shape, x.dtype), gpu.cupy.empty((rows,), np.float32)
    defines = _layout(x, gain)
    block = LANES * defines["WARPS"], defines["ROWS"]
    arguments = (x, gain, np.float32(epsilon), y, inverse, np.int64(rows), np.int32(columns))
    gpu.function("rmsnorm", "rmsnorm_forward", **defines)((max(1, -(-rows // block[1])),), block, arguments)
    return y, inverse


def _fit_rms_backward(
    dy: Any, x: Any, gain: Any, inverse: Any, dgain: Any, accumulate: bool, add: Any = None, pieces: int = 1
) -> str:
    return (
        _fit_norm(x, (gain,), dy, add) or dense(inverse, dgain, dtype=np.float32) or shaped(x.shape, dy, add)
        or shaped(x.shape[1:], dgain) or shaped(x.shape[:1], inverse) or _fit_pieces(x.shape[0], pieces)
    )  # fmt: skip


@KERNELS.kernel("rmsnorm.backward", _fit_rms_backward)
def _rmsnorm_backward(
    gpu: Any, dy: Any, x: Any, gain: Any, inverse: Any, dgain: Any, accumulate: bool, add: Any = None, pieces: int = 1
) -> Any:
    rows, columns = x.shape
    dx = gpu.cupy.empty(x.shape, x.dtype)
    defines = _layout(x, gain, dy, add)
    cut = _cut(rows, pieces, defines["ROWS"])
    sums = gpu.cupy.empty((cut.blocks, columns), np.float32)
    sizes = (np.int64(cut.rows), np.int64(cut.each), np.int32(cut.parts), np.int32(columns))
    block = LANES * defines["WARPS"], defines["ROWS"]
    arguments = (dy, x, gain, inverse, add, dx, sums, *sizes)
    gpu.function("rmsnorm", "rmsnorm_backward", **defines)((cut.blocks,), block, arguments)
    _add_parts(gpu, sums, cut, (dgain,), accumulate)
    return dx


# ---- rotary

HEADS = np.dtype([(name, "u4") for name in ("heads", "length", "groups", "units", "width", "half")])  # of rotary.cu
STRIDES = np.dtype((np.void, 32))
HEAD_THREADS = 256
MOST_SLOTS = 4  # of a thread, which keeps six numbers an element in the backward


def _turning(cos: Any, *heads: Any) -> dict[str, int]:
    """How rotary.cu is compiled for these heads (B, T, G, U, D): WIDTH elements at a time, LANES threads a head."""
    size, half = heads[0].shape[4], cos.shape[1]
    wide = 16 // heads[0].itemsize
    places = [n for x in heads for n in (x.data.ptr, *x.strides[:4])]
    if half % wide or size % wide or any(place % 16 for place in places) or cos.data.ptr % 16:
        wide = 1
    slots = (size - half) // wide
    lanes = min(LANES, 1 << (slots - 1).bit_length())
    return {"WIDTH": wide, "LANES": lanes, "SLOTS": -(-slots // lanes), "THREADS": HEAD_THREADS}


def _fit_heads(cos: Any, sin: Any, gain: Any, inverse: Any, *heads: Any) -> str:
    """`heads`: arrays (B, T, G, U, D) of one shape and dtype, whose last dim is contiguous; None is left out."""
    present = [x for x in heads if x is not None]
    for x in present:
        if not on_device(x) or x.ndim != 5:
            return "not heads in the GPU's memory"
        if x.dtype != present[0].dtype or x.dtype.name not in ELEMENTS:
            return str(x.dtype)
        if x.size == 0 or x.size >= 1 << 31:
            return "empty, or too many"
        if (x.shape[4] > 1 and x.strides[4] != x.itemsize) or any(stride % x.itemsize for stride in x.strides):
            return "not contiguous"
    shape = present[0].shape
    reason = dense(cos, sin, inverse, dtype=np.float32) or dense(gain) or shaped(shape, *present)
    reason = reason or shaped((2, shape[4]), gain) or shaped(shape[:4], inverse)
    reason = reason or shaped((shape[1], cos.shape[1]), cos, sin)
    if reason or 2 * cos.shape[1] > shape[4]:
        return reason or "a rotation of more than there is"
    return "" if _turning(cos, *present)["SLOTS"] <= MOST_SLOTS else "heads too wide"


def _strides(x: Any) -> Any:
    return np.array([stride // x.itemsize for stride in x.strides[:4]], np.int64).view(STRIDES)


def _turn(gpu: Any, x: Any, cos: Any, sin: Any, sign: int, gain: Any, epsilon: float, y: Any, inverse: Any) -> None:
    defines = _turning(cos, x, y)
    names = {
        "ELEMENT": element(x),
        "WEIGHT": "float" if gain is None else element(gain),
        "NORMAL": int(gain is not None),
    }
    run = gpu.function("rotary", "rotary_forward", **defines, **names)
    heads = x.size // x.shape[4]
    shape = np.array([(heads, *x.shape[1:], cos.shape[1])], HEADS)
    arguments = (x, _strides(x), cos, sin, np.float32(sign), gain, np.float32(epsilon), y, _strides(y), inverse, shape)
    run((-(-heads // (HEAD_THREADS // defines["LANES"])),), (HEAD_THREADS,), arguments)


@KERNELS.kernel(
    "rotary.forward", lambda x, cos, sin, gain=None, epsilon=0.0: _fit_heads(cos, sin, gain, None, x)
)  # fmt: skip
def _rotary_forward(gpu: Any, x: Any, cos: Any, sin: Any, gain: Any = None, epsilon: float = 0.0) -> tuple[Any, Any]:
    y, inverse = gpu.cupy.empty(x.shape, x.dtype), None if gain is None else gpu.cupy.empty(x.shape[:4], np.float32)
    _turn(gpu, x, cos, sin, 1, gain, epsilon, y, inverse)
    return y, inverse


def _fit_rotary_backward(
    dy: Any, x: Any, cos: Any, sin: Any, gain: Any = None, inverse: Any = None, dgain: Any = None,
    accumulate: bool = False, pieces: int = 1, shares: int = 1, out: Any = None,
) -> str:  # fmt: skip
    if gain is None:
        return _fit_heads(cos, sin, None, None, dy, out)
    reason = _fit_heads(cos, sin, gain, inverse, dy, x, out) or dense(dgain, dtype=np.float32)
    reason = reason or shaped(gain.shape, dgain) or _fit_pieces(dy.shape[0] * dy.shape[1], pieces)
    whole = 1 <= shares < LEAVES and dy.shape[2] % shares == 0 and dy.shape[3] > 1
    return reason or ("" if whole else "groups are no whole shares")


@KERNELS.kernel("rotary.backward", _fit_rotary_backward)
def _rotary_backward(
    gpu: Any, dy: Any, x: Any, cos: Any, sin: Any, gain: Any = None, inverse: Any = None, dgain: Any = None,
    accumulate: bool = False, pieces: int = 1, shares: int = 1, out: Any = None,
) -> Any:  # fmt: skip
    dx = gpu.cupy.empty(dy.shape, dy.dtype) if out is None else out
    if gain is None:
        _turn(gpu, dy, cos, sin, -1, None, 0.0, dx, None)
        return dx
    batch, length, groups, _, size = dy.shape
    cut = _cut(batch * length, pieces)
    sums = gpu.cupy.empty((cut.blocks, shares * 2 * size), np.float32)
    defines = {"ELEMENT": element(dy), "WEIGHT": element(gain), **_turning(cos, dy, x, dx)}
    run = gpu.function("rotary_backward", "rotary_backward", **defines)
    shape = np.array([(dy.size // size, *dy.shape[1:], cos.shape[1])], HEADS)
    places = (dy, _strides(dy), x, _strides(x), cos, sin, gain, inverse, dx, _strides(dx))
    sizes = map(np.int32, (cut.rows, cut.each, cut.parts, groups // shares))
    run((cut.blocks, shares, 2), (HEAD_THREADS,), (*places, sums, shape, *sizes))
    if shares == 1:
        _add_parts(gpu, sums, cut, (dgain.reshape(-1),), accumulate)
        return dx
    joined = gpu.cupy.empty((shares, 2, size), np.float32)
    _add_parts(gpu, sums, cut, (joined.reshape(-1),), False)
    leaves, merges = list(joined), [(share + 1 & -(share + 1)).bit_length() - 1 for share in range(shares)]
    merges[-1] = (shares - 1).bit_count()
    if accumulate:  # the whole of the sum is added
        leaves, merges = [dgain, *leaves], [0, *merges[:-1], merges[-1] + 1]
    sums_tree(gpu, leaves, merges, dgain)
    return dx


# ---- crossentropy


def _fit_rows(logits: Any, targets: Any, mask: Any, gradient: bool, shares: int = 1, cap: float = 0.0) -> str:
    if not on_device(logits):
        return "not in the GPU's memory"
    if logits.ndim != 2 or logits.size == 0 or logits.strides[1] != logits.itemsize:
        return "not contiguous"
    if logits.strides[0] < logits.shape[1] * logits.itemsize:
        return "rows overlap"
    if not 1 <= shares <= MOST_SHARES or logits.shape[1] % shares:
        return "columns are no whole shares"
    return (
        dense(logits[:1]) or dense(targets, dtype=np.int32) or dense(mask, dtype=np.bool_)
        or shaped(logits.shape[:1], targets, mask)
    )  # fmt: skip


@KERNELS.kernel("crossentropy.rows", _fit_rows)
def _crossentropy_rows(
    gpu: Any, logits: Any, targets: Any, mask: Any, gradient: bool, shares: int = 1, cap: float = 0.0
) -> Any:
    """A target outside the vocabulary, which only the device can see, makes its loss NaN."""
    rows, columns = logits.shape
    losses = gpu.cupy.empty(rows, np.float64)
    warps = 4 if columns // shares <= SHORT_ROW else 16  # by what is summed, however long the row is
    run = gpu.function("crossentropy", "crossentropy_rows", CAP=int(cap != 0), ELEMENT=element(logits), WARPS=warps)
    stride = np.int64(logits.strides[0] // logits.itemsize)
    sizes = (stride, *map(np.int32, (columns, gradient, shares)), np.float32(cap))
    run((rows,), (LANES * warps,), (logits, targets, mask, losses, *sizes))
    return losses


# ---- embedding


def _fit_lookup(ids: Any, table: Any) -> str:
    return dense(ids, dtype=np.int32) or dense(table) or ("" if table.ndim == 2 else "no matrix")


@KERNELS.kernel("embedding.forward", _fit_lookup)
def _embedding_forward(gpu: Any, ids: Any, table: Any) -> Any:
    """An id outside the table, which only the device can see, gives a row of NaN."""
    vocabulary, columns = table.shape
    out = gpu.cupy.empty((*ids.shape, columns), table.dtype)
    wide = width(table, out, columns=columns)
    run = gpu.function("embedding", "embedding_forward", ELEMENT=element(table), WIDTH=wide)
    sizes = (np.int64(ids.size), np.int32(vocabulary), np.int32(columns))
    run(_grid(gpu, ids.size, columns, wide), (LANES, ROWS), (ids, table, out, *sizes))
    return out


def _fit_scatter(dy: Any, ids: Any, dtable: Any) -> str:
    why = dense(dy) or dense(ids, dtype=np.int32) or dense(dtable, dtype=np.float32)
    dims = "" if (ids.ndim, dtable.ndim) == (1, 2) else "dimensions differ"
    return why or dims or shaped((ids.size, dtable.shape[1]), dy)


@KERNELS.kernel("embedding.backward", _fit_scatter)
def _embedding_backward(gpu: Any, dy: Any, ids: Any, dtable: Any) -> None:
    """Rows of an id outside the table are left out."""
    (count, columns), vocabulary = dy.shape, dtable.shape[0]
    order = gpu.cupy.argsort(ids, kind="stable")
    chunks, wide = max(1, -(-count // CHUNK)), width(dy, dtable, columns=columns)
    parts = gpu.cupy.empty((2, chunks, columns), np.float32)
    grid = (-(-chunks * _strips(columns, wide) // ROWS),)
    sizes = (np.int64(count), np.int32(vocabulary), np.int32(columns))
    defines = {"ELEMENT": element(dy), "WIDTH": wide}
    shared = (ids, order, dtable, parts[0], parts[1], *sizes)
    gpu.function("embedding", "embedding_backward", **defines)(grid, (LANES, ROWS), (dy, *shared))
    gpu.function("embedding", "embedding_join", **defines)(grid, (LANES, ROWS), shared)


# ---- clip


def _fit_squares(x: Any, block: int) -> str:
    if not on_device(x) or x.ndim != 2:
        return dense(x, dtype=np.float32)
    if x.dtype != np.float32:
        return str(x.dtype)
    if x.strides[1] != x.itemsize or x.strides[0] < x.shape[1] * x.itemsize or x.strides[0] % x.itemsize:
        return "not contiguous"
    return "" if x.size < 1 << 31 or len(x) == 1 or x.flags.c_contiguous else "too many elements"  # 32-bit in clip.cu


@KERNELS.kernel("clip.squares", _fit_squares)
def _clip_squares(gpu: Any, x: Any, block: int) -> Any:
    out = gpu.cupy.empty(-(-x.size // block), np.float64)
    columns, pitch = (x.shape[1], x.strides[0] // x.itemsize) if x.ndim == 2 and len(x) > 1 else (x.size, x.size)
    vector = x.data.ptr % 16 == 0 and not any(n % 4 for n in (block, columns, pitch) if n != x.size)
    run = gpu.function("clip", "clip_squares", VECTOR=int(vector), WARPS=CLIP_WARPS)
    if out.size:
        run((out.size,), (LANES * CLIP_WARPS,), (x, out, *map(np.int64, (x.size, block, columns, pitch))))
    return out
