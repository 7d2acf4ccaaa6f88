"""Launches of the memory-bound kernels: one read, one write, nothing kept."""

from typing import Any

import numpy as np

from mlm_mpi.backend.cuda.contracts import dense, element
from mlm_mpi.backend.kernels import kernel

THREADS = 256
BLOCKS_PER_PROCESSOR = 8  # 2048 threads, all that fit


def _grid(gpu: Any, size: int) -> tuple[int]:
    return (max(1, min(-(-size // THREADS), BLOCKS_PER_PROCESSOR * gpu.processors)),)


@kernel("gelu.forward", dense, device="cuda")
def _gelu_forward(gpu: Any, x: Any) -> Any:
    y = gpu.cupy.empty_like(x)
    run = gpu.function("gelu", "gelu_forward", ELEMENT=element(x))
    run(_grid(gpu, x.size), (THREADS,), (x, y, np.int64(x.size)))
    return y
