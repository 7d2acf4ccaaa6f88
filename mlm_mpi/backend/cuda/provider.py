"""The CUDA kernels as a provider: every table, and the current GPU."""

from mlm_mpi.backend.cuda import attention, elementwise, matmul, rows
from mlm_mpi.backend.cuda.device import Device
from mlm_mpi.backend.registry import Provider, Table

KERNELS = Table(matmul.KERNELS | attention.KERNELS | rows.KERNELS | elementwise.KERNELS)


def provide(level: str = "auto") -> Provider:
    """The kernels on the current GPU, or none for the level "off". Raises ConfigError where it has no compiler."""
    if level == "off":
        return Provider("CUDA", "CuPy", KERNELS, lacks="kernels are switched off")
    gpu = Device()
    return Provider("CUDA", "CuPy", KERNELS, gpu, level=gpu.architecture)
