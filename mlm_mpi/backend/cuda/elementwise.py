"""Launches of the kernels without rows: one read, one write, nothing kept (`kernels/cuda/flat.cuh`)."""

from typing import Any

import numpy as np

from mlm_mpi.backend.cuda.contracts import ELEMENTS, dense, element, shaped, width
from mlm_mpi.backend.cuda.draws import cut_of, dims_of, drawn
from mlm_mpi.backend.cuda.draws import fit as fit_draw
from mlm_mpi.backend.registry import Table

KERNELS = Table()

THREADS = 256
MOST_ROWS = 0xFFFF  # of a grid's y
LEAVES = 16  # arrays that sums.tree adds: pointers among a kernel's arguments


def _launch(gpu: Any, name: str, size: int, wide: int, arguments: tuple[Any, ...], **defines: Any) -> None:
    run = gpu.function(name.partition("_")[0], name, WIDTH=wide, **defines)
    run((max(1, -(-size // (THREADS * wide))),), (THREADS,), (*arguments, np.int64(size)))


# ---- activations of one array


def _activation(op: str) -> None:
    """Enters the two launches of an op that maps elements."""

    @KERNELS.kernel(f"{op}.forward", dense)
    def forward(gpu: Any, x: Any) -> Any:
        y = gpu.cupy.empty(x.shape, x.dtype)
        _launch(gpu, f"{op}_forward", x.size, width(x, y), (x, y), ELEMENT=element(x))
        return y

    @KERNELS.kernel(f"{op}.backward", lambda dy, x, out=None: dense(dy, x, out) or shaped(x.shape, dy, out))
    def backward(gpu: Any, dy: Any, x: Any, out: Any = None) -> Any:
        dx = gpu.cupy.empty(x.shape, x.dtype) if out is None else out
        _launch(gpu, f"{op}_backward", x.size, width(dy, x, dx), (dy, x, dx), ELEMENT=element(x))
        return dx


_activation("gelu")
_activation("relu2")


# ---- swiglu


def _fit_gates(x: Any, dy: Any = None, out: Any = None) -> str:
    if why := dense(x, dy, out):
        return why
    if x.ndim != 3 or x.shape[1] != 2 or x.shape[2] >= 1 << 30:
        return "no rows of gates and what they open"
    return shaped((x.shape[0], x.shape[2]), dy) or shaped(x.shape, out)


def _gated(gpu: Any, name: str, x: Any, *arrays: Any) -> None:
    # `arrays`: the kernel's, x among them
    rows, _, columns = x.shape
    wide = width(*arrays, columns=columns)
    threads = min(THREADS, -(-columns // (32 * wide)) * 32)
    if x.size:
        run = gpu.function("swiglu", name, ELEMENT=element(x), WIDTH=wide)
        grid = -(-columns // (threads * wide)), min(rows, MOST_ROWS)
        run(grid, (threads,), (*arrays, np.int64(rows), np.int32(columns)))


@KERNELS.kernel("swiglu.forward", _fit_gates)
def _swiglu_forward(gpu: Any, x: Any) -> Any:
    y = gpu.cupy.empty((x.shape[0], x.shape[2]), x.dtype)
    _gated(gpu, "swiglu_forward", x, x, y)
    return y


@KERNELS.kernel("swiglu.backward", lambda dy, x, out=None: _fit_gates(x, dy, out))
def _swiglu_backward(gpu: Any, dy: Any, x: Any, out: Any = None) -> Any:
    dx = gpu.cupy.empty(x.shape, x.dtype) if out is None else out
    _gated(gpu, "swiglu_backward", x, dy, x, dx)
    return dx


# ---- dropout


def _cut(draw: Any, shape: tuple[int, ...], start: int, pack: int) -> tuple[Any, int, int]:
    """The elements of a draw (`Cut` of philox.cuh), whether they are more than one run, and how many a thread draws.

    A pack is whole counters of four words.
    """
    dims = dims_of(draw, shape)
    is_cut = len(dims) > 1
    places = [draw.start + start, *(stride for _, stride in dims[:-1])]
    whole = not any(place % 4 for place in places) and not (is_cut and dims[-1][0] % pack)
    return cut_of(draw.start + start, dims), int(is_cut), pack if whole else 1


def _fit_mask(draw: Any, shape: tuple[int, ...], start: int, dtype: Any, xp: Any = np) -> str:
    if xp is np:
        return "not in the GPU's memory"
    return fit_draw(draw, shape) or ("" if np.dtype(dtype).name in ELEMENTS else str(np.dtype(dtype)))


@KERNELS.kernel("dropout.mask", _fit_mask)
def _dropout_mask(gpu: Any, draw: Any, shape: tuple[int, ...], start: int, dtype: Any, xp: Any) -> Any:
    out = gpu.cupy.empty(shape, dtype)
    cut, is_cut, wide = _cut(draw, shape, start, width(out))
    _launch(gpu, "dropout_mask", out.size, wide, (drawn(draw), cut, out), ELEMENT=element(out), CUT=is_cut)
    return out


def _fit_dropout(x: Any, draw: Any, residual: Any = None) -> str:
    return dense(x, residual) or shaped(x.shape, residual) or fit_draw(draw, x.shape)


@KERNELS.kernel("dropout.forward", _fit_dropout)
def _dropout_forward(gpu: Any, x: Any, draw: Any, residual: Any = None) -> Any:
    y = gpu.cupy.empty(x.shape, x.dtype)
    cut, is_cut, wide = _cut(draw, x.shape, 0, width(x, residual, y))
    arguments = (drawn(draw), cut, x, residual, y)
    _launch(gpu, "dropout_forward", x.size, wide, arguments, ELEMENT=element(x), CUT=is_cut)
    return y


# ---- adamw


def _fit_adamw(
    p: Any, g: Any, m: Any, v: Any, scale: float, beta1: float, beta2: float,
    root: float, epsilon: float, rate: float, shrink: float, working: Any = None,
) -> str:  # fmt: skip
    if working is not None and working.dtype.name != "bfloat16":
        return f"working copy: {working.dtype}"
    return dense(p, g, m, v, dtype=np.float32) or dense(working) or shaped(p.shape, g, m, v, working)


@KERNELS.kernel("adamw.update", _fit_adamw)
def _adamw_update(
    gpu: Any, p: Any, g: Any, m: Any, v: Any, scale: float, beta1: float, beta2: float,
    root: float, epsilon: float, rate: float, shrink: float, working: Any = None,
) -> None:  # fmt: skip
    numbers = (scale, beta1, beta2, 1.0 - beta1, 1.0 - beta2, root, epsilon, rate, shrink)
    arrays = (p, g, m, v, working)
    _launch(gpu, "adamw_update", p.size, width(*arrays), (*arrays, *map(np.float32, numbers)))


# ---- sums, cast


def _fit_tree(leaves: Any, merges: Any, out: Any) -> str:
    few = "" if 1 <= len(leaves) <= LEAVES else f"more than {LEAVES} leaves"
    return few or dense(out, *leaves, dtype=np.float32) or shaped(out.shape, *leaves)


@KERNELS.kernel("sums.tree", _fit_tree)
def sums_tree(gpu: Any, leaves: Any, merges: Any, out: Any) -> None:
    pointers = (*leaves, *[None] * (LEAVES - len(leaves)))
    order = ",".join(map(str, merges))
    _launch(gpu, "sums_tree", out.size, width(out, *leaves), (*pointers, out), COUNT=len(leaves), MERGES=order)


def _fit_cast(x: Any, out: Any) -> str:
    return dense(x) or dense(out) or shaped(x.shape, out) or ("the same type" if x.dtype == out.dtype else "")


@KERNELS.kernel("cast.to", _fit_cast)
def _cast_to(gpu: Any, x: Any, out: Any) -> None:
    _launch(gpu, "cast_to", x.size, width(x, out), (x, out), FROM=element(x), TO=element(out))
