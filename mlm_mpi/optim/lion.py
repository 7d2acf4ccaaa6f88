"""Lion: p ← (1 − η λ) p − η sign(β₁ m + (1 − β₁) g), then m ← β₂ m + (1 − β₂) g. Every weight moves by the same.

Source: Chen et al., "Symbolic discovery of optimization algorithms", arXiv:2302.06675. Its authors advise a learning
rate 3 to 10 times smaller than AdamW's and a decay as many times larger.
"""

from dataclasses import dataclass
from typing import Any

from mlm_mpi.backend.arrays import module_of, row_blocks
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.config.keys import key
from mlm_mpi.ops import cast
from mlm_mpi.optim import Common
from mlm_mpi.params.store import FlatStore

MOMENTS = 1  # flat buffers that `state` holds


@dataclass(frozen=True)
class Settings(Common):
    """Lion: every weight moves by the learning rate, against the sign of a mix of gradient and momentum."""

    name: str = key("lion", says="This optimiser updates the weights.", room="optim")
    learning_rate: float = key(
        1e-4,
        says="Each step moves every weight by this much, once the warm-up has raised it: a third to a tenth of "
        "what AdamW needs.",
        least=0,
    )
    beta1: float = key(
        0.9, says="The sign is that of this share of the momentum and the rest of the gradient.", least=0, below=1
    )
    beta2: float = key(0.99, says="This much of the momentum is kept at each step.", least=0, below=1)
    weight_decay: float = key(
        1.0,
        says="Each step takes this much, times the learning rate, of a weight off it, apart from the gradient; gains "
        "and biases keep theirs. Its steps are smaller than AdamW's, so it is as many times larger.",
        least=0,
    )


class Lion:
    """Momentum as a flat buffer; decay only on parameters that ask for it."""

    def __init__(self, optim: Settings, store: FlatStore) -> None:
        self.optim, self.store = optim, store
        self.momentum = store.new_buffer()

    def state(self) -> dict[str, Any]:
        return {"momentum": self.momentum}

    def step(self, gradient: Any, learning_rate: float, scale: float, number: int) -> None:
        """One update with g = scale · gradient."""
        o, store = self.optim, self.store
        for span in store.spans:
            part = slice(span.start, span.stop)
            shrink = 1.0 - learning_rate * o.weight_decay * span.parameter.decay
            update(
                store.data[part], gradient[part], self.momentum[part], scale, o.beta1, o.beta2, learning_rate, shrink
            )
        if store.working is not store.data:
            cast.to(store.data, store.working)


def update(
    p: Any, gradient: Any, m: Any, scale: float, beta1: float, beta2: float, rate: float, shrink: float
) -> None:  # fmt: skip
    """p = shrink · p − rate · sign(β₁ m + (1 − β₁) g), m = β₂ m + (1 − β₂) g; g = scale · gradient. Shapes: (n,)."""
    xp = module_of(p)
    for part in row_blocks(p):
        a, b = p[part], m[part]
        g = gradient[part] * scale
        sign = b * beta1
        sign += g * (1.0 - beta1)
        xp.sign(sign, out=sign)
        sign *= rate
        a *= shrink
        a -= sign
        b *= beta2
        g *= 1.0 - beta2
        b += g


def build(settings: Settings, store: FlatStore, mesh: Mesh) -> Lion:
    """The optimiser over the parameters of a store."""
    return Lion(settings, store)
