"""Affine map: product, both halves of its gradient, the layer around it."""

import numpy as np
import pytest
from numerics import directional, in_a_tree, poisoned, same_bits, strided

from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.linear import Linear
from mlm_mpi.ops import linear
from mlm_mpi.params.store import FlatStore

SIZES = [(1, 1, 1), (5, 3, 7), (17, 31, 1), (64, 9, 33)]


def _draw(n: int, k: int, f: int) -> tuple[np.ndarray, ...]:
    r = np.random.default_rng(n * k * f)
    return tuple(r.standard_normal(s) for s in [(n, k), (k, f), (f,), (n, f)])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arrange", [np.ascontiguousarray, strided])
def test_gradients(size, arrange) -> None:  # type: ignore[no-untyped-def]
    x, w, b, dy = map(arrange, _draw(*size))
    assert np.allclose(linear.forward(x, w, b), np.einsum("nk,kf->nf", x, w) + b, rtol=1e-13)
    dw, db = poisoned(*w.shape), poisoned(*b.shape)
    linear.backward_weight(dy, x, dw, db, accumulate=False)
    dx = linear.backward_input(dy, w)

    def objective() -> float:
        return float((linear.forward(x, w, b) * dy).sum())

    for value, gradient in ((x, dx), (w, dw), (b, db)):
        directional(objective, value, gradient)


@pytest.mark.parametrize("dtype", ["f4", "f8"])  # the kernel, the reference
def test_without_a_bias(dtype: str) -> None:
    x, w, b, dy = (a.astype(dtype) for a in _draw(17, 24, 8))
    dw, other, none = poisoned(24, 8, dtype=dtype), poisoned(24, 8, dtype=dtype), np.zeros_like(b)
    linear.backward_weight(dy, x, dw, None, accumulate=False, pieces=17)
    linear.backward_weight(dy, x, other, none, accumulate=False, pieces=17)
    assert same_bits(dw, other)
    for residual, shares in ((None, 1), (dy, 1), (dy, 8)):
        expected = linear.forward(x, w, np.zeros_like(b), residual, shares)
        assert same_bits(linear.forward(x, w, None, residual, shares), expected)
    assert all(map(same_bits, linear.forward_gelu(x, w), linear.forward_gelu(x, w, np.zeros_like(b))))


@pytest.mark.parametrize(("shares", "segments"), [(2, 1), (4, 3), (8, 1)])
def test_shares_are_sums_of_their_own_that_a_tree_joins(shares: int, segments: int) -> None:
    x, w, b, dy = _draw(5, 24, 24)
    k = np.arange(24).reshape(segments, shares, -1)
    parts = [dy[:, k[:, share].ravel()] @ w.T[k[:, share].ravel()] for share in range(shares)]
    while len(parts) > 1:
        parts = [one + two for one, two in zip(parts[::2], parts[1::2], strict=True)]
    assert same_bits(linear.backward_input(dy, w, None, shares, segments), parts[0])
    residual = np.ones_like(dy)
    expected = linear.forward(x, w, b, residual)
    assert np.allclose(linear.forward(x, w, b, residual, shares), expected, rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match="reshape"):
        linear.backward_input(dy[:, :23], w[:, :23], None, shares, segments)


def test_accumulate_adds_and_repetition_gives_equal_bits() -> None:
    x, _, _, dy = (a.astype("f4") for a in _draw(19, 6, 5))
    first, again = (poisoned(6, 5, dtype="f4"), poisoned(5, dtype="f4")), (np.ones((6, 5), "f4"), np.ones(5, "f4"))
    linear.backward_weight(dy, x, *first, accumulate=False)
    linear.backward_weight(dy, x, *again, accumulate=True)
    for a, b in zip(first, again, strict=True):
        assert np.allclose(b, a + 1, rtol=1e-6)
    repeated = poisoned(6, 5, dtype="f4"), poisoned(5, dtype="f4")
    linear.backward_weight(dy, x, *repeated, accumulate=False)
    assert all(same_bits(a, b) for a, b in zip(first, repeated, strict=True))


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 42])
def test_bias_gradients_of_pieces_are_joined_by_the_tree(pieces: int) -> None:
    _, _, _, dy = _draw(42, 6, 5)
    got, lane = poisoned(5), np.ones(5)
    linear.bias_gradient(dy, got, False, pieces)
    assert same_bits(got, in_a_tree([part.sum(axis=0) for part in np.split(dy, pieces)]))
    linear.backward_weight(dy, _draw(42, 6, 5)[0], np.ones((6, 5)), lane, True, pieces)
    assert same_bits(lane, 1 + got)


def test_the_halves_of_the_layers_backward_are_its_backward() -> None:
    layer = Linear("name", 6, 5, 0.3)
    store = FlatStore([layer.parameters()], Mesh(), "f8")
    store.initialise(0)
    x, _, _, dy = _draw(19, 6, 5)
    y, saved = layer.forward(x, Context())
    assert np.allclose(y, x @ layer.weight.data + layer.bias.data)
    whole, halves = poisoned(store.size), poisoned(store.size)
    dx = layer.backward(dy, saved, Context(gradients=store.by_parameter(whole)))
    assert same_bits(layer.backward_input(dy, Context()), dx)
    layer.backward_weight(dy, saved, Context(gradients=store.by_parameter(halves)))
    assert same_bits(whole, halves)
