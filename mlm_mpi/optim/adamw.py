"""AdamW: Adam with weight decay decoupled from the gradient.

Source: Kingma, Ba, arXiv:1412.6980; Loshchilov, Hutter, arXiv:1711.05101.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlm_mpi.backend.arrays import module_of
from mlm_mpi.backend.registry import served
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.config.keys import key
from mlm_mpi.exact import power
from mlm_mpi.optim import Common
from mlm_mpi.params.store import FlatStore, Span

_BLOCK = 1 << 15  # elements: two work arrays and slices of p, g, m, v stay in a core's L2 cache


MOMENTS = 2  # flat buffers that `state` holds


@dataclass(frozen=True)
class Settings(Common):
    """AdamW: every weight moves by its mean gradient over the root of its mean squared gradient."""

    name: str = key("adamw", says="This optimiser updates the weights.", room="optim")
    beta1: float = key(0.9, says="This much of the running mean of gradients is kept at each step.", least=0, below=1)
    beta2: float = key(
        0.95,
        says="This much of the running mean of their squares is kept at each step, 0.95 as in GPT-3 (Brown et al., "
        "arXiv:2005.14165) and not the 0.999 of Adam's paper.",
        least=0,
        below=1,
    )
    epsilon: float = key(1e-8, says="This is added to the root of the mean square, against division by zero.", above=0)


@served
def update(
    p: Any, gradient: Any, m: Any, v: Any, scale: float, beta1: float, beta2: float,
    root: float, epsilon: float, rate: float, shrink: float, working: Any = None,
) -> None:  # fmt: skip
    """m = β₁ m + (1 − β₁) g, v = β₂ v + (1 − β₂) g², p = shrink · p − rate · m / (root √v + ε); g = scale · gradient.

    Shapes: p, gradient, m, v (n,), changed in place but the gradient; working (n,) becomes p in its own dtype.
    """
    xp = module_of(p)
    work = xp.empty((2, min(_BLOCK, p.size)), p.dtype)
    for start in range(0, p.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        a, b, c = p[part], m[part], v[part]
        g, u = work[0, : a.size], work[1, : a.size]
        xp.multiply(gradient[part], scale, out=g)
        b *= beta1
        xp.multiply(g, 1.0 - beta1, out=u)
        b += u
        c *= beta2
        g *= g
        g *= 1.0 - beta2
        c += g
        xp.sqrt(c, out=u)
        u *= root
        u += epsilon
        xp.divide(b, u, out=u)
        u *= rate
        a *= shrink
        a -= u
        if working is not None:
            working[part] = a


def move(
    store: FlatStore, spans: Sequence[Span], gradient: Any, moments: tuple[Any, Any], optim: Settings,
    learning_rate: float, scale: float, number: int,
) -> None:  # fmt: skip
    """Update number `number` (from 1) of some parameters of a store, with g = scale · gradient."""
    rate = learning_rate / (1.0 - power(optim.beta1, number))
    root = 1.0 / math.sqrt(1.0 - power(optim.beta2, number))
    for span in spans:
        part = slice(span.start, span.stop)
        shrink = 1.0 - learning_rate * optim.weight_decay * span.parameter.decay
        working = None if store.working is store.data else store.working[part]
        update(
            store.data[part], gradient[part], moments[0][part], moments[1][part],
            scale, optim.beta1, optim.beta2, root, optim.epsilon, rate, shrink, working,
        )  # fmt: skip


class AdamW:
    """Moments as flat buffers; decay only on parameters that ask for it (not on norms and biases)."""

    def __init__(self, optim: Settings, store: FlatStore) -> None:
        self.optim, self.store = optim, store
        self.moment1, self.moment2 = store.new_buffer(), store.new_buffer()

    def state(self) -> dict[str, Any]:
        return {"moment1": self.moment1, "moment2": self.moment2}

    def step(self, gradient: Any, learning_rate: float, scale: float, number: int) -> None:
        """Update number `number` (from 1) with g = scale · gradient. Cost: reads p, g, m, v, writes p, m, v."""
        moments = self.moment1, self.moment2
        move(self.store, self.store.spans, gradient, moments, self.optim, learning_rate, scale, number)


def build(settings: Settings, store: FlatStore, mesh: Mesh) -> AdamW:
    """The optimiser over the parameters of a store."""
    return AdamW(settings, store)
