import numpy as np
import pytest
from agreement import device, run, same_bits, shifted

from mlm_mpi.params import clip


@pytest.mark.parametrize(("size", "block"), [(1, 100), (7, 3), (333, 100), (5000, 512), (5000, 7000), (70_000, 65_536)])
@pytest.mark.parametrize("place", [device, shifted])
def test_squares(gpu, size, block, place, rng):
    x = rng.normal(size=size).astype("f4")
    found = [run(clip.squares, place(x), block) for _ in range(2)]
    assert found[0].dtype == np.float64 and same_bits(*found)
    assert np.allclose(found[0].get(), clip.squares.__wrapped__(x, block), rtol=1e-13, atol=0)


def test_not_finite_stays_in_its_block(gpu, rng):
    x = rng.normal(size=1000).astype("f4")
    x[[250, 730]] = np.nan, np.inf
    found = run(clip.squares, device(x), 100).get()
    assert np.isnan(found[2]) and found[7] == np.inf and np.isfinite(found).sum() == 8


def test_squares_that_float32_cannot_hold(gpu):
    x = np.array([3e38, 1e-30], "f4")
    assert np.isclose(run(clip.squares, device(x), 1).get(), x.astype("f8") ** 2, rtol=1e-15).all()
