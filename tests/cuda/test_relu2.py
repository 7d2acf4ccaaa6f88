import numpy as np
import pytest
from agreement import assert_close, device, run, shifted

from mlm_mpi.ops import relu2


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 333)])
@pytest.mark.parametrize("place", [device, shifted])
def test_forward_and_backward(gpu, dtype, shape, place, rng):
    x, dy = (rng.normal(0, 2, shape).astype(dtype) for _ in range(2))
    y = run(relu2.forward, place(x))
    assert y.dtype == dtype
    assert_close(y, relu2.forward.__wrapped__(x.astype("f8")), dtype)
    gradient, wanted = place(dy), relu2.backward.__wrapped__(dy.astype("f8"), x.astype("f8"))
    assert_close(run(relu2.backward, gradient, place(x)), wanted, dtype)
    assert run(relu2.backward, gradient, place(x), gradient) is gradient
    assert_close(gradient, wanted, dtype)


def test_nan_stays_where_it_is(gpu, dtype, rng):
    x = rng.normal(size=(3, 21)).astype(dtype)
    x[1, 4] = np.nan
    for found in (run(relu2.forward, device(x)), run(relu2.backward, device(x), device(x))):
        assert np.array_equal(np.isnan(found.get().astype("f8")), np.isnan(x.astype("f8")))
