"""How an extent is shared out, and rectangular pieces of a global array."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


def cut(extent: int, parts: int, part: int, unit: int = 1) -> tuple[int, int]:
    """[start, stop) of a part of an extent, cut between whole units as evenly as they allow, larger parts first.

    Raises ValueError for an extent that is no multiple of the unit.
    """
    units, left_over = divmod(extent, unit)
    if left_over:
        raise ValueError(f"an extent of {extent} is no multiple of its unit {unit}")
    base, rest = divmod(units, parts)
    start = part * base + min(part, rest)
    return start * unit, (start + base + (part < rest)) * unit


@dataclass(frozen=True)
class Box:
    """The elements starts[d] … stops[d] - 1 of every dim d of a global array."""

    starts: tuple[int, ...]
    stops: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.starts) != len(self.stops) or not all(0 <= a <= b for a, b in self._ranges()):
            raise ValueError(f"{self.starts} to {self.stops} is no box")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Box":
        """All of an array."""
        return cls((0,) * len(shape), tuple(shape))

    @classmethod
    def from_list(cls, ranges: Sequence[Sequence[int]]) -> "Box":
        """The box that `to_list` wrote. Raises ValueError for anything that is not [[start, stop], ...]."""
        if not all(len(pair) == 2 and all(type(edge) is int for edge in pair) for pair in ranges):
            raise ValueError(f"{ranges} is no list of [start, stop]")
        return cls(tuple(pair[0] for pair in ranges), tuple(pair[1] for pair in ranges))

    def to_list(self) -> list[list[int]]:
        """[[start, stop], ...] by dim, plain data for JSON."""
        return [[start, stop] for start, stop in self._ranges()]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self._ranges())

    @property
    def slices(self) -> tuple[slice, ...]:
        """What picks these elements out of the global array."""
        return tuple(slice(start, stop) for start, stop in self._ranges())

    def overlap(self, other: "Box") -> "Box | None":
        """The elements that both have; None where there are none. Raises ValueError for another number of dims."""
        if len(self.starts) != len(other.starts):
            raise ValueError(f"{self} and {other} are not pieces of one array")
        starts = tuple(map(max, self.starts, other.starts))
        stops = tuple(map(min, self.stops, other.stops))
        return Box(starts, stops) if all(a < b for a, b in zip(starts, stops, strict=True)) else None

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """What picks these elements out of an array that holds `outer`. Raises ValueError unless all are in it."""
        inside = len(self.starts) == len(outer.starts) and all(
            first <= start and stop <= last
            for (start, stop), (first, last) in zip(self._ranges(), outer._ranges(), strict=True)
        )
        if not inside:
            raise ValueError(f"{self} is not inside {outer}")
        return tuple(slice(a - first, b - first) for (a, b), first in zip(self._ranges(), outer.starts, strict=True))

    def rows(self, first: int, stop: int) -> "Box":
        """Rows [first, stop) of it along dim 0, counted from its own first."""
        return Box((self.starts[0] + first, *self.starts[1:]), (self.starts[0] + stop, *self.stops[1:]))

    def row_blocks(self, most: int) -> Iterator[tuple[slice, "Box"]]:
        """Blocks of at most `most` rows of dim 0: (which rows of an array that holds this box, their box)."""
        for start in range(self.starts[0], self.stops[0], most):
            stop = min(start + most, self.stops[0])
            block = Box((start, *self.starts[1:]), (stop, *self.stops[1:]))
            yield slice(start - self.starts[0], stop - self.starts[0]), block

    def _ranges(self) -> Iterator[tuple[int, int]]:
        return zip(self.starts, self.stops, strict=True)
