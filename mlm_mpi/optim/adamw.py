"""AdamW: Adam with weight decay decoupled from the gradient.

Source: Kingma, Ba, arXiv:1412.6980; Loshchilov, Hutter, arXiv:1711.05101.
"""

import math
from typing import TYPE_CHECKING, Any

from mlm_mpi.backend.arrays import module_of
from mlm_mpi.backend.registry import served
from mlm_mpi.params.store import FlatStore

if TYPE_CHECKING:  # see models/gpt.py
    from mlm_mpi.config import Optim

_BLOCK = 1 << 15  # elements: two work arrays and slices of p, g, m, v stay in a core's L2 cache


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


def build(settings: "Optim", store: FlatStore) -> "AdamW":
    """The optimiser of a run."""
    return AdamW(settings, store)


class AdamW:
    """Moments as flat buffers; decay only on parameters that ask for it (not on norms and biases)."""

    def __init__(self, optim: "Optim", store: FlatStore) -> None:
        self.optim, self.store = optim, store
        self.moment1, self.moment2 = store.new_buffer(), store.new_buffer()

    def state(self) -> dict[str, Any]:
        return {"moment1": self.moment1, "moment2": self.moment2}

    def step(self, gradient: Any, learning_rate: float, scale: float, number: int) -> None:
        """Update number `number` (from 1) with g = scale · gradient. Cost: reads p, g, m, v, writes p, m, v."""
        o = self.optim
        rate = learning_rate / (1.0 - o.beta1**number)
        root = 1.0 / math.sqrt(1.0 - o.beta2**number)
        for span in self.store.spans:
            part = slice(span.start, span.stop)
            shrink = 1.0 - learning_rate * o.weight_decay * span.parameter.decay
            working = None if self.store.working is self.store.data else self.store.working[part]
            update(
                self.store.data[part], gradient[part], self.moment1[part], self.moment2[part],
                scale, o.beta1, o.beta2, root, o.epsilon, rate, shrink, working,
            )  # fmt: skip
