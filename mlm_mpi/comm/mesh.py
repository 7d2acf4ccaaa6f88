"""The mesh: a named grid of ranks. A rank is a coordinate; a collective runs over the group of an axis."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlm_mpi.comm.group import Group

AXES = ("pp", "dp", "tp")  # tp varies fastest: its ranks, which talk most, are neighbours


@dataclass(frozen=True)
class Mesh:
    """My place in the grid. `cuts`: the groups of axes along which the world is cut; all of it is dp where none is."""

    world: Group = field(default_factory=Group)
    cuts: Mapping[str, Group] = field(default_factory=dict)

    def size(self, axis: str | None) -> int:
        """Extent of an axis; an uncut dim (None) counts 1."""
        return 1 if axis is None else self.group(axis).size

    def coord(self, axis: str | None) -> int:
        """My position along an axis."""
        return 0 if axis is None else self.group(axis).rank

    def group(self, axis: str) -> Group:
        """The ranks that differ from me along this axis only."""
        if self.cuts:
            return self.cuts.get(axis) or Group()
        return self.world if axis == "dp" else Group()

    def columns(self) -> list[range]:
        """Ranks of the world that hold the same parts of the model, for each part."""
        return [range(part, self.world.size, self.size("tp")) for part in range(self.size("tp"))]

    @property
    def is_plain(self) -> bool:
        """Whether every rank holds the whole model."""
        return not self.cuts

    def __str__(self) -> str:
        return " × ".join(f"{axis} {self.size(axis)}" for axis in AXES)


@dataclass(frozen=True)
class At:
    """The grid as a rank sees it that differs from me along an axis."""

    mesh: Mesh
    axis: str
    number: int

    def size(self, axis: str | None) -> int:
        """As that of the mesh."""
        return self.mesh.size(axis)

    def coord(self, axis: str | None) -> int:
        """Its position along an axis."""
        return self.number if axis == self.axis else self.mesh.coord(axis)


def mesh(world: Group, tp: int = 1) -> Mesh:
    """That of all ranks, `tp` of which share a copy of the model; it divides their number. Collective."""
    if tp == 1:
        return Mesh(world)
    across, inside = divmod(world.rank, tp)
    dp = world.split(inside, "the group of dp")
    return Mesh(world, {"dp": dp, "tp": world.split(across, "the group of tp")})
