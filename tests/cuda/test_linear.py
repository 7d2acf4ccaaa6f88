import numpy as np
import pytest
from agreement import assert_close, device, run, same_bits, shifted

from mlm_mpi.ops import linear

SHAPES = [(1, 1), (3, 7), (40, 333), (2, 5000), (300, 8)]


@pytest.mark.parametrize("shape", [*SHAPES, (3, 0), (0, 5)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_bias_gradient(gpu, dtype, shape, accumulate, rng):
    dy = rng.normal(1, 1, shape).astype(dtype)
    before = rng.normal(size=shape[1]).astype("f4") if accumulate else np.full(shape[1], np.nan, "f4")
    db = device(before)
    run(linear.bias_gradient, device(dy), db, accumulate)
    assert_close(db, dy.astype("f8").sum(axis=0) + (before if accumulate else 0), "f4")


def test_not_finite_stays_in_its_column_and_twice_the_same_bits(gpu, dtype, rng):
    dy = rng.normal(size=(300, 72)).astype(dtype)
    dy[17, 5] = np.nan
    sums = [device(np.zeros(72, "f4")) for _ in range(2)]
    for db in sums:
        run(linear.bias_gradient, device(dy), db, False)
    assert np.flatnonzero(~np.isfinite(sums[0].get())).tolist() == [5]
    assert same_bits(*sums)
    run(linear.bias_gradient, shifted(dy), sums[1], False)
    assert same_bits(*sums), "another address"
