"""Array modules and what they do not share: which module an array belongs to, work-block sizes, memory.

`cupy` is imported in this package only, and only by a run that asks for a GPU.
"""

import ctypes
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

BLOCK_ELEMENTS = 1 << 15  # 128 KiB of float32: two or three work arrays of this size stay in a core's L2 cache


def module_of(array: Any) -> ModuleType:
    """NumPy for NumPy arrays, CuPy for CuPy arrays."""
    if isinstance(array, np.ndarray):
        return np
    import cupy  # an array that is not NumPy's can only have been made by CuPy

    return cupy


def wide(x: Any) -> Any:
    """x as float32 if it is bfloat16, else x itself: what a reference computes with."""
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x


def row_blocks(array: Any) -> Iterator[slice]:
    """Slices of dim 0 so small that element-wise passes over a block run in cache (a GPU gets one slice)."""
    rows = array.shape[0]
    width = max(1, array.size // max(1, rows))
    step = max(1, BLOCK_ELEMENTS // width) if isinstance(array, np.ndarray) else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def scatter_add(table: Any, ids: Any, values: Any) -> None:
    """table[ids] += values, equal ids in position order on the CPU; CuPy's own is not deterministic."""
    if module_of(table) is not np:
        import cupyx

        cupyx.scatter_add(table, ids, values)
        return
    order = np.argsort(ids, kind="stable")
    ranked = ids[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    table[ranked[starts]] += np.add.reduceat(values[order], starts, axis=0)


def deposit(value: Any, out: Any, accumulate: bool) -> None:
    """out = value, or out += value."""
    if accumulate:
        out += value
    else:
        out[...] = value


def keep_freed_memory() -> bool:
    """Asks glibc to keep freed blocks of any size for the next step instead of returning them to the kernel.

    By default every block above 32 MiB is mapped and unmapped anew, and the page faults cost as much as
    the arithmetic (LOG.md 2026-11-23). Returns False where the C library has no `mallopt`.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    never = -1  # 1 GiB, the first try, gave GPT-2 124M 45,000 faults a step
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, never) and mallopt(m_top_pad, 64 << 20))
