"""Optimisers over flat buffers, schedules, clipping."""

from typing import TYPE_CHECKING, Any, Protocol

from mlm_mpi.optim.adamw import AdamW
from mlm_mpi.optim.sgd import SGD
from mlm_mpi.params.store import FlatStore

if TYPE_CHECKING:  # see models/gpt.py
    from mlm_mpi.config import Optim


class Optimizer(Protocol):
    """Updates `store.data` in place; its state is flat buffers of the store's layout."""

    def step(self, gradient: Any, learning_rate: float, scale: float, number: int) -> None: ...
    def state(self) -> dict[str, Any]: ...


def make_optimizer(optim: "Optim", store: FlatStore) -> Optimizer:
    """The optimiser a configuration names."""
    return AdamW(optim, store) if optim.name == "adamw" else SGD(optim, store)
