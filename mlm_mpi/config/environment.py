"""What BLAS and NumPy read from the environment when they load."""

import os
from typing import Any

# OpenBLAS and NumPy choose kernels by what the CPU can do, and other kernels give other bits. Pinning
# them, with our kernels, to AVX2 lets nodes with and without AVX-512 share a run.
# NumPy names its features since 2.4 by level (X86_V4), before one by one, and ignores names it does not know.
_AVX512 = "X86_V4 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR"
_PINNED = {
    "base": {
        "OPENBLAS_CORETYPE": "Nehalem",
        "NPY_DISABLE_CPU_FEATURES": f"X86_V3 F16C FMA3 AVX2 {_AVX512}",
    },
    "avx2": {
        "OPENBLAS_CORETYPE": "Haswell",
        "NPY_DISABLE_CPU_FEATURES": _AVX512,
    },
}


def prepare_environment(numerics: Any) -> None:
    """Pins BLAS and NumPy to what [numerics] says; called before either is imported."""
    os.environ["OPENBLAS_NUM_THREADS"] = str(numerics.threads)
    os.environ["OMP_NUM_THREADS"] = str(numerics.threads)
    os.environ.update(_PINNED.get(numerics.level, {}))
