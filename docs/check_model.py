"""Is a model right? Its derivatives, their addition and its cache: python docs/check_model.py docs/mine bag"""

import sys
from dataclasses import replace

import numpy as np

from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.data.batch import Batch
from mlm_mpi.generation import logits
from mlm_mpi.layers.attention import KeyValueCache
from mlm_mpi.layers.base import Context, Sizes
from mlm_mpi.layers.chain import Chain
from mlm_mpi.layers.head import TokenHead
from mlm_mpi.params.store import FlatStore
from mlm_mpi.plug import named

VOCABULARY, STEP = 50, 1e-6
folder, kind = sys.argv[1:]
model = named(folder).find("models", kind, "model.kind")
trunk = model.build(model.Settings(), Sizes(VOCABULARY))
chain = Chain([*trunk.parts, TokenHead(trunk)])
store = FlatStore(chain.parameter_blocks(), Mesh(), "f8")  # float64
store.initialise(seed=0)
draw = np.random.default_rng(0)
ids, targets = draw.integers(0, VOCABULARY, (2, 3, 20))  # 3 rows of 20 tokens
batch = Batch(0, 0, {"ids": ids}, {"ids": targets}, targets.size)
gradient = np.full(store.size, np.nan)  # what backward does not write shows
context = Context(training=True, batch=batch, gradients=store.by_parameter(gradient))


def backward(accumulate: bool = False) -> float:
    """The loss; its gradient is written, or added to the one before."""
    ctx = replace(context, accumulate=accumulate, tally={})
    _, kept = chain.forward((), ctx)
    chain.backward((), kept, ctx)
    return float(ctx.tally["loss"])


def derivative(direction: np.ndarray) -> float:
    """Of the loss, as a difference quotient."""
    weights, found = store.data.copy(), []
    for step in (STEP, -STEP):
        store.data[:] = weights + step * direction
        found.append(backward())
    store.data[:] = weights
    return (found[0] - found[1]) / (2 * STEP)


wrong = []
for span in store.spans:  # each parameter for itself, along a random direction
    place = slice(span.start, span.stop)
    direction = np.zeros(store.size)
    direction[place] = draw.standard_normal(span.stop - span.start)
    measured = derivative(direction)
    backward()
    claimed = float(gradient[place] @ direction[place])
    if not abs(measured - claimed) <= 1e-5 * np.linalg.norm(gradient[place]):
        wrong.append(f"{span.parameter.name}: backward says {claimed:.6g}, the loss says {measured:.6g}")
doubled = [2 * part for part in store.views(gradient.copy())]
backward(accumulate=True)
if not all(map(np.allclose, store.views(gradient), doubled)):
    wrong.append("a gradient that is added a second time does not double")
cache = KeyValueCache(ids.shape[1])
pieces = [logits(chain, piece, cache) for piece in np.split(ids, [7, 8], axis=1)]
if not np.allclose(np.concatenate(pieces, axis=1), logits(chain, ids)):
    wrong.append("a generation with a cache sees other logits than one without")
print("\n".join(wrong) or f"{kind}: {len(store.spans)} derivatives, their addition and the cache are right")
sys.exit(bool(wrong))
