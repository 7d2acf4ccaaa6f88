"""The mesh: a named grid of ranks. A rank is a coordinate; a collective runs over the group of an axis."""

from dataclasses import dataclass, field

from mlm_mpi.comm.group import Group

AXES = ("pp", "dp", "tp")  # tp varies fastest


@dataclass(frozen=True)
class Mesh:
    """My place in the grid. Only the data-parallel axis has an extent so far; the others are 1."""

    world: Group = field(default_factory=Group)

    def size(self, axis: str | None) -> int:
        """Extent of an axis; an uncut dim (None) counts 1."""
        return self.world.size if axis == "dp" else 1

    def coord(self, axis: str | None) -> int:
        """My position along an axis."""
        return self.world.rank if axis == "dp" else 0

    def group(self, axis: str) -> Group:
        """The ranks that differ from me along this axis only."""
        return self.world if axis == "dp" else Group()

    def __str__(self) -> str:
        return " × ".join(f"{axis} {self.size(axis)}" for axis in AXES)
