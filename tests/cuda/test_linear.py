import numpy as np
import pytest
from agreement import assert_close, device, run, same_bits, shifted, tree

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


@pytest.mark.parametrize(("rows", "pieces"), [(12, 4), (300, 3), (1000, 10), (1040, 13)])
def test_a_piece_is_the_sum_of_whoever_has_it_alone(gpu, dtype, rows, pieces, rng):
    """Of some columns too, as a cut along them leaves."""
    dy, start = rng.normal(1, 1, (rows, 40)).astype(dtype), rng.normal(size=40).astype("f4")
    sums = []
    for piece in np.split(dy, pieces):
        db = device(np.full(40, np.nan, "f4"))
        run(linear.bias_gradient, device(piece), db, False)
        sums.append(db.get())
    found, added, some = device(np.full(40, np.nan, "f4")), device(start), device(np.full(7, np.nan, "f4"))
    run(linear.bias_gradient, device(dy), found, False, pieces)
    assert np.array_equal(found.get(), tree(sums))
    assert_close(found, dy.astype("f8").sum(axis=0), "f4")
    run(linear.bias_gradient, device(dy), added, True, pieces)
    assert np.array_equal(added.get(), start + found.get()), "complete before it joins"
    run(linear.bias_gradient, device(dy[:, 5:12]), some, False, pieces)
    assert same_bits(some, found[5:12])


def test_some_columns_of_many_rows_have_the_same_sums(gpu, dtype, rng):
    dy = rng.normal(size=(2600, 1600)).astype(dtype)
    found, some = device(np.full(1600, np.nan, "f4")), device(np.full(8, np.nan, "f4"))
    run(linear.bias_gradient, device(dy), found, False)
    run(linear.bias_gradient, device(dy[:, 800:808]), some, False)
    assert same_bits(some, found[800:808])
