"""Where arrays live, and which code computes on them."""

from dataclasses import dataclass
from typing import Literal

from mlm_mpi.config.keys import key
from mlm_mpi.errors import ConfigError

Device = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Backend:
    """Where the ranks calculate."""

    device: Literal["cpu", "gpu"] = key(
        "cpu", says="The ranks calculate on the CPU, or each on a GPU of its node; `--device` sets the same."
    )
    memory_gib: float = key(
        0.0, says="A rank takes at most this much of its GPU's memory; 0 means no limit.", unit="GiB", least=0
    )
    graphs: bool = key(
        False,
        says="If true, a GPU replays forward and backward as CUDA graphs, for fewer launches and the same bits "
        "(LOG.md, 2026-11-27).",
    )


@dataclass(frozen=True)
class Numerics:
    """What decides bits beside the mathematics; read before all else, as BLAS and NumPy need it when they load."""

    threads: int = key(
        1,
        says="This many threads of a rank share a matrix product, of our kernels or of BLAS.",
        unit="threads",
        least=1,
        most=1024,  # CPU_SETSIZE of Linux
        remedy="a process can be bound to 1024 CPUs at most",
    )
    level: Literal["auto", "base", "avx2"] = key(
        "auto",
        says="Our kernels, BLAS and NumPy use at most this instruction set: auto is all that the CPU has, avx2 lets "
        "CPUs with and without AVX-512 share a run where NumPy computes too, base does without AVX2 and gives other "
        "bits.",
    )
    products: Literal["float32", "bf16"] = key(
        "float32",
        says="What layers compute with: with bf16, activations and a working copy of the weights are bf16; sums, "
        "gradients, weights and the optimiser's moments stay float32. A CPU needs AVX512-BF16 for it.",
    )
    shares: int = key(
        8,
        says="A sum over heads, features, the vocabulary or positions, which a mesh may cut, is formed in at most this "
        "many shares, a power of two that divides it, and decides the bits; 1: off.",
        unit="shares",
        least=1,
        most=8,
    )
    reference: str = key(
        "",
        says='NumPy (CuPy) computes these operations in place of a kernel, "gelu,attention" or "all", so that the '
        "kernel that spoils a loss can be found.",
    )

    def resolved(self) -> "Numerics":
        """The same. Raises ConfigError where the shares are no power of two."""
        if self.shares & (self.shares - 1):
            raise ConfigError(f"numerics.shares = {self.shares} is not a power of two: set it to 1, 2, 4 or 8")
        return self
