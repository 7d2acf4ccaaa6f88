"""Dropout whose mask is a pure function of (key, step, micro-batch, global element index).

Source: Srivastava et al., JMLR 15 (2014); inverted form: kept elements are divided by 1 − rate.
"""

from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import module_of
from mlm_mpi.rng import Key, uniform


def mask(shape: tuple[int, ...], rate: float, key: Key, step: int, micro_batch: int, start: int, dtype: Any) -> Any:
    """Factors 0 or 1/(1 − rate) for the elements start … start + size − 1 of the global array."""
    size = int(np.prod(shape))
    keep = uniform(key, start, size, step, micro_batch) >= rate
    return (keep * (1.0 / (1.0 - rate))).astype(dtype).reshape(shape)


def forward(x: Any, factors: Any) -> Any:
    """Shapes: x and factors alike -> x · factors. Its own adjoint: backward is the same product."""
    return x * module_of(x).asarray(factors)
