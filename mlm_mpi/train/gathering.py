"""What ranks of a mesh hold parts of, brought together: whole arrays, and the hash of the weights."""

import functools
from dataclasses import dataclass

import numpy as np

from mlm_mpi.comm.collectives import assembled
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.params.store import FlatStore, Parameter

_WHAT = "the hash of the weights"


@dataclass(frozen=True)
class _Neighbour:
    """The grid as a rank sees it that differs from me along tp only."""

    mesh: Mesh
    number: int

    def size(self, axis: str | None) -> int:
        return self.mesh.size(axis)

    def coord(self, axis: str | None) -> int:
        return self.number if axis == "tp" else self.mesh.coord(axis)


def weights_sha256(store: FlatStore, mesh: Mesh) -> str:
    """The hash of the global weights, which is that of any other mesh. Collective over the mesh."""
    return store.weights_sha256(functools.partial(_whole, store, mesh))


def _whole(store: FlatStore, mesh: Mesh, parameter: Parameter, mine: np.ndarray | None) -> np.ndarray:
    """An array of which stages hold all or nothing, tp ranks parts, and dp ranks perhaps rows. Collective over all."""
    pp, tp, layout = mesh.group("pp"), mesh.group("tp"), parameter.layout
    if mine is not None and not parameter.frozen and store.kept != slice(0, store.size):
        span = next(span for span in store.spans if span.parameter is parameter)
        mine, (first, stop) = mine.copy(), store.rows(span)
        counts = mesh.group("dp").allgather((stop - first) * (mine.size // len(mine)), _WHAT)
        mesh.group("dp").gather_parts(mine.reshape(-1), counts, _WHAT)
    if mine is not None and tp.size > 1 and "tp" in layout.axes:
        boxes = [layout.box(_Neighbour(mesh, number)) for number in range(tp.size)]
        mine = assembled(tp, mine, boxes, layout.shape, _WHAT)
    holder = pp.allgather(mine is not None, "who holds which parameter").index(True)
    whole = np.empty(layout.shape, store.dtype) if mine is None else np.ascontiguousarray(mine)
    pp.spread(whole.reshape(-1), holder, _WHAT)
    return whole
