"""Squared ReLU: values, gradients, what is not finite."""

import numpy as np
import pytest
from numerics import directional, same_bits, strided

from mlm_mpi.backend.arrays import BLOCK_ELEMENTS
from mlm_mpi.ops import linear, relu2


def _draw(n: int, f: int) -> tuple[np.ndarray, np.ndarray]:
    r = np.random.default_rng(n + f)
    return r.standard_normal((n, f)), r.standard_normal((n, f))


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (BLOCK_ELEMENTS // 64 + 1, 64)])
@pytest.mark.parametrize("arrange", [np.ascontiguousarray, strided])
def test_values_and_gradients(size, arrange) -> None:  # type: ignore[no-untyped-def]
    x, dy = map(arrange, _draw(*size))
    assert same_bits(relu2.forward(x), np.where(x > 0, x * x, 0))
    directional(lambda: float((relu2.forward(x) * dy).sum()), x, relu2.backward(dy, x))
    in_place = dy.copy()
    assert relu2.backward(in_place, x, out=in_place) is in_place and same_bits(in_place, relu2.backward(dy, x))


def test_the_kernel_has_the_bits_of_the_formula_and_nan_stays_visible() -> None:
    x, dy = (a.astype("f4") for a in _draw(600, 101))
    x[3, 4] = np.nan
    positive = np.where(x < 0, 0, x)
    assert np.array_equal(relu2.forward(x), positive * positive, equal_nan=True)
    assert np.array_equal(relu2.backward(dy, x), 2 * positive * dy, equal_nan=True)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_behind_a_product(dtype: str) -> None:
    x, w = (a.astype(dtype) for a in (_draw(9, 5)[0], _draw(5, 7)[0]))
    hidden, pre = linear.forward_relu2(x, w)
    assert same_bits(pre, linear.forward(x, w)) and same_bits(hidden, relu2.forward(pre))
