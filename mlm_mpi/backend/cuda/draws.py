"""Dropout's draws as kernels take them: `Draw` and `Cut` of kernels/cuda/philox.cuh, passed by value."""

from typing import Any

import numpy as np

DRAW = np.dtype([(name, "u4") for name in ("key0", "key1", "step", "micro_batch")] + [("rate", "f4"), ("factor", "f4")])
CUT = np.dtype([("start", "u8"), ("extent", "u4", 3), ("stride", "i8", 3)], align=True)

Dims = list[tuple[int, int]]  # (extent, stride), the outermost first

MOST = 1 << 32  # elements of a dim


def drawn(draw: Any) -> Any:
    """Which mask; None draws one that nobody asks for."""
    if draw is None:
        return np.array([(0, 0, 0, 0, 0.0, 1.0)], DRAW)
    words = (word & 0xFFFFFFFF for word in (*draw.key, draw.step, draw.micro_batch))
    return np.array([(*words, draw.rate, 1.0 / (1.0 - draw.rate))], DRAW)


def dims_of(draw: Any, shape: tuple[int, ...]) -> Dims:
    """Extents and strides in the global array, of dims that lie together made one; the last stride is 1."""
    extents, strides, width = draw.rows(shape)
    return [*zip(extents, strides, strict=True), (width, 1)]


def fit(draw: Any, shape: tuple[int, ...]) -> str:
    """Why no kernel draws for arrays of that shape, or ""."""
    if draw is None or not draw.strides:
        return ""
    if len(draw.strides) != len(shape) or draw.strides[-1] != 1:
        return "a draw for arrays of another shape"
    dims = dims_of(draw, shape)
    return "cut along more than three dims" if len(dims) > 4 or max(dims)[0] >= MOST else ""


def cut_of(start: int, dims: Dims) -> Any:
    """`Cut` of at most four dims; of one alone the kernel asks for the start only."""
    inwards = [*dims[::-1], *[(1, 0)] * (4 - len(dims))] if len(dims) > 1 else [(1, 0)] * 4
    return np.array([(start, [extent for extent, _ in inwards[:3]], [stride for _, stride in inwards[1:]])], CUT)
