"""The C kernels as a provider: every table, and the library of one dispatch level."""

from mlm_mpi.backend.cpu import attention, elementwise, library, matmul, recurrence, rows
from mlm_mpi.backend.registry import Provider, Table

KERNELS = Table(matmul.KERNELS | attention.KERNELS | recurrence.KERNELS | rows.KERNELS | elementwise.KERNELS)


def provide(level: str = "auto", threads: int = 1, products: str = "float32") -> Provider:
    """The kernels of a dispatch level ("auto", one of LEVELS, or "off"), whose products share `threads`.

    `products`: "float32", or "bf16" where arrays will be bf16. Raises ConfigError where this CPU lacks either.
    """
    chosen, loaded, lacks = library.load(level, threads)
    about = library.take_bf16(loaded) if products == "bf16" else ""
    return Provider("C", "NumPy", KERNELS, loaded, lacks, chosen, about, library.rounding(chosen))
