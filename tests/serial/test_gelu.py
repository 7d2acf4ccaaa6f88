"""GELU in its tanh form, and the feed-forward half that uses it."""

import math

import numpy as np
import pytest
from numerics import directional, poisoned, same_bits, strided

from mlm_mpi.backend.arrays import BLOCK_ELEMENTS
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.block import FeedForward
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.linear import Linear, ResidualLinear
from mlm_mpi.ops import gelu
from mlm_mpi.params.store import FlatStore


def _draw(n: int, f: int) -> tuple[np.ndarray, np.ndarray]:
    r = np.random.default_rng(n + f)
    return 2 * r.standard_normal((n, f)), r.standard_normal((n, f))


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (BLOCK_ELEMENTS // 64 + 1, 64), (3, BLOCK_ELEMENTS - 1)])
@pytest.mark.parametrize("arrange", [np.ascontiguousarray, strided])
def test_values_and_gradients(size, arrange) -> None:  # type: ignore[no-untyped-def]
    x, dy = map(arrange, _draw(*size))
    y = gelu.forward(x)
    expected = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert np.allclose(y, expected, rtol=1e-13, atol=1e-15)
    directional(lambda: float((gelu.forward(x) * dy).sum()), x, gelu.backward(dy, x))
    in_place = dy.copy()
    assert same_bits(gelu.backward(in_place, x, out=in_place), gelu.backward(dy, x)) and in_place is not dy


def test_the_tails_are_the_identity_and_zero_with_slopes_one_and_zero() -> None:
    x = np.array([[-1e4, -60.0, 0.0, 60.0, 1e4]], "f4")
    y = gelu.forward(x)
    assert np.array_equal(y, np.array([[0, 0, 0, 60, 1e4]], "f4"))
    assert np.array_equal(gelu.backward(np.ones_like(x), x), np.array([[0, 0, 0.5, 1, 1]], "f4"))


def test_twice_gives_equal_bits_and_nan_stays_visible() -> None:
    x, dy = (a.astype("f4") for a in _draw(600, 100))
    assert same_bits(gelu.forward(x), gelu.forward(x))
    assert same_bits(gelu.backward(dy, x), gelu.backward(dy, x))
    x[3, 4] = np.nan
    y = gelu.forward(x)
    assert np.isnan(y[3, 4]) and np.isnan(y).sum() == 1
    assert np.isnan(gelu.backward(dy, x)[3, 4])


def test_feed_forward() -> None:
    down = ResidualLinear("name.down", 10, 6, 0.3, Dropout("drop", 0.0))
    layer = FeedForward(Linear("name.up", 6, 10, 0.4, cut=1), down)
    store = FlatStore([layer.parameters()], Mesh(), "f8")
    store.initialise(0)
    r = np.random.default_rng(0)
    x, dy = r.standard_normal((9, 6)), r.standard_normal((9, 6))
    grad = store.by_parameter(poisoned(store.size))
    _, saved = layer.forward(x, Context())
    dx = layer.backward(dy, saved, Context(gradients=grad))
    pairs = [(x, dx)] + [(p.data, grad[p]) for p in layer.parameters()]
    for value, gradient in pairs:
        directional(lambda: float((layer.forward(x, Context())[0] * dy).sum()), value, gradient)
