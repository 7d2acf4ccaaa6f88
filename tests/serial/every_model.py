"""What any model of models/ has to hold."""

import numpy as np
import pytest
from numerics import directional, poisoned, same_bits
from whole import Whole

from mlm_mpi.layers.base import Context


def check_every_gradient(whole: Whole, ids, targets, mask) -> None:
    """Of a float64 model: the loss of both ways is one, and each gradient is the loss' slope, with dropout too."""
    ctx = Context(training=True, seed=3, step=5, micro_batch=1)
    whole.gradient = poisoned(whole.store.size)
    total = whole.loss_and_grad(ids, targets, mask, ctx)
    assert total == pytest.approx(whole.loss(ids, targets, mask, ctx), rel=1e-13)
    for span in whole.store.spans:
        p = span.parameter
        directional(lambda: whole.loss(ids, targets, mask, ctx), p.data, whole[p], tol=1e-6)


def check_bits(plain: Whole, recomputed: Whole, again: Whole, ids, targets, mask) -> None:
    """Of float32 models: recomputing, repeating, backwards in two halves give the same bits, accumulating adds."""
    wholes = plain, recomputed, again
    for whole in wholes:
        whole.gradient = poisoned(whole.store.size, dtype="f4")
        whole.loss_and_grad(ids, targets, mask, Context(training=True))
    views = [whole.store.views(whole.gradient) for whole in wholes]
    assert all(same_bits(a, b) and same_bits(a, c) for a, b, c in zip(*views, strict=True))
    again.gradient = poisoned(again.store.size, dtype="f4")
    for accumulate in (False, True):
        again.loss_and_grad(ids, targets, mask, Context(training=True, accumulate=accumulate), halves=True)
    views[2] = again.store.views(again.gradient)
    plain.loss_and_grad(ids, targets, mask, Context(training=True, accumulate=True))
    assert all(same_bits(a, c) for a, _, c in zip(*views, strict=True))
    assert all(np.allclose(a, 2 * b, rtol=1e-4, atol=1e-5) for a, b, _ in zip(*views, strict=True))
