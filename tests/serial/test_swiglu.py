"""The gated product of SwiGLU: values, gradients, gates far out."""

import numpy as np
import pytest
from numerics import directional, poisoned, same_bits, strided

from mlm_mpi.backend.arrays import BLOCK_ELEMENTS
from mlm_mpi.ops import linear, swiglu


def _draw(n: int, f: int) -> tuple[np.ndarray, np.ndarray]:
    r = np.random.default_rng(n + f)
    return 2 * r.standard_normal((n, 2, f)), r.standard_normal((n, f))


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (BLOCK_ELEMENTS // 64 + 1, 32)])
@pytest.mark.parametrize("arrange", [np.ascontiguousarray, strided])
def test_values_and_gradients(size, arrange) -> None:  # type: ignore[no-untyped-def]
    x, dy = map(arrange, _draw(*size))
    a, b = x[:, 0], x[:, 1]
    assert np.allclose(swiglu.forward(x), a / (1 + np.exp(-a)) * b, rtol=1e-13, atol=1e-15)
    dx = swiglu.backward(dy, x)
    directional(lambda: float((swiglu.forward(x) * dy).sum()), x, dx)
    out = poisoned(*x.shape)
    assert swiglu.backward(dy, x, out) is out and same_bits(out, dx)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_the_input_s_memory_may_take_the_gradient(dtype: str) -> None:
    x, dy = (a.astype(dtype) for a in _draw(33, 19))
    expected, taken = swiglu.backward(dy, x), x.copy()
    swiglu.backward(dy, taken, taken)
    assert same_bits(taken, expected)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_gates_far_out_are_closed_or_the_identity(dtype: str) -> None:
    a = np.array([-1e4, -200, 0, 200, 1e4], dtype)
    x = np.stack([a, np.full_like(a, 3)])[None]
    assert np.array_equal(swiglu.forward(x), [[0, 0, 0, 600, 3e4]])
    da, db = swiglu.backward(np.ones((1, 5), dtype), x)[0]
    assert np.array_equal(da, [0, 0, 1.5, 3, 3]) and np.array_equal(db, [0, 0, 0, 200, 1e4])
    x[0, :, 2] = np.nan
    assert np.isnan(swiglu.forward(x)).tolist() == [[False, False, True, False, False]]


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_behind_a_product_gates_are_its_first_half(dtype: str) -> None:
    r = np.random.default_rng(1)
    x, w = r.standard_normal((9, 5)).astype(dtype), r.standard_normal((5, 2, 7)).astype(dtype)
    hidden, pre = linear.forward_swiglu(x, w.reshape(5, 14))
    assert same_bits(pre.reshape(9, 14), linear.forward(x, w.reshape(5, 14))) and same_bits(hidden, swiglu.forward(pre))
    assert np.allclose(pre[:, 0], x @ w[:, 0], rtol=1e-5, atol=1e-5)
