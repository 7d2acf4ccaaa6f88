"""Which slice of a global array a rank holds."""

from dataclasses import dataclass
from typing import Protocol


class Grid(Protocol):
    """What a Layout needs of a mesh."""

    def size(self, axis: str | None) -> int: ...
    def coord(self, axis: str | None) -> int: ...


@dataclass(frozen=True)
class Layout:
    """Global shape and, per dim, the mesh axis that cuts it (None: not cut).

    An uneven cut gives the first coordinates one element more.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...] = ()

    def slices(self, grid: Grid) -> tuple[slice, ...]:
        """My slice of each dim of the global array."""
        axes = self.axes or (None,) * len(self.shape)
        return tuple(
            slice(*cut(extent, grid.size(axis), grid.coord(axis)))
            for extent, axis in zip(self.shape, axes, strict=True)
        )

    def local_shape(self, grid: Grid) -> tuple[int, ...]:
        """Shape of my slice."""
        return tuple(part.stop - part.start for part in self.slices(grid))


def cut(extent: int, parts: int, part: int) -> tuple[int, int]:
    """[start, stop) of a part of an extent cut as evenly as whole numbers allow, larger parts first."""
    base, rest = divmod(extent, parts)
    start = part * base + min(part, rest)
    return start, start + base + (part < rest)
