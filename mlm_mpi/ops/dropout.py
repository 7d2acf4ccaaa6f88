"""Dropout whose mask is a pure function of (key, step, micro-batch, global element index).

The mask is never kept: backward draws it again.
Source: Srivastava et al., JMLR 15 (2014); inverted form: kept elements are divided by 1 − rate.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from mlm_mpi.backend.arrays import module_of, wide
from mlm_mpi.backend.registry import served
from mlm_mpi.rng import Key, uniform


class Draw(NamedTuple):
    """Which mask, and which part of it a local array is: element (i0, i1, …) of that is number start + Σ i·stride of
    the global array. Without strides the local array is contiguous there."""

    rate: float
    key: Key
    step: int
    micro_batch: int
    start: int = 0
    strides: tuple[int, ...] = ()  # of the local array's dims, in elements; the last is 1

    def along(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The strides of a local array of that shape. Raises ValueError where they do not fit it."""
        if not self.strides:
            return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        if len(self.strides) != len(shape) or self.strides[-1] != 1:
            raise ValueError(f"a draw with strides {self.strides} for an array of shape {shape}")
        return self.strides

    def cut(self, shape: tuple[int, ...], corner: tuple[int, ...]) -> "Draw":
        """The draw of the part that begins at `corner` of the array of that shape whose draw this is."""
        strides = self.along(shape)
        start = self.start + sum(at * stride for at, stride in zip(corner, strides, strict=True))
        return self._replace(start=start, strides=strides)

    def rows(self, shape: tuple[int, ...]) -> tuple[list[int], list[int], int]:
        """(extents, strides, width): a local array of that shape as the fewest rows of `width` neighbours."""
        extents: list[int] = []
        strides: list[int] = []
        width = 1
        for extent, stride in reversed(list(zip(shape, self.along(shape), strict=True))):
            if not extents and stride == width:
                width *= extent
            elif extents and stride == strides[0] * extents[0]:
                extents[0] *= extent
            elif extent != 1:
                extents.insert(0, extent)
                strides.insert(0, stride)
        return extents, strides, width


@served
def mask(draw: Draw, shape: tuple[int, ...], start: int, dtype: Any, xp: Any = np) -> Any:
    """Factors 0 or 1/(1 − rate) for a local array that begins `start` elements behind the draw's, an array of `xp`."""
    extents, strides, width = draw.rows(shape)
    starts = np.array([draw.start + start])
    for extent, stride in zip(extents, strides, strict=True):
        starts = (starts[:, None] + stride * np.arange(extent)).reshape(-1)
    drawn = [uniform(draw.key, int(first), width, draw.step, draw.micro_batch) for first in starts]
    keep = np.concatenate(drawn) >= draw.rate if drawn else np.empty(0, bool)
    return xp.asarray((keep * (1.0 / (1.0 - draw.rate))).astype(dtype).reshape(shape))


@served
def forward(x: Any, draw: Draw, residual: Any = None) -> Any:
    """y = x · mask (+ residual). Its own adjoint: backward is the same product. Shapes: all alike, the draw's."""
    a = wide(x)
    y = a * mask(draw, x.shape, 0, a.dtype, module_of(x))
    if residual is not None:
        y += wide(residual)
    return y.astype(x.dtype, copy=False)
