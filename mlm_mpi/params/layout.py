"""Which slice of a global array a rank holds."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from mlm_mpi.cut import Box, cut

COPIED = ("dp", "tp")  # axes along which ranks hold copies of a parameter that the axis does not cut; pp holds others


class Grid(Protocol):
    """What a Layout needs of a mesh."""

    def size(self, axis: str | None) -> int: ...
    def coord(self, axis: str | None) -> int: ...


@dataclass(frozen=True)
class Layout:
    """Global shape and, per dim, the mesh axis that cuts it (None: not cut).

    `units`, per dim: a cut lies between whole units, such as the heads of attention; () for single elements.
    An uneven cut gives the first coordinates one unit more.
    `shares`: the dim that tp cuts has so many equal parts of whole units, the same on any mesh, and what is summed over
    the parameter is summed in them (`clip.norm`). Raises ValueError where it does not.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...] = ()
    units: tuple[int, ...] = ()
    shares: int = 1

    def __post_init__(self) -> None:
        if self.shares != 1:
            dim = self.axes.index("tp")
            cut(self.shape[dim], 1, 0, self.shares * (self.units or (1,) * len(self.shape))[dim])

    def box(self, grid: Grid) -> Box:
        """The piece of the global array that is mine."""
        axes = self.axes or (None,) * len(self.shape)
        units = self.units or (1,) * len(self.shape)
        ranges = [
            cut(extent, grid.size(axis), grid.coord(axis), unit)
            for extent, axis, unit in zip(self.shape, axes, units, strict=True)
        ]
        return Box(tuple(start for start, _ in ranges), tuple(stop for _, stop in ranges))

    def share(self, grid: Grid) -> Box:
        """The rows of my box that I save: those who hold the same box cut it along dim 0. It may be empty."""
        copies, number = 1, 0
        for axis in COPIED:
            if axis not in self.axes:
                copies, number = copies * grid.size(axis), number * grid.size(axis) + grid.coord(axis)
        box = self.box(grid)
        start, stop = cut(box.shape[0], copies, number)
        first = box.starts[0]
        return Box((first + start, *box.starts[1:]), (first + stop, *box.stops[1:]))

    def slices(self, grid: Grid) -> tuple[slice, ...]:
        """My slice of each dim of the global array."""
        return self.box(grid).slices

    def local_shape(self, grid: Grid) -> tuple[int, ...]:
        """Shape of my slice."""
        return self.box(grid).shape

    def split(self, mine: Any, grid: Grid) -> list[Any]:
        """My slice of an array as matrices, a whole share each, in their order: views whose rows are contiguous.

        Shapes: `local_shape`, contiguous -> (elements before the dim that tp cuts, those of a share from there on).
        Raises ValueError where tp cuts a share.
        """
        if "tp" not in self.axes:
            return [mine.reshape(1, -1)]
        dim, ranks = self.axes.index("tp"), grid.size("tp")
        if self.shares % ranks:
            raise ValueError(f"{self.shares} shares cannot be cut in {ranks} equal parts")
        parts = mine.reshape(math.prod(mine.shape[:dim]), self.shares // ranks, -1)
        return [parts[:, number] for number in range(parts.shape[1])]

    def split_rows(self, mine: Any, grid: Grid, first: int, last: int) -> list[tuple[int, Any]]:
        """(number of a share, what rows [first, last) of my slice have of it), as `split` shapes it."""
        if self.axes[:1] != ("tp",):
            return list(enumerate(self.split(mine[first:last], grid)))
        each = len(mine) * grid.size("tp") // self.shares
        shares = range(first // each, -(-last // each))
        return [(k, mine[max(first, k * each) : min(last, k * each + each)].reshape(1, -1)) for k in shares]
