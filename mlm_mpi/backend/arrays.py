"""Array modules and what they do not share: where arrays live, which module one belongs to.

`cupy` is imported in this package only, and only by a run that asks for a GPU.
"""

import ctypes
import mmap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from mlm_mpi.errors import ConfigError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)  # NumPy's and CuPy's
CUPY = "pip install 'cupy-cuda13x[ctk]' (cupy-cuda12x for a driver of CUDA 12)"  # how to get what a GPU needs
_LIBC, _DONT_NEED = ctypes.CDLL(None), 4
BLOCK_ELEMENTS = 1 << 15  # 128 KiB of float32: two or three work arrays of this size stay in a core's L2 cache


@dataclass(frozen=True)
class Place:
    """Where a rank's arrays live: NumPy in the CPU's memory, CuPy in a GPU's. `compute`: dtype of activations."""

    xp: ModuleType
    compute: np.dtype
    description: str = "CPU"

    @property
    def on_gpu(self) -> bool:
        return self.xp is not np

    def put(self, host: np.ndarray | None) -> Any:
        """A NumPy array, brought here; None stays None."""
        return host if host is None or not self.on_gpu else self.xp.asarray(host)


def cpu(dtype: Any = np.float32, products: str = "float32") -> Place:
    """The CPU's memory. `products`: "bf16" keeps activations in bfloat16, else they have the weights' dtype."""
    return Place(np, BFLOAT16 if products == "bf16" else np.dtype(dtype))


def gpu(dtype: Any, products: str, local_rank: int, memory_gib: float = 0.0) -> Place:
    """The GPU of a rank: number `local_rank` on its node, round and round where there are fewer GPUs than ranks.

    `products`: "bf16" keeps activations in bfloat16. `memory_gib`: limit of this rank's memory pool, 0 for none.
    Raises ConfigError, naming the remedy, where there is no CuPy or no GPU.
    """
    try:
        import cupy
    except ImportError:
        raise ConfigError(f"backend.device = gpu needs CuPy: {CUPY}, or --device cpu") from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:  # no driver, or no device
        raise ConfigError(f"backend.device = gpu: CUDA finds no GPU here ({error}): use --device cpu") from None
    cupy.cuda.Device(local_rank % count).use()
    if memory_gib:
        cupy.get_default_memory_pool().set_limit(size=int(memory_gib * 2**30))
    facts = cupy.cuda.runtime.getDeviceProperties(local_rank % count)
    name = f"{facts['name'].decode()} sm_{facts['major']}{facts['minor']}"
    return Place(cupy, BFLOAT16 if products == "bf16" else np.dtype(dtype), name)


def nccl() -> Any:
    """CuPy's module for NCCL, which `cupy.cuda` does not import by itself.

    Raises ConfigError, naming the remedy, where the library is missing: CuPy's wheels do not bring it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy says in eight lines what the error says in one
        from cupy.cuda import nccl as library
    if not library.available:
        from cupy.cuda import runtime

        raise ConfigError(
            "comm.reduction = nccl: CuPy finds no NCCL: "
            f"pip install nvidia-nccl-cu{runtime.runtimeGetVersion() // 1000}, or use canonical"
        )
    return library


def gpus() -> tuple[str, list[str]]:
    """(CuPy and CUDA by version, or why there is no GPU; a description of each GPU)."""
    try:
        import cupy
    except ImportError:
        return f"not installed ({CUPY})", []
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return f"{cupy.__version__}, but CUDA finds no GPU ({error})", []
    found = []
    for facts in map(runtime.getDeviceProperties, range(count)):
        size = f"{facts['totalGlobalMem'] / 2**30:.1f} GiB, {facts['multiProcessorCount']} multiprocessors"
        found.append(f"{facts['name'].decode()}, sm_{facts['major']}{facts['minor']}, {size}")
    return f"{cupy.__version__}, CUDA {runtime.runtimeGetVersion()}", found


def wide(array: Any) -> Any:
    """A bfloat16 array as float32, any other array itself: arithmetic is never done in bfloat16."""
    return array.astype(np.float32) if array.dtype == BFLOAT16 else array


def to_host(array: Any) -> np.ndarray:
    """An array as NumPy's: itself, or a copy from the GPU's memory."""
    return array if isinstance(array, np.ndarray) else array.get()


def snap(array: Any, out: np.ndarray) -> None:
    """Copies an array, which may lie in a GPU's memory, into one of the CPU's of the same shape and dtype."""
    if isinstance(array, np.ndarray):
        out[...] = array
    else:
        array.get(out=out)


def new_pages(size_bytes: int) -> np.ndarray:
    """Bytes in pages of their own, zero, that go back to the kernel with the last view of them.

    The allocator would keep them for ever (`keep_freed_memory`). Raises MemoryError.
    """
    try:
        pages = mmap.mmap(-1, max(1, size_bytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError):
        raise MemoryError(f"no {size_bytes} bytes of memory") from None
    return np.frombuffer(pages, np.uint8)[:size_bytes]


def forget(array: np.ndarray) -> None:
    """Gives whole pages of a contiguous array back to the kernel: what they held is lost. Others stay as they are."""
    first = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _DONT_NEED)  # advice: it may do nothing


def fill(target: Any, host: Any) -> None:
    """target = host, whose values are converted; `target` may lie in a GPU's memory."""
    if isinstance(target, np.ndarray):
        target[...] = host
    else:
        target.set(np.ascontiguousarray(host, target.dtype).reshape(target.shape))


def module_of(array: Any) -> ModuleType:
    """NumPy for NumPy arrays, CuPy for CuPy arrays."""
    if isinstance(array, np.ndarray):
        return np
    import cupy  # an array that is not NumPy's can only have been made by CuPy

    return cupy


def row_blocks(array: Any) -> Iterator[slice]:
    """Slices of dim 0 so small that element-wise passes over a block run in cache (a GPU gets one slice)."""
    rows = array.shape[0]
    width = max(1, array.size // max(1, rows))
    step = max(1, BLOCK_ELEMENTS // width) if isinstance(array, np.ndarray) else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def scatter_add(table: Any, ids: Any, values: Any) -> None:
    """table[id] += the sum of an id's values in position order. CuPy's own is not deterministic, so the CPU does it."""
    xp = module_of(table)
    if xp is not np:
        added = np.zeros(table.shape, table.dtype)
        scatter_add(added, ids.get(), wide(values.get()))
        table += xp.asarray(added)
        return
    order = np.argsort(ids, kind="stable")
    _, first, counts = np.unique(ids[order], return_index=True, return_counts=True)
    sums = values[order[first]]
    for number in range(1, counts.max(initial=0)):  # the ids that have so many positions take in one more
        some = counts > number
        sums[some] += values[order[first[some] + number]]
    table[ids[order[first]]] += sums


def deposit(value: Any, out: Any, accumulate: bool) -> None:
    """out = value, or out += value."""
    if accumulate:
        out += value
    else:
        out[...] = value
