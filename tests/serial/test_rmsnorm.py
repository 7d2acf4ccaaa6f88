"""Normalisation by the root mean square: values, gradients, pieces of rows, rows of zeros."""

import numpy as np
import pytest
from numerics import directional, in_a_tree, poisoned, same_bits, strided

from mlm_mpi.backend.arrays import BLOCK_ELEMENTS
from mlm_mpi.ops import rmsnorm

EPSILON = 1e-5


def _draw(n: int, c: int) -> tuple[np.ndarray, ...]:
    r = np.random.default_rng(n + c)
    return tuple(r.standard_normal(s) for s in [(n, c), (c,), (n, c)])


@pytest.mark.parametrize("size", [(1, 2), (5, 3), (33, 17), (BLOCK_ELEMENTS // 100 + 3, 100)])
@pytest.mark.parametrize("arrange", [np.ascontiguousarray, strided])
def test_values_and_gradients(size, arrange) -> None:  # type: ignore[no-untyped-def]
    x, gain, dy = map(arrange, _draw(*size))
    y, inverse = rmsnorm.forward(x, gain, EPSILON)
    root = np.sqrt((x**2).mean(axis=1) + EPSILON)
    assert np.allclose(y, x / root[:, None] * gain, rtol=1e-12) and np.allclose(inverse, 1 / root, rtol=1e-12)
    dgain = poisoned(size[1])
    dx = rmsnorm.backward(dy, x, gain, inverse, dgain, accumulate=False)
    for value, gradient in ((x, dx), (gain, dgain)):
        directional(lambda: float((rmsnorm.forward(x, gain, EPSILON)[0] * dy).sum()), value, gradient)
    assert np.allclose(rmsnorm.backward(dy, x, gain, inverse, dgain, True, dy), dx + dy, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["f4", "f8"])  # the kernel, the reference
@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 42])
def test_gradients_of_pieces_are_joined_by_the_tree_and_then_added(pieces: int, dtype: str) -> None:
    x, gain, dy = (a.astype(dtype) for a in _draw(42, 37))
    _, inverse = rmsnorm.forward(x, gain, EPSILON)
    parts, got, lane = [], poisoned(37, dtype=dtype), np.ones(37, dtype)
    for rows in np.split(np.arange(42), pieces):
        part = poisoned(37, dtype=dtype)
        rmsnorm.backward(dy[rows], x[rows], gain, inverse[rows], part, accumulate=False)
        parts.append(part)
    dx = rmsnorm.backward(dy, x, gain, inverse, got, accumulate=False, pieces=pieces)
    assert same_bits(got, in_a_tree(parts))
    assert same_bits(rmsnorm.backward(dy, x, gain, inverse, lane, True, None, pieces), dx)
    assert same_bits(lane, 1 + got)


def test_rows_of_zeros_are_finite_and_nan_stays_in_its_row() -> None:
    x, gain, dy = (a.astype("f4") for a in _draw(5, 64))
    x[0] = 0
    y, inverse = rmsnorm.forward(x, gain, EPSILON)
    assert not y[0].any() and inverse[0] == pytest.approx(EPSILON**-0.5)
    assert np.isfinite(rmsnorm.backward(dy, x, gain, inverse, poisoned(64, dtype="f4"), False)).all()
    x[2, 3] = np.nan
    y, _ = rmsnorm.forward(x, gain, EPSILON)
    assert np.isnan(y[2]).all() and np.isfinite(y[[0, 1, 3, 4]]).all()


def test_rows_that_do_not_fall_into_pieces_are_refused() -> None:
    for dtype in ("f4", "f8"):
        x, gain, dy = (a.astype(dtype) for a in _draw(10, 4))
        with pytest.raises(ValueError, match="10 rows in 3 equal pieces"):
            rmsnorm.backward(dy, x, gain, np.ones(10, dtype), gain.copy(), False, None, 3)
