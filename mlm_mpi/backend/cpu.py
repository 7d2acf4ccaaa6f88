"""The CPU kernels: finds and loads the shared library built from `kernels/cpu`, and registers its functions.

The library needs no Python headers and no NumPy; ctypes calls it, and lets go of the interpreter lock
meanwhile. Its functions carry their dispatch level as a suffix: `gelu_forward_avx2`.
"""

import ctypes
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mlm_mpi.backend.kernels import LEVELS, kernel
from mlm_mpi.errors import ConfigError

LIBRARY_VARIABLE = "MLM_MPI_CPU_LIBRARY"  # another build of the library, for example with sanitizers
BF16_VARIABLE = "MLM_MPI_BF16"  # "portable": bf16 products in plain C, for tests: the same bits, far slower
BF16_LEVEL = "avx512bf16"  # has products and nothing else

_FLOAT32 = np.dtype(np.float32)
_TYPES = {"n": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float, "p": ctypes.c_void_p}
_SIGNATURES = {
    "adamw_update": "npppp" + 9 * "f",
    "attention_backward": 10 * "p" + "fpp",
    "attention_forward": 6 * "p" + "fpp",
    "attention_work": "nn",
    "clip_squares": "nnpp",
    "crossentropy_rows": "nnpppip",
    "dropout_forward": "nppnpp",
    "dropout_mask": "npnp",
    "embedding_backward": "nnppp",
    "embedding_forward": "nnppp",
    "gelu_backward": "nppp",
    "gelu_forward": "npp",
    "layernorm_backward": "nn" + 9 * "p" + "ip",
    "layernorm_forward": "nnpppfppp",
    "linear_bias_gradient": "nnppi",
    "matmul_bf16": "pp",
    "matmul_float32": "pp",
    "matmul_work": "nnn",
    "sums_tree": "nnppp",
}


class Library:
    """The functions of one dispatch level as attributes; arguments are numbers and addresses."""

    def __init__(self, handle: ctypes.CDLL, level: str, threads: int) -> None:
        self.handle = handle
        for name in _SIGNATURES:
            setattr(self, name, _function(handle, name, level))
        self.multiply = self.matmul_float32
        self.multiply_work = self.matmul_work
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads, "products") if threads > 1 else None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def _function(handle: ctypes.CDLL, name: str, level: str) -> Any:
    function = getattr(handle, f"{name}_{level}")
    function.argtypes = [_TYPES[letter] for letter in _SIGNATURES[name]]
    function.restype = ctypes.c_int64 if name.endswith("_work") else None
    return function


def _library_path() -> str | None:
    return os.environ.get(LIBRARY_VARIABLE) or next(map(str, Path(__file__).parent.glob("_cpu*.so")), None)


def runs(level: str) -> bool:
    """Whether there is a library and this CPU can run its functions of that level."""
    path = _library_path()
    return path is not None and bool(ctypes.CDLL(path).level_available(level.encode()))


def load(level: str, threads: int = 1) -> tuple[str, Library | None, str]:
    """(level, library, "") or ("off", None, why not). Raises ConfigError for a level this CPU lacks."""
    if level == "off":
        return "off", None, "kernels are switched off"
    path = _library_path()
    if path is None:
        return "off", None, "no compiled library: install again with a C compiler (gcc or clang) at hand"
    try:
        handle = ctypes.CDLL(path)
        available = [name for name in LEVELS if handle.level_available(name.encode())]
    except (OSError, AttributeError) as error:
        return "off", None, f"{path} cannot be loaded ({error}): install again"
    if level not in ("auto", *available):
        raise ConfigError(f"numerics.level = {level!r} is not among what this CPU runs: {', '.join(available)}, auto")
    chosen = available[-1] if level == "auto" else level
    try:
        return chosen, Library(handle, chosen, threads), ""
    except AttributeError as error:
        return "off", None, f"{path} is of another version ({error}): install again"


def take_bf16(library: Library | None, level: str) -> str:
    """Lets the library's products round their operands to bf16; says how. Raises ConfigError where nothing can."""
    wanted = 'numerics.products = "bf16"'
    if library is None:
        raise ConfigError(f'{wanted} needs the C kernels, and there are none here: set numerics.products = "float32"')
    if os.environ.get(BF16_VARIABLE) == "portable":
        library.multiply = library.matmul_bf16
        return f"bf16 products in plain C, {BF16_VARIABLE}=portable"
    if not library.handle.level_available(BF16_LEVEL.encode()):
        raise ConfigError(
            f"{wanted} needs a CPU with AVX512-BF16 (Cooper Lake, Sapphire Rapids, Zen 4 or later), and this one has "
            'none: set numerics.products = "float32"'
        )
    library.multiply = _function(library.handle, "matmul_bf16", BF16_LEVEL)
    library.multiply_work = _function(library.handle, "matmul_work", BF16_LEVEL)
    return f"bf16 products by {BF16_LEVEL}"


