"""signSGD: p ← p − η sign(g). Every weight moves by the learning rate. An optimiser is one file.

Source: Bernstein et al., signSGD, arXiv:1802.04434.
"""

from dataclasses import dataclass
from typing import Any

from mlm_mpi.backend.arrays import module_of
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.config.keys import key
from mlm_mpi.optim import Common
from mlm_mpi.params.store import FlatStore


@dataclass(frozen=True)
class Settings(Common):
    """signSGD; clipping changes no sign, and there is no weight decay."""

    name: str = key("signs", says="This optimiser updates the weights.", room="optim")


def build(settings: Settings, store: FlatStore, mesh: Mesh) -> "Signs":
    """The optimiser over all weights of a rank, which lie in one flat buffer, `store.data`; it needs no other rank."""
    return Signs(store)


class Signs:
    """It has no state, so a checkpoint saves nothing but the weights."""

    def __init__(self, store: FlatStore) -> None:
        self.store = store

    def state(self) -> dict[str, Any]:
        """Name -> flat buffer, each saved with a checkpoint and read back."""
        return {}

    def step(self, gradient: Any, learning_rate: float, scale: float, number: int) -> None:
        """One update. `scale` makes a mean of the summed gradient and clips it; it is positive and changes no sign."""
        self.store.data -= learning_rate * module_of(gradient).sign(gradient)
        self.store.refresh()  # layers may compute with a copy in a narrower type
