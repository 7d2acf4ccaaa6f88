import numpy as np
import pytest
from agreement import assert_close, device, run, shifted

from mlm_mpi.ops import swiglu


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 1000), (2, 5000)])
@pytest.mark.parametrize("place", [device, shifted])
@pytest.mark.parametrize("in_place", [False, True])
def test_forward_and_backward(gpu, dtype, shape, place, in_place, rng):
    x, dy = rng.normal(0, 3, (shape[0], 2, shape[1])).astype(dtype), rng.normal(size=shape).astype(dtype)
    given = place(x)
    y = run(swiglu.forward, given)
    assert y.dtype == dtype
    assert_close(y, swiglu.forward.__wrapped__(x.astype("f8")), dtype)
    dx = run(swiglu.backward, place(dy), given, given if in_place else None)
    assert (dx is given) == in_place
    assert_close(dx, swiglu.backward.__wrapped__(dy.astype("f8"), x.astype("f8")), dtype)


def test_gates_far_out_and_nan(gpu, dtype):
    a = np.array([-1e4, -200, 0, 200, 1e4, np.nan], dtype)
    x = np.stack([a, np.full_like(a, 3)])[None]
    y = run(swiglu.forward, device(x)).get().astype("f8")
    assert np.array_equal(y[0, :4], [0, 0, 0, 600]) and y[0, 4] == pytest.approx(3e4, rel=4e-3) and np.isnan(y[0, 5])
    dx = run(swiglu.backward, device(np.ones((1, 6), dtype)), device(x)).get().astype("f8")[0]
    assert np.array_equal(dx[0, :5], [0, 0, 1.5, 3, 3]) and np.isnan(dx[:, 5]).all()
    assert np.allclose(dx[1, :5], [0, 0, 0, 200, 1e4], rtol=4e-3)
