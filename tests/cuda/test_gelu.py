import numpy as np
import pytest
from agreement import assert_close, device, run, same_bits, shifted

from mlm_mpi.ops import gelu

SHAPES = [(1, 1), (3, 7), (5, 333), (2, 1000)]


def exact(x):
    return gelu.forward.__wrapped__(x.astype("f8"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", [device, shifted])
def test_forward(gpu, dtype, shape, place, rng):
    x = rng.normal(0, 3, shape).astype(dtype)
    y = run(gelu.forward, place(x))
    assert y.dtype == dtype
    assert_close(y, exact(x), dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("in_place", [False, True])
def test_backward(gpu, dtype, shape, in_place, rng):
    x, dy = (rng.normal(0, 2, shape).astype(dtype) for _ in range(2))
    gradient = device(dy)
    dx = run(gelu.backward, gradient, device(x), gradient if in_place else None)
    assert (dx is gradient) == in_place and dx.dtype == dtype
    assert_close(dx, gelu.backward.__wrapped__(dy.astype("f8"), x.astype("f8")), dtype)


def test_each_element_is_accurate(gpu, rng):
    x = np.concatenate([np.linspace(-5, 30, 4001), [-1e4, -60, 0, 1e-30, 1e4]]).astype("f4")[None]
    error = np.abs(run(gelu.forward, device(x)).get() - exact(x))
    assert (error <= 3e-6 * np.abs(exact(x)) + 1e-9).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_where_it_is(gpu, dtype, bad, rng):
    x = rng.normal(size=(3, 21)).astype(dtype)
    x[1, 4] = bad
    for found, wanted in (
        (run(gelu.forward, device(x)), exact(x)),
        (run(gelu.backward, device(x), device(x)), gelu.backward.__wrapped__(x.astype("f8"), x.astype("f8"))),
    ):
        assert np.array_equal(np.isfinite(found.get().astype("f8")), np.isfinite(wanted))


def test_twice_the_same_bits(gpu, dtype, rng):
    x = device(rng.normal(size=(9, 333)).astype(dtype))
    assert same_bits(run(gelu.forward, x), run(gelu.forward, x))
    assert same_bits(run(gelu.backward, x, x), run(gelu.backward, x, x))
