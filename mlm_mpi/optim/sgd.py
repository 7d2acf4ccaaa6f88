"""Stochastic gradient descent with momentum: b ← μ b + g, p ← p − η b.

Source: Sutskever et al., ICML 2013, in the form PyTorch uses (no dampening, weight decay decoupled).
"""

from dataclasses import dataclass
from typing import Any

from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.config.keys import key
from mlm_mpi.ops import cast
from mlm_mpi.optim import Common
from mlm_mpi.params.store import FlatStore

MOMENTS = 1  # flat buffers that `state` holds


@dataclass(frozen=True)
class Settings(Common):
    """SGD: every weight moves by a decaying sum of its gradients."""

    name: str = key("sgd", says="This optimiser updates the weights.", room="optim")
    momentum: float = key(
        0.9,
        says="This much of the sum of gradients is kept at each step; 0 means plain gradient descent.",
        least=0,
        below=1,
    )


class SGD:
    """Momentum as a flat buffer; decay only on parameters that ask for it."""

    def __init__(self, optim: Settings, store: FlatStore) -> None:
        self.optim, self.store = optim, store
        self.momentum = store.new_buffer()

    def state(self) -> dict[str, Any]:
        return {"momentum": self.momentum}

    def step(self, gradient: Any, learning_rate: float, scale: float, number: int) -> None:
        """One update with g = scale · gradient."""
        self.momentum *= self.optim.momentum
        self.momentum += scale * gradient
        for span in self.store.spans:
            part = slice(span.start, span.stop)
            if span.parameter.decay:
                self.store.data[part] *= 1.0 - learning_rate * self.optim.weight_decay
            self.store.data[part] -= learning_rate * self.momentum[part]
        if self.store.working is not self.store.data:
            cast.to(self.store.data, self.store.working)


def build(settings: Settings, store: FlatStore, mesh: Mesh) -> SGD:
    """The optimiser over the parameters of a store."""
    return SGD(settings, store)
