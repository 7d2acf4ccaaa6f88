import pytest
from agreement import assert_close, device, poisoned

from mlm_mpi.backend import kernels
from mlm_mpi.ops import gelu


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 333)])
def test_gelu_forward(gpu, dtype, shape, rng):
    x = rng.normal(0, 3, shape).astype(dtype)
    with poisoned():
        y = gelu.forward(device(x))
    assert not kernels.fallbacks()
    assert_close(y, gelu.forward.__wrapped__(x.astype("f8")), dtype)