# ---- contracts: the reason why arguments do not fit, or ""


def dense(*arrays: Any, dtype: Any = np.float32) -> str:
    """Every array (None is left out) lies in this machine's memory, C-contiguous and aligned, of that dtype."""
    for array in arrays:
        if array is None:
            continue
        if not isinstance(array, np.ndarray):
            return "not in the CPU's memory"
        if array.dtype != dtype:
            return str(array.dtype)
        if not (array.flags.c_contiguous and array.flags.aligned):
            return "not contiguous"
    return ""


def shaped(shape: tuple[int, ...], *arrays: Any) -> str:
    """Every array (None is left out) has that shape: nothing is broadcast."""
    return "" if all(a is None or a.shape == shape for a in arrays) else "shapes differ"


def within(ids: Any, stop: int) -> str:
    """Dense int32 in [0, stop)."""
    inside = ids.size == 0 or 0 <= ids.min() <= ids.max() < stop
    return dense(ids, dtype=np.int32) or ("" if inside else "out of bounds")


def _at(array: Any) -> int | None:
    return None if array is None else array.ctypes.data


# ---- matmul, linear


_Product = ctypes.c_int64 * 16  # struct product of kernels/cpu/product.h, flat


def _plane(x: np.ndarray | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.ctypes.data, x.strides[0] // 4, x.strides[1] // 4)


def _multiply(lib: Any, a: Any, b: Any, c: Any, base: Any = None, bias: Any = None) -> None:
    """c = bias + base + a b, its rows shared out among threads: which one computes a row does not enter its bits."""
    parts = max(1, min(lib.threads, a.shape[0] // LEAST_ROWS))
    edges = [a.shape[0] * part // parts for part in range(parts + 1)]

    def multiply(first: int, stop: int) -> None:
        rows = slice(first, stop)
        _multiply_rows(lib, a[rows], b, c[rows], None if base is None else base[rows], bias)

    if parts == 1:
        _multiply_rows(lib, a, b, c, base, bias)
    else:
        list(lib.pool.map(multiply, edges[:-1], edges[1:]))


def _multiply_rows(lib: Any, a: Any, b: Any, c: Any, base: Any, bias: Any) -> None:
    (m, k), n = a.shape, b.shape[1]
    product = _Product(m, n, k, *_plane(a), *_plane(b), *_plane(c), *_plane(base), _at(bias) or 0)
    work = np.empty(lib.multiply_work(m, n, k), np.float32)
    lib.multiply(_pointer(product), _at(work))


LEAST_ROWS = 96  # a band of kernels/cpu/product.h: every thread packs the right factor for itself
ONE_ROW = "one row: NumPy's gemv reads b without packing it"  # up to 3 × as fast (LOG.md, 2026-11-23)


def matrices(*arrays: Any) -> str:
    """Every array (None is left out) is a float32 matrix with something in it; any strides of whole elements."""
    for x in arrays:
        if x is None:
            continue
        if not isinstance(x, np.ndarray) or x.ndim != 2:
            return "not matrices in the CPU's memory"
        if x.dtype != _FLOAT32:
            return str(x.dtype)
        if x.size == 0:
            return "empty"
        if (x.strides[0] | x.strides[1] | x.ctypes.data) % 4:
            return "not aligned"
    return ""


def rowwise(x: Any) -> str:
    """Rows of a matrix, or None, are contiguous and do not overlap."""
    return "" if x is None or (x.strides[1] == 4 and x.strides[0] >= 4 * x.shape[1]) else "not contiguous"


def chained(a: Any, b: Any) -> str:
    """A product a b exists, and is not one of a single row."""
    return ONE_ROW if a.shape[0] == 1 else shaped(b.shape[:1], a[0])


def _fit_matmul(a: Any, b: Any, out: Any, accumulate: bool) -> str:
    return matrices(a, b, out) or rowwise(out) or chained(a, b) or shaped((a.shape[0], b.shape[1]), out)


@kernel("matmul.add", _fit_matmul)
def _matmul_add(lib: Any, a: Any, b: Any, out: Any, accumulate: bool) -> None:
    _multiply(lib, a, b, out, base=out if accumulate else None)


def _fit_linear(x: Any, w: Any, b: Any, residual: Any = None) -> str:
    return matrices(x, w, residual) or rowwise(residual) or dense(b) or (
        chained(x, w) or shaped((x.shape[0], w.shape[1]), residual) or shaped(w.shape[1:], b)
    )  # fmt: skip


@kernel("linear.forward", _fit_linear)
def _linear_forward(lib: Any, x: Any, w: Any, b: Any, residual: Any = None) -> Any:
    y = np.empty((x.shape[0], b.size), np.float32)
    _multiply(lib, x, w, y, base=residual, bias=b)
    return y


@kernel("linear.bias_gradient", lambda dy, db, accumulate: dense(dy, db) or shaped(dy.shape[1:], db))
def _bias_gradient(lib: Any, dy: Any, db: Any, accumulate: bool) -> None:
    lib.linear_bias_gradient(*dy.shape, _at(dy), _at(db), accumulate)


# ---- gelu, layernorm


@kernel("gelu.forward", dense)
def _gelu_forward(lib: Any, x: Any) -> Any:
    y = np.empty_like(x)
    lib.gelu_forward(x.size, _at(x), _at(y))
    return y


@kernel("gelu.backward", lambda dy, x, out=None: dense(dy, x, out) or shaped(x.shape, dy, out))
def _gelu_backward(lib: Any, dy: Any, x: Any, out: Any = None) -> Any:
    dx = np.empty_like(x) if out is None else out
    lib.gelu_backward(x.size, _at(dy), _at(x), _at(dx))
    return dx


def _fit_norm(x: Any, gain: Any, bias: Any, epsilon: float) -> str:
    return dense(x, gain, bias) or shaped(x.shape[1:], gain, bias)


@kernel("layernorm.forward", _fit_norm)
def _layernorm_forward(lib: Any, x: Any, gain: Any, bias: Any, epsilon: float) -> tuple[Any, Any]:
    y, statistics = np.empty_like(x), np.empty((2, x.shape[0]), np.float32)
    lib.layernorm_forward(
        *x.shape, _at(x), _at(gain), _at(bias), epsilon, _at(y), _at(statistics[0]), _at(statistics[1])
    )
    return y, statistics


def _fit_norm_backward(
    dy: Any, x: Any, gain: Any, statistics: Any, dgain: Any, dbias: Any, accumulate: bool, add: Any = None
) -> str:
    return dense(dy, x, gain, statistics, dgain, dbias, add) or shaped(x.shape, dy, add) or (
        shaped(x.shape[1:], gain, dgain, dbias) or shaped((2, x.shape[0]), statistics)
    )  # fmt: skip


@kernel("layernorm.backward", _fit_norm_backward)
def _layernorm_backward(
    lib: Any, dy: Any, x: Any, gain: Any, statistics: Any, dgain: Any, dbias: Any, accumulate: bool, add: Any = None
) -> Any:
    dx, work = np.empty_like(x), np.empty(4 * x.shape[1], np.float32)
    lib.layernorm_backward(
        *x.shape, _at(dy), _at(x), _at(gain), _at(statistics[0]), _at(statistics[1]), _at(add), _at(dx), _at(dgain),
        _at(dbias), accumulate, _at(work),
    )  # fmt: skip
    return dx


# ---- dropout, attention


class _Draw(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("key0", "key1", "step", "micro_batch")] + [
        (name, ctypes.c_float) for name in ("rate", "factor")
    ]


def _draw(draw: Any) -> Any:
    if draw is None:
        return None
    low = 0xFFFFFFFF
    return _Draw(*draw.key, draw.step & low, draw.micro_batch & low, draw.rate, 1.0 / (1.0 - draw.rate))


def _pointer(structure: Any) -> int | None:
    return None if structure is None else ctypes.addressof(structure)


def _fit_mask(draw: Any, shape: tuple[int, ...], start: int, dtype: Any, xp: Any = np) -> str:
    if xp is not np:
        return "not in the CPU's memory"
    return "" if np.dtype(dtype) == np.float32 else str(np.dtype(dtype))


@kernel("dropout.mask", _fit_mask)
def _dropout_mask(lib: Any, draw: Any, shape: tuple[int, ...], start: int, dtype: Any, xp: Any = np) -> Any:
    out, drawn = np.empty(shape, np.float32), _draw(draw)
    lib.dropout_mask(out.size, _pointer(drawn), start, _at(out))
    return out


@kernel("dropout.forward", lambda x, draw, residual=None: dense(x, residual) or shaped(x.shape, residual))
def _dropout_forward(lib: Any, x: Any, draw: Any, residual: Any = None) -> Any:
    y, drawn = np.empty_like(x), _draw(draw)
    lib.dropout_forward(x.size, _at(x), _pointer(drawn), 0, _at(residual), _at(y))
    return y


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


@kernel("attention.forward", _fit_attention)
def _attention_forward(
    lib: Any, q: Any, k: Any, v: Any, causal: bool = True, draw: Any = None, lengths: None = None
) -> tuple[Any, Any]:
    batch, heads, queries, width = q.shape
    o, lse = np.empty((batch, queries, heads, width), np.float32), np.empty((batch, heads, queries), np.float32)
    shape, scale, work = _attention_arguments(lib, q, k, causal)
    drawn, matrices = _draw(draw), _matrices(q, k, v, _heads_first(o))
    lib.attention_forward(_pointer(shape), _pointer(drawn), *map(_pointer, matrices), scale, _at(lse), _at(work))
    return o, lse


def _fit_attention_backward(
    do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dq: Any, dk: Any, dv: Any,
    causal: bool = True, draw: Any = None, lengths: Any = None,
) -> str:  # fmt: skip
    reason = _fit_attention(q, k, v, causal, draw, lengths, (do, o, dq, dk, dv)) or dense(lse)
    batch, heads, queries, width = q.shape
    rows = (batch, queries, heads, width)
    return reason or shaped(rows, do, o) or shaped(q.shape, dq) or shaped(k.shape, dk, dv) or shaped(q.shape[:3], lse)


@kernel("attention.backward", _fit_attention_backward)
def _attention_backward(
    lib: Any, do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dq: Any, dk: Any, dv: Any,
    causal: bool = True, draw: Any = None, lengths: None = None,
) -> None:  # fmt: skip
    shape, scale, work = _attention_arguments(lib, q, k, causal)
    drawn, matrices = _draw(draw), _matrices(_heads_first(do), q, k, v, _heads_first(o), dq, dk, dv)
    lib.attention_backward(_pointer(shape), _pointer(drawn), *map(_pointer, matrices), scale, _at(lse), _at(work))


# ---- embedding, crossentropy


@kernel("embedding.forward", lambda ids, table: dense(table) or within(ids, table.shape[0]))
def _embedding_forward(lib: Any, ids: Any, table: Any) -> Any:
    out = np.empty((*ids.shape, table.shape[1]), np.float32)
    lib.embedding_forward(ids.size, table.shape[1], _at(ids), _at(table), _at(out))
    return out


def _fit_scatter(dy: Any, ids: Any, dtable: Any) -> str:
    return dense(dy, dtable) or within(ids, dtable.shape[0]) or shaped((ids.size, dtable.shape[1]), dy)


@kernel("embedding.backward", _fit_scatter)
def _embedding_backward(lib: Any, dy: Any, ids: Any, dtable: Any) -> None:
    lib.embedding_backward(*dy.shape, _at(dy), _at(ids), _at(dtable))


def _fit_rows(logits: Any, targets: Any, mask: Any, gradient: bool) -> str:
    return (
        dense(logits) or within(targets, logits.shape[1]) or dense(mask, dtype=np.bool_)
        or shaped(logits.shape[:1], targets, mask)
    )  # fmt: skip


@kernel("crossentropy.rows", _fit_rows)
def _crossentropy_rows(lib: Any, logits: Any, targets: Any, mask: Any, gradient: bool) -> Any:
    losses = np.empty(logits.shape[0])
    lib.crossentropy_rows(*logits.shape, _at(logits), _at(targets), _at(mask), gradient, _at(losses))
    return losses


# ---- sums


def _fit_sums(leaves: Any, merges: Any, out: Any) -> str:
    height = highest = 0
    for count in merges:
        height += 1
        highest = max(highest, height)
        height -= count
        if count < 0 or height < 1:
            return "no tree"
    if len(merges) != len(leaves) or height != 1 or highest > 32:  # HEIGHT of kernels/cpu/sums.c
        return "no tree of at most 31 levels"
    return dense(*leaves, out) or shaped(out.shape, *leaves)


@kernel("sums.tree", _fit_sums)
def _sums_tree(lib: Any, leaves: Any, merges: Any, out: Any) -> None:
    addresses, counts = (ctypes.c_void_p * len(leaves))(*map(_at, leaves)), (ctypes.c_int32 * len(leaves))(*merges)
    lib.sums_tree(out.size, len(leaves), _pointer(addresses), _pointer(counts), _at(out))


# ---- adamw, clip


def _fit_adamw(
    p: Any, g: Any, m: Any, v: Any, scale: float, beta1: float, beta2: float,
    root: float, epsilon: float, rate: float, shrink: float, working: Any = None,
) -> str:  # fmt: skip
    return "working copy" if working is not None else dense(p, g, m, v) or shaped(p.shape, g, m, v)


@kernel("adamw.update", _fit_adamw)
def _adamw_update(
    lib: Any, p: Any, g: Any, m: Any, v: Any, scale: float, beta1: float, beta2: float,
    root: float, epsilon: float, rate: float, shrink: float, working: Any = None,
) -> None:  # fmt: skip
    lib.adamw_update(
        p.size, _at(p), _at(g), _at(m), _at(v), scale, beta1, beta2, 1.0 - beta1, 1.0 - beta2,
        root, epsilon, rate, shrink,
    )  # fmt: skip


@kernel("clip.squares", lambda x, block: dense(x))
def _clip_squares(lib: Any, x: Any, block: int) -> Any:
    out = np.empty(-(-x.size // block))
    lib.clip_squares(x.size, block, _at(x), _at(out))
    return out
