"""The mesh: a named grid of ranks. A rank is a coordinate; a collective runs over the group of an axis."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mlm_mpi.comm.group import Group

AXES = ("pp", "dp", "tp")  # tp varies fastest: its ranks, which talk most, are neighbours


@dataclass(frozen=True)
class Mesh:
    """My place in the grid. `cuts`: the groups of axes along which the world is cut; all of it is dp where none is.

    `sequence`: between the sums of a layer, ranks of tp hold some positions each, all of them otherwise.
    """

    world: Group = field(default_factory=Group)
    cuts: Mapping[str, Group] = field(default_factory=dict)
    sequence: bool = False

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

    def column(self, stage: int, part: int) -> list[int]:
        """Ranks of the world that hold the same of a model, by their coordinate along dp."""
        dp, tp = self.size("dp"), self.size("tp")
        return [(stage * dp + copy) * tp + part for copy in range(dp)]

    def columns(self) -> list[list[int]]:
        """All of them."""
        return [self.column(stage, part) for stage in range(self.size("pp")) for part in range(self.size("tp"))]

    def with_timeout(self, timeout_s: float) -> "Mesh":
        """The same grid, whose waits last as long."""
        cuts = {axis: group.with_timeout(timeout_s) for axis, group in self.cuts.items()}
        return replace(self, world=self.world.with_timeout(timeout_s), cuts=cuts)

    @property
    def is_plain(self) -> bool:
        """Whether every rank holds the whole model."""
        return not self.cuts

    def __str__(self) -> str:
        return " × ".join(f"{axis} {self.size(axis)}" for axis in AXES)


def placement(mesh: Mesh) -> str:
    """Where the ranks that talk most lie, in words; "" where each has a whole model. Collective over the world."""
    if mesh.is_plain:
        return ""
    hosts = mesh.world.allgather(os.uname().nodename, "the names of nodes")
    dp, tp = mesh.size("dp"), mesh.size("tp")
    count = len({*hosts})
    if count == 1:
        return "all ranks on one node"
    groups = [hosts[first : first + tp] for first in range(0, len(hosts), tp)]
    if wide := sum(len({*group}) > 1 for group in groups):
        return f"{wide} of {len(groups)} groups of tp span nodes, of {count}: give a node whole groups (--map-by slot)"
    copies = [{hosts[copy * tp + stage * dp * tp] for stage in range(mesh.size("pp"))} for copy in range(dp)]
    inside = "stages of a copy too" if all(len(nodes) == 1 for nodes in copies) else "stages on several"
    return f"{count} nodes, each group of tp on one, {inside}"


def mesh(world: Group, pp: int = 1, tp: int = 1, sequence: bool = False) -> Mesh:
    """That of all ranks, `pp` times `tp` of which share a copy of the model; it divides their number. Collective."""
    if pp == tp == 1:
        return Mesh(world)
    dp = world.size // (pp * tp)
    rest, part = divmod(world.rank, tp)
    stage, copy = divmod(rest, dp)
    places = {"pp": copy * tp + part, "dp": stage * tp + part, "tp": stage * dp + copy}
    return Mesh(world, {axis: world.split(place, f"the group of {axis}") for axis, place in places.items()}, sequence)
