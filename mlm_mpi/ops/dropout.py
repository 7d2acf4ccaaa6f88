"""Dropout whose mask is a pure function of (key, step, micro-batch, global element index).

The mask is never kept: backward draws it again.
Source: Srivastava et al., JMLR 15 (2014); inverted form: kept elements are divided by 1 − rate.
"""

from typing import Any, NamedTuple

import numpy as np

from mlm_mpi.backend.arrays import module_of, wide
from mlm_mpi.backend.registry import served
from mlm_mpi.rng import Key, uniform


class Draw(NamedTuple):
    """Which mask, and which of its elements: (i0, i1, …) of an array is start + Σ i·stride of the global one.

    Without strides the array is a run of the global one's elements; with them the last is 1.
    """

    rate: float
    key: Key
    step: int
    micro_batch: int
    start: int = 0
    strides: tuple[int, ...] = ()


@served
def mask(draw: Draw, shape: tuple[int, ...], start: int, dtype: Any, xp: Any = np) -> Any:
    """Factors 0 or 1/(1 − rate) for the elements start … start + size − 1 of the global array, an array of `xp`."""
    keep = uniform(draw.key, start, int(np.prod(shape)), draw.step, draw.micro_batch) >= draw.rate
    return xp.asarray((keep * (1.0 / (1.0 - draw.rate))).astype(dtype).reshape(shape))


@served
def forward(x: Any, draw: Draw, residual: Any = None) -> Any:
    """y = x · mask (+ residual). Its own adjoint: backward is the same product. Shapes: all alike."""
    a = wide(x)
    y = a * mask(draw, x.shape, 0, a.dtype, module_of(x))
    if residual is not None:
        y += wide(residual)
    return y.astype(x.dtype, copy=False)
