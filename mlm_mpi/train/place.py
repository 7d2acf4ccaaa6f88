"""Where a rank calculates."""

from mlm_mpi.backend import kernels
from mlm_mpi.backend.arrays import Place, cpu, gpu, nccl
from mlm_mpi.config import Config
from mlm_mpi.errors import ConfigError


def place_of(config: Config, level: str = "auto", on_node: tuple[int, int] = (0, 1)) -> Place:
    """Where a rank of this configuration calculates; chooses the kernels for it. Raises ConfigError.

    `on_node`: this rank's number among the ranks of its node, and how many they are.
    """
    numerics, backend = config.numerics, config.backend
    if backend.device == "cpu":
        kernels.select(level, numerics.reference, numerics.products, numerics.threads)
        return cpu(config.train.dtype)
    place = gpu(config.train.dtype, numerics.products, on_node[0], backend.memory_gib)
    if config.comm.reduction == "nccl":
        _check_nccl(place, on_node[1])
    kernels.select(reference=numerics.reference, threads=numerics.threads, device="cuda")
    return place


def _check_nccl(place: Place, ranks: int) -> None:
    nccl()
    gpus = place.xp.cuda.runtime.getDeviceCount()
    if ranks > gpus:
        raise ConfigError(
            f"comm.reduction = nccl needs a GPU for each rank of a node, {ranks} ranks share {gpus}: "
            "start fewer ranks, or use canonical or allreduce"
        )
