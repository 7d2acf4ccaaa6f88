"""Every weight moves by the learning rate, in the direction of its gradient's sign. An optimiser is one file.

Source: Bernstein et al., signSGD, arXiv:1802.04434.
"""

from dataclasses import dataclass

from mlm_mpi.backend.arrays import module_of
from mlm_mpi.config.keys import key
from mlm_mpi.optim import Common


@dataclass(frozen=True)
class Settings(Common):
    """signSGD."""

    name: str = key("signs", says="This optimiser updates the weights.", room="optim")


def build(settings, store):
    return Signs(store)


class Signs:
    """No state: nothing to save but the weights."""

    def __init__(self, store):
        self.store = store

    def state(self):
        return {}

    def step(self, gradient, learning_rate, scale, number):
        self.store.data -= learning_rate * module_of(gradient).sign(gradient)
        self.store.refresh()
