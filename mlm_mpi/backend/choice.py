"""The choice of kernels, made once at the start of a command: which providers serve, and with how many threads.

Stands on top of the devices, so that the registry need not know any.
"""

import ctypes
from typing import TYPE_CHECKING

from mlm_mpi.backend.arrays import Place, cpu, gpu, nccl
from mlm_mpi.backend.cpu import provider as c
from mlm_mpi.backend.cuda import provider as cuda
from mlm_mpi.backend.registry import Choice, use
from mlm_mpi.errors import ConfigError

if TYPE_CHECKING:  # the machines of gpu-check have no msgspec
    from mlm_mpi.config import Config


def select(
    level: str = "auto", reference: str = "", products: str = "float32", threads: int = 1, device: str = "cpu"
) -> Choice:
    """Puts the kernels of a device in force, all but those of the ops that the reference computes.

    `level`: "auto", a dispatch level of the CPU, or "off". `reference`: "gelu,attention" or "all". `products`:
    "float32", or "bf16" where arrays will be bf16, which not every CPU may multiply; `threads` share a product.
    `device`: "cpu" or "cuda", beside which the CPU's kernels serve arrays in its own memory.
    Raises ConfigError where an op is unknown or this machine lacks what is asked for: the choice before stands.
    """
    ops = [op.strip() for op in reference.split(",") if op.strip()]
    if device == "cpu":
        return use(c.provide(level, threads, products), reference=ops)
    return use(cuda.provide(level), c.provide(threads=threads), reference=ops)


def place_of(config: "Config", level: str = "auto", on_node: tuple[int, int] = (0, 1)) -> Place:
    """Where a rank of this configuration calculates. Readies the process for it: threads, memory, kernels.

    `on_node`: this rank's number among the ranks of its node, and how many they are. Raises ConfigError.
    """
    import threadpoolctl  # the machines of gpu-check have none

    numerics, backend = config.numerics, config.backend
    threadpoolctl.threadpool_limits(numerics.threads)
    keep_freed_memory()
    if backend.device == "cpu":
        select(level, numerics.reference, numerics.products, numerics.threads)
        return cpu(config.train.dtype, numerics.products)
    place = gpu(config.train.dtype, numerics.products, on_node[0], backend.memory_gib)
    if config.comm.reduction == "nccl":
        _check_nccl(place, on_node[1])
    select(reference=numerics.reference, threads=numerics.threads, device="cuda")
    return place


def _check_nccl(place: Place, ranks: int) -> None:
    nccl()
    gpus = place.xp.cuda.runtime.getDeviceCount()
    if ranks > gpus:
        raise ConfigError(
            f"comm.reduction = nccl needs a GPU for each rank of a node, {ranks} ranks share {gpus}: "
            "start fewer ranks, or use canonical or allreduce"
        )


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
