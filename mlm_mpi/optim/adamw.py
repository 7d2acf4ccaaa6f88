"""AdamW: Adam with weight decay decoupled from the gradient.

Source: Kingma, Ba, arXiv:1412.6980; Loshchilov, Hutter, arXiv:1711.05101.
"""

import math
from typing import Any

from mlm_mpi.config import Optim
from mlm_mpi.params.store import FlatStore

_BLOCK = 1 << 15  # elements: two work arrays and slices of p, g, m, v stay in a core's L2 cache


class AdamW:
    """Moments as flat buffers; decay only on parameters that ask for it (not on norms and biases)."""

    def __init__(self, optim: Optim, store: FlatStore) -> None:
        self.optim, self.store = optim, store
        self.moment1, self.moment2 = store.new_buffer(), store.new_buffer()

    def state(self) -> dict[str, Any]:
        return {"moment1": self.moment1, "moment2": self.moment2}

    def step(self, gradient: Any, learning_rate: float, scale: float, number: int) -> None:
        """Update number `number` (from 1) with g = scale · gradient. Cost: reads p, g, m, v, writes p, m, v."""
        xp, o = self.store.xp, self.optim
        rate = learning_rate / (1.0 - o.beta1**number)
        root = 1.0 / math.sqrt(1.0 - o.beta2**number)
        work = xp.empty((2, min(_BLOCK, self.store.size)), self.store.dtype)
        for span in self.store.spans:
            shrink = 1.0 - learning_rate * o.weight_decay * span.parameter.decay
            for start in range(span.start, span.stop, _BLOCK):
                part = slice(start, min(start + _BLOCK, span.stop))
                p, m, v = self.store.data[part], self.moment1[part], self.moment2[part]
                g, u = work[0, : p.size], work[1, : p.size]
                xp.multiply(gradient[part], scale, out=g)
                m *= o.beta1
                xp.multiply(g, 1.0 - o.beta1, out=u)
                m += u
                v *= o.beta2
                g *= g
                g *= 1.0 - o.beta2
                v += g
                xp.sqrt(v, out=u)
                u *= root
                u += o.epsilon
                xp.divide(m, u, out=u)
                u *= rate
                p *= shrink
                p -= u
