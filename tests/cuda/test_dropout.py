import cupy
import numpy as np
import pytest
from agreement import assert_close, device, run, same_bits, shifted

from mlm_mpi.backend.cuda.provider import KERNELS
from mlm_mpi.ops import dropout
from mlm_mpi.rng import key_of

DRAW = dropout.Draw(0.3, key_of(5, "test"), 7, 2**32 - 1)


@pytest.mark.parametrize("start", [0, 4, 3, 1001, 2**34 - 8, 2**34 - 6])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 333)])
def test_masks_are_those_of_rng(gpu, dtype, start, shape):
    found = run(dropout.mask, DRAW, shape, start, dtype, cupy)
    assert found.dtype == dtype
    assert same_bits(found, device(dropout.mask.__wrapped__(DRAW, shape, start, dtype)))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 333), (2, 1000)])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("place", [device, shifted])
def test_forward(gpu, dtype, shape, with_residual, place, rng):
    x, residual = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    residual = residual if with_residual else None
    found = [run(dropout.forward, place(x), DRAW, place(residual) if with_residual else None) for _ in range(2)]
    assert same_bits(*found) and found[0].dtype == dtype
    wide = [None if a is None else a.astype("f8") for a in (x, residual)]
    assert_close(found[0], dropout.forward.__wrapped__(wide[0], DRAW, wide[1]), dtype)


# shape, start, strides of cuts of (4, 6, 40): columns, positions, both, one head, what no pack fits
CUTS = {
    "columns": ((4, 6, 8), 16, (240, 40, 1)),
    "positions": ((4, 3, 40), 120, (240, 40, 1)),
    "both": ((4, 3, 20), 20, (240, 40, 1)),
    "odd": ((4, 3, 7), 3, (240, 40, 1)),
    "one": ((1, 6, 1), 241, (240, 40, 1)),
    "run": ((2, 240), 480, (240, 1)),
    "rows": ((8, 3, 1, 40), 0, (120, 40, 240, 1)),
}


@pytest.mark.parametrize("name", CUTS)
def test_the_mask_of_a_cut_is_the_cut_of_the_mask(gpu, dtype, name, rng):
    shape, start, strides = CUTS[name]
    draw = DRAW._replace(start=start, strides=strides)
    whole = dropout.mask.__wrapped__(DRAW, (4 * 6 * 40,), 0, dtype)
    places = start + sum(
        np.arange(n).reshape(-1, *[1] * (len(shape) - i - 1)) * strides[i] for i, n in enumerate(shape)
    )
    assert same_bits(run(dropout.mask, draw, shape, 0, dtype, cupy), device(whole[places]))
    x, residual = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    y = run(dropout.forward, device(x), draw, device(residual))
    assert_close(y, x.astype("f8") * whole[places].astype("f8") + residual.astype("f8"), dtype)


def test_draws_for_other_arrays_are_refused(gpu):
    contract = KERNELS.entries()["dropout.forward"].contract
    x = device(np.ones((4, 8), "f4"))
    assert contract(x, DRAW._replace(strides=(16, 1))) == ""
    assert contract(x, DRAW._replace(strides=(1,))) and contract(x, DRAW._replace(strides=(1, 4)))
    five = device(np.ones((2,) * 5, "f4"))
    assert "three dims" in contract(five, DRAW._replace(strides=(1000, 300, 80, 20, 1)))


def test_dropped_means_zero(gpu, dtype):
    x = np.ones((4, 40), dtype)
    kept = dropout.mask.__wrapped__(DRAW, x.shape, 0, "f4") > 0
    assert 0 < kept.sum() < kept.size
    assert np.array_equal(run(dropout.forward, device(x), DRAW).get() != 0, kept)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_stays_where_it_is(gpu, dtype, bad, rng):
    x = rng.normal(size=(3, 40)).astype(dtype)
    x[1, 3] = bad
    y = run(dropout.forward, device(x), DRAW).get().astype("f8")
    assert np.argwhere(~np.isfinite(y)).tolist() == [[1, 3]]  # dropped or not: inf · 0 is NaN
