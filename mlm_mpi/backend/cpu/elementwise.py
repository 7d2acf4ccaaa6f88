"""Launches of the kernels that work element by element."""

import ctypes
from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import BFLOAT16
from mlm_mpi.backend.cpu.contracts import FLOAT32, dense, elements, shaped
from mlm_mpi.backend.cpu.library import at, c_draw
from mlm_mpi.backend.registry import Table

KERNELS = Table()


# ---- activations of one array


def _activation(op: str) -> None:
    """Enters the two launches of an op that maps elements."""

    @KERNELS.kernel(f"{op}.forward", elements)
    def forward(lib: Any, x: Any) -> Any:
        y = np.empty_like(x)
        lib.of(f"{op}_forward", x)(x.size, at(x), at(y))
        return y

    @KERNELS.kernel(f"{op}.backward", lambda dy, x, out=None: elements(dy, x, out) or shaped(x.shape, dy, out))
    def backward(lib: Any, dy: Any, x: Any, out: Any = None) -> Any:
        dx = np.empty_like(x) if out is None else out
        lib.of(f"{op}_backward", x)(x.size, at(dy), at(x), at(dx))
        return dx


_activation("gelu")
_activation("relu2")


# ---- swiglu


def _fit_gates(x: Any, *rows: Any) -> str:
    pairs = x.ndim == 3 and x.shape[1] == 2
    return elements(x, *rows) or ("" if pairs else "shapes differ") or shaped((x.shape[0], x.shape[2]), *rows)


@KERNELS.kernel("swiglu.forward", _fit_gates)
def _swiglu_forward(lib: Any, x: Any) -> Any:
    rows, _, width = x.shape
    y = np.empty((rows, width), x.dtype)
    lib.of("swiglu_forward", x)(rows, width, at(x), at(y))
    return y


@KERNELS.kernel(
    "swiglu.backward", lambda dy, x, out=None: _fit_gates(x, dy) or elements(x, out) or shaped(x.shape, out)
)
def _swiglu_backward(lib: Any, dy: Any, x: Any, out: Any = None) -> Any:
    dx = np.empty_like(x) if out is None else out
    lib.of("swiglu_backward", x)(x.shape[0], x.shape[2], at(dy), at(x), at(dx))
    return dx


# ---- dropout


def _fit_rows(draw: Any, shape: tuple[int, ...]) -> str:
    return "rows in more than three dims" if len(draw.rows(shape)[0]) > 3 else ""


def _rows(draw: Any, shape: tuple[int, ...], start: int = 0) -> tuple[Any, Any]:
    """(rows in three dims and their width, the draw), for C."""
    extents, strides, width = draw.rows(shape)
    fill = 3 - len(extents)
    return (4 * ctypes.c_int64)(*[1] * fill, *extents, width), c_draw(draw, draw.start + start, [*[0] * fill, *strides])


def _fit_mask(draw: Any, shape: tuple[int, ...], start: int, dtype: Any, xp: Any = np) -> str:
    if xp is not np:
        return "not in the CPU's memory"
    return _fit_rows(draw, shape) if np.dtype(dtype) in (FLOAT32, BFLOAT16) else str(np.dtype(dtype))


@KERNELS.kernel("dropout.mask", _fit_mask)
def _dropout_mask(lib: Any, draw: Any, shape: tuple[int, ...], start: int, dtype: Any, xp: Any = np) -> Any:
    out, (rows, drawn) = np.empty(shape, dtype), _rows(draw, shape, start)
    lib.of("dropout_mask", out)(lib.pointer(rows), lib.pointer(drawn), at(out))
    return out


def _fit_dropout(x: Any, draw: Any, residual: Any = None) -> str:
    return elements(x, residual) or shaped(x.shape, residual) or _fit_rows(draw, x.shape)


@KERNELS.kernel("dropout.forward", _fit_dropout)
def _dropout_forward(lib: Any, x: Any, draw: Any, residual: Any = None) -> Any:
    y, (rows, drawn) = np.empty_like(x), _rows(draw, x.shape)
    lib.of("dropout_forward", x)(lib.pointer(rows), at(x), lib.pointer(drawn), at(residual), at(y))
    return y


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


@KERNELS.kernel("sums.tree", _fit_sums)
def _sums_tree(lib: Any, leaves: Any, merges: Any, out: Any) -> None:
    addresses, counts = (ctypes.c_void_p * len(leaves))(*map(at, leaves)), (ctypes.c_int32 * len(leaves))(*merges)
    lib.sums_tree(out.size, len(leaves), lib.pointer(addresses), lib.pointer(counts), at(out))


# ---- adamw


def _fit_adamw(
    p: Any, g: Any, m: Any, v: Any, scale: float, beta1: float, beta2: float,
    root: float, epsilon: float, rate: float, shrink: float, working: Any = None,
) -> str:  # fmt: skip
    return dense(p, g, m, v) or dense(working, dtype=BFLOAT16) or shaped(p.shape, g, m, v, working)


@KERNELS.kernel("adamw.update", _fit_adamw)
def _adamw_update(
    lib: Any, p: Any, g: Any, m: Any, v: Any, scale: float, beta1: float, beta2: float,
    root: float, epsilon: float, rate: float, shrink: float, working: Any = None,
) -> None:  # fmt: skip
    lib.of("adamw_update", p if working is None else working)(
        p.size, at(p), at(g), at(m), at(v), scale, beta1, beta2, 1.0 - beta1, 1.0 - beta2,
        root, epsilon, rate, shrink, at(working),
    )  # fmt: skip


# ---- cast


@KERNELS.kernel("cast.to", lambda x, out: dense(x) or dense(out, dtype=BFLOAT16) or shaped(x.shape, out))
def _cast_to(lib: Any, x: Any, out: Any) -> None:
    lib.cast_to_bf16(x.size, at(x), at(out))
