"""Dropout masks are pure functions of (seed, name, step, micro-batch, global element)."""

import numpy as np
import pytest
from numerics import directional, same_bits

from mlm_mpi.layers.base import Context
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.ops import dropout
from mlm_mpi.ops.dropout import Draw
from mlm_mpi.rng import key_of

KEY = key_of(1, "dropout", "name")


def _mask(shape: tuple[int, ...], rate: float, key=KEY, step=4, micro_batch=2, start=0, dtype="f4") -> np.ndarray:  # type: ignore[no-untyped-def]
    return dropout.mask(Draw(rate, key, step, micro_batch), shape, start, dtype)


def test_a_slice_of_the_global_mask_is_the_mask_of_the_slice() -> None:
    whole = _mask((6, 7, 5), 0.3)
    for row in range(6):
        assert same_bits(_mask((7, 5), 0.3, start=row * 35), whole[row])
    assert same_bits(_mask((13,), 0.3, start=17), whole.reshape(-1)[17:30])


def test_step_micro_batch_name_and_seed_make_other_masks() -> None:
    base = _mask((4000,), 0.5)
    others = [
        _mask((4000,), 0.5, step=5),
        _mask((4000,), 0.5, micro_batch=3),
        _mask((4000,), 0.5, key_of(1, "dropout", "other")),
        _mask((4000,), 0.5, key_of(2, "dropout", "name")),
    ]
    for other in others:
        assert 0.4 < (other == base).mean() < 0.6


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_factors_keep_the_mean(rate: float) -> None:
    factors = _mask((200_000,), rate, dtype="f8")
    assert set(np.unique(factors)) == {0.0, 1.0 / (1.0 - rate)}
    assert abs((factors == 0).mean() - rate) < 0.004


def test_layer_is_the_identity_outside_training_and_at_rate_zero() -> None:
    x = np.random.default_rng(0).standard_normal((3, 5))
    for layer, ctx in ((Dropout("n", 0.5), Context()), (Dropout("n", 0.0), Context(training=True))):
        y, saved = layer.forward(x, ctx)
        assert y is x and saved is None and layer.backward(x, saved, ctx) is x


def test_layer_backward_uses_the_mask_of_its_forward() -> None:
    layer, ctx = Dropout("n", 0.4), Context(training=True, seed=3, step=9, micro_batch=1)
    r = np.random.default_rng(0)
    x, dy = r.standard_normal((30, 5)), r.standard_normal((30, 5))
    y, saved = layer.forward(x, ctx)
    assert same_bits(y, layer.forward(x, ctx)[0])
    directional(lambda: float((layer.forward(x, ctx)[0] * dy).sum()), x, layer.backward(dy, saved, ctx))
    assert np.array_equal(y == 0, layer.backward(dy, saved, ctx) == 0)
