import ml_dtypes
import numpy as np
import pytest
from agreement import assert_close, device, run, same_bits, shifted

from mlm_mpi.optim import adamw

NUMBERS = (0.7, 0.9, 0.95, 1.3, 1e-8, 1e-2, 0.999)


def drawn(rng, size):
    """p, gradient, m, v"""
    return [a.astype("f4") for a in (*rng.normal(size=(3, size)), rng.random(size))]


@pytest.mark.parametrize("size", [1, 7, 333, 5000])
@pytest.mark.parametrize("place", [device, shifted])
@pytest.mark.parametrize("with_copy", [False, True])
def test_update(gpu, size, place, with_copy, rng):
    arrays = drawn(rng, size)
    exact = [a.astype("f8") for a in arrays]
    adamw.update.__wrapped__(*exact, *NUMBERS)
    results = []
    for _ in range(2):
        found = [place(a) for a in arrays]
        working = place(np.full(size, np.nan, ml_dtypes.bfloat16)) if with_copy else None
        run(adamw.update, *found, *NUMBERS, working)
        results.append(found)
    for got, want in zip(found, exact, strict=True):
        assert_close(got, want, "f4")
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    if with_copy:
        assert same_bits(working, device(found[0].get().astype(ml_dtypes.bfloat16)))


def test_not_finite_stays_where_it_is(gpu, rng):
    arrays = drawn(rng, 40)
    arrays[1][6] = np.nan
    found = [device(a) for a in arrays]
    run(adamw.update, *found, *NUMBERS)
    for i in (0, 2, 3):
        assert np.flatnonzero(~np.isfinite(found[i].get())).tolist() == [6]


def test_the_reference_writes_the_copy_too(rng):
    arrays, working = drawn(rng, 333), np.zeros(333, ml_dtypes.bfloat16)
    adamw.update.__wrapped__(*arrays, *NUMBERS, working)
    assert np.array_equal(working, arrays[0].astype(ml_dtypes.bfloat16))
