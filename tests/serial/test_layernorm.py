"""Layer normalisation: values, gradients, ragged row blocks, rows without variance."""

import numpy as np
import pytest
from numerics import directional, in_a_tree, poisoned, same_bits, strided

from mlm_mpi.backend.arrays import BLOCK_ELEMENTS
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.norm import LayerNorm
from mlm_mpi.ops import layernorm
from mlm_mpi.params.store import FlatStore

EPSILON = 1e-5


def _draw(n: int, c: int) -> tuple[np.ndarray, ...]:
    r = np.random.default_rng(n + c)
    return tuple(r.standard_normal(s) for s in [(n, c), (c,), (c,), (n, c)])


@pytest.mark.parametrize("size", [(1, 2), (5, 3), (33, 17), (BLOCK_ELEMENTS // 100 + 3, 100), (2, BLOCK_ELEMENTS + 1)])
@pytest.mark.parametrize("arrange", [np.ascontiguousarray, strided])
def test_values_and_gradients(size, arrange) -> None:  # type: ignore[no-untyped-def]
    x, gain, bias, dy = map(arrange, _draw(*size))
    y, statistics = layernorm.forward(x, gain, bias, EPSILON)
    mean, var = x.mean(axis=1, keepdims=True), x.var(axis=1, keepdims=True)
    assert np.allclose(y, (x - mean) / np.sqrt(var + EPSILON) * gain + bias, rtol=1e-11, atol=1e-12)
    dgain, dbias = poisoned(size[1]), poisoned(size[1])
    dx = layernorm.backward(dy, x, gain, statistics, dgain, dbias, accumulate=False)

    def objective() -> float:
        return float((layernorm.forward(x, gain, bias, EPSILON)[0] * dy).sum())

    for value, gradient in ((x, dx), (gain, dgain), (bias, dbias)):
        directional(objective, value, gradient)


def test_accumulate_adds_and_repetition_gives_equal_bits() -> None:
    x, gain, bias, dy = (a.astype("f4") for a in _draw(700, 100))
    _, statistics = layernorm.forward(x, gain, bias, EPSILON)
    results = []
    for _ in range(2):
        dgain, dbias = poisoned(100, dtype="f4"), poisoned(100, dtype="f4")
        dx = layernorm.backward(dy, x, gain, statistics, dgain, dbias, accumulate=False)
        results.append((dx, dgain, dbias))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    dgain, dbias = np.full(100, 3, "f4"), np.full(100, 3, "f4")
    layernorm.backward(dy, x, gain, statistics, dgain, dbias, accumulate=True)
    assert np.allclose(dgain, results[0][1] + 3, rtol=1e-5) and np.allclose(dbias, results[0][2] + 3, rtol=1e-5)


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 42])
def test_gradients_of_pieces_are_joined_by_the_tree(pieces: int) -> None:
    x, gain, bias, dy = _draw(42, BLOCK_ELEMENTS // 4)  # blocks of four rows
    _, statistics = layernorm.forward(x, gain, bias, EPSILON)
    parts, got = [], np.empty((2, len(gain)))
    for rows in np.split(np.arange(42), pieces):
        part = poisoned(2, len(gain))
        layernorm.backward(dy[rows], x[rows], gain, statistics[:, rows], *part, accumulate=False)
        parts.append(part)
    layernorm.backward(dy, x, gain, statistics, *got, accumulate=False, pieces=pieces)
    assert same_bits(got, in_a_tree(parts))
    assert np.allclose(got[1], dy.sum(axis=0), rtol=1e-9, atol=1e-11)


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    x, gain, bias, _ = (a.astype("f4") for a in _draw(BLOCK_ELEMENTS // 50, 100))
    y, _ = layernorm.forward(x, gain, bias, EPSILON)
    for row in (0, 1, len(x) - 1):
        assert same_bits(layernorm.forward(x[row : row + 1], gain, bias, EPSILON)[0][0], y[row])


def test_large_means_and_constant_rows_stay_finite_and_exact() -> None:
    x, gain, bias, dy = (a.astype("f4") for a in _draw(4, 64))
    x[0] = 7.0
    x[1] += 1e4
    y, statistics = layernorm.forward(x, gain, bias, EPSILON)
    assert np.array_equal(y[0], bias)
    exact = x[1].astype("f8")
    expected = (exact - exact.mean()) / np.sqrt(exact.var() + EPSILON) * gain + bias
    assert np.allclose(y[1], expected, atol=2e-3)
    dx = layernorm.backward(dy, x, gain, statistics, poisoned(64), poisoned(64), accumulate=False)
    assert np.isfinite(dx).all()


def test_nan_stays_visible() -> None:
    x, gain, bias, _ = _draw(5, 8)
    x[2, 3] = np.nan
    y, _ = layernorm.forward(x, gain, bias, EPSILON)
    assert np.isnan(y[2]).all() and np.isfinite(y[[0, 1, 3, 4]]).all()


def test_layer() -> None:
    layer = LayerNorm("name", 6, EPSILON)
    store = FlatStore([layer.parameters()], Mesh(), "f8")
    store.initialise(0)
    x, _, _, dy = _draw(9, 6)
    y, saved = layer.forward(x, Context())
    assert np.allclose(y.mean(axis=1), 0, atol=1e-12) and np.allclose(y.var(axis=1), 1, atol=1e-3)
    grad = store.by_parameter(poisoned(store.size))
    dx = layer.backward(dy, saved, Context(gradients=grad))
    for value, gradient in ((x, dx), *((p.data, grad[p]) for p in layer.parameters())):
        directional(lambda: float((layer.forward(x, Context())[0] * dy).sum()), value, gradient)
