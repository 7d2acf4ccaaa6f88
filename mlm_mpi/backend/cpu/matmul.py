"""Launches of the matrix products: all are one, c = bias + base + a b, of any strides (kernels/cpu/product.h)."""

import ctypes
from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import BFLOAT16
from mlm_mpi.backend.cpu.contracts import FLOAT32, dense, halved, shaped
from mlm_mpi.backend.cpu.library import at
from mlm_mpi.backend.registry import Table

KERNELS = Table()

LEAST_ROWS = 96  # a band of kernels/cpu/product.h: every thread packs the right factor for itself
ONE_ROW = "one row of bf16: NumPy's gemv reads b without packing it"  # up to 3 × as fast (LOG.md, 2026-11-23)
_LEAST_COLUMNS = 1024  # of a single row, for a thread

_Product = ctypes.c_int64 * 24  # struct product of kernels/cpu/product.h, flat


def _plane(x: np.ndarray | None) -> tuple[int, ...]:
    if x is None:
        return 0, 0, 0, 0
    return x.ctypes.data, x.strides[0] // x.itemsize, x.strides[1] // x.itemsize, x.dtype == FLOAT32


def _multiply(
    lib: Any, a: Any, b: Any, c: Any, base: Any = None, bias: Any = None, shares: int = 1, segments: int = 1
) -> None:  # fmt: skip
    """c = bias + base + a b, its rows shared out among threads, or the columns of its only one: which one computes an
    element does not enter its bits."""
    order = shares, segments, int(shares > 1 or base is c), 0
    one = a.shape[0] == 1
    extent, least = (c.shape[1], _LEAST_COLUMNS) if one else (a.shape[0], LEAST_ROWS)
    parts = max(1, min(lib.threads, extent // least))
    edges = [extent * part // parts for part in range(parts + 1)]

    def multiply(first: int, stop: int) -> None:
        some = slice(first, stop)
        part = (slice(None), some) if one else (some, slice(None))
        added = None if base is None else base[part]
        if one:
            _multiply_rows(lib, a, b[:, some], c[part], added, None if bias is None else bias[some], order)
        else:
            _multiply_rows(lib, a[some], b, c[part], added, bias, order)

    if parts == 1:
        _multiply_rows(lib, a, b, c, base, bias, order)
    else:
        list(lib.pool.map(multiply, edges[:-1], edges[1:]))


def _multiply_rows(lib: Any, a: Any, b: Any, c: Any, base: Any, bias: Any, order: tuple[int, ...]) -> None:
    (m, k), n = a.shape, b.shape[1]
    given, result = (*_plane(a), *_plane(b)), _plane(c)
    start = result if base is c else _plane(base)
    product = _Product(m, n, k, *order, *given, *result, *start, at(bias) or 0)
    pointer = lib.pointer(product)
    work = np.empty(lib.of("matmul_work", a)(pointer), np.float32)
    lib.of("matmul", a)(pointer, at(work))


def matrices(*arrays: Any, dtypes: tuple[Any, ...] = ()) -> str:
    """Every array (None is left out) is a matrix with something in it, of any strides of whole elements.

    Of these `dtypes`; without, all of them of float32 or all of bf16.
    """
    for x in arrays:
        if x is None:
            continue
        if not isinstance(x, np.ndarray) or x.ndim != 2:
            return "not matrices in the CPU's memory"
        dtypes = dtypes or (BFLOAT16 if x.dtype == BFLOAT16 else FLOAT32,)
        if x.dtype not in dtypes:
            return str(x.dtype)
        if x.size == 0:
            return "empty"
        if not x.flags.aligned:  # a tenth of the time that asking for the address takes
            return "not aligned"
    return ""


def floats(*arrays: Any) -> str:
    """`matrices` of float32."""
    return matrices(*arrays, dtypes=(FLOAT32,))


def rowwise(x: Any) -> str:
    """Rows of a matrix, or None, are contiguous and do not overlap."""
    if x is None or (x.strides[1] == x.itemsize and x.strides[0] >= x.itemsize * x.shape[1]):
        return ""
    return "not contiguous"


def chained(a: Any, b: Any) -> str:
    """A product a b exists, and is not one of a single row of bf16."""
    return ONE_ROW if a.shape[0] == 1 and a.dtype == BFLOAT16 else shaped(b.shape[:1], a[0])


def _fit_matmul(
    a: Any, b: Any, out: Any, accumulate: bool, shares: int = 1, segments: int = 1
) -> str:  # fmt: skip
    return matrices(a, b) or matrices(out, dtypes=(FLOAT32, a.dtype)) or rowwise(out) or chained(a, b) or (
        shaped((a.shape[0], b.shape[1]), out) or halved(a.shape[1], shares, segments)
    )  # fmt: skip


@KERNELS.kernel("matmul.add", _fit_matmul)
def _matmul_add(
    lib: Any, a: Any, b: Any, out: Any, accumulate: bool, shares: int = 1, segments: int = 1
) -> None:  # fmt: skip
    _multiply(lib, a, b, out, base=out if accumulate else None, shares=shares, segments=segments)


def _fit_linear(x: Any, w: Any, b: Any = None, residual: Any = None, shares: int = 1) -> str:
    return matrices(x, w, residual) or rowwise(residual) or dense(b, dtype=x.dtype) or chained(x, w) or (
        shaped((x.shape[0], w.shape[1]), residual) or shaped(w.shape[1:], b) or halved(x.shape[1], shares)
    )  # fmt: skip


@KERNELS.kernel("linear.forward", _fit_linear)
def _linear_forward(lib: Any, x: Any, w: Any, b: Any = None, residual: Any = None, shares: int = 1) -> Any:
    y = np.empty((x.shape[0], w.shape[1]), x.dtype)
    _multiply(lib, x, w, y, base=residual, bias=b, shares=shares)
    return y


def _fit_polar(x: Any, polynomials: Any) -> str:
    return dense(x) or ("" if x.ndim == 3 else "not matrices") or ("empty" if x.size == 0 else "")


@KERNELS.kernel("polar.iterate", _fit_polar)
def _polar_iterate(lib: Any, x: Any, polynomials: Any) -> None:
    """Every thread takes some of the matrices."""
    parts = min(lib.threads, len(x))
    edges = [len(x) * part // parts for part in range(parts + 1)]
    numbers = (ctypes.c_float * (3 * len(polynomials)))(*(number for abc in polynomials for number in abc))
    pointer, size = lib.pointer(numbers), lib.polar_work(*x.shape[1:])

    def iterate(first: int, stop: int) -> None:
        some, work = x[first:stop], np.empty(size, np.float32)
        lib.polar_iterate(*some.shape, len(polynomials), pointer, at(some), at(work))

    if parts == 1:
        iterate(0, len(x))
    else:
        list(lib.pool.map(iterate, edges[:-1], edges[1:]))
