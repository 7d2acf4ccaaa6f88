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


@pytest.mark.parametrize(
    ("rows", "columns", "pitch", "block"), [(5, 12, 40, 16), (3, 7, 9, 5), (1, 30, 90, 8), (9, 8, 16, 1000)]
)
@pytest.mark.parametrize("first", [0, 1, 4])
def test_squares_of_a_cut(gpu, rows, columns, pitch, block, first, rng):
    """Those of the cut as an array of its own, wherever it lies."""
    whole = rng.normal(size=(rows, pitch + first)).astype("f4")
    cut = device(whole)[:, first : first + columns]
    own = np.ascontiguousarray(whole[:, first : first + columns])
    found = run(clip.squares, cut, block)
    assert same_bits(found, run(clip.squares, device(own), block))
    assert same_bits(found, run(clip.squares, shifted(own.reshape(-1)), block))
    assert np.allclose(found.get(), clip.squares.__wrapped__(own.reshape(-1), block), rtol=1e-13, atol=0)


def test_not_finite_stays_in_its_block(gpu, rng):
    x = rng.normal(size=1000).astype("f4")
    x[[250, 730]] = np.nan, np.inf
    found = run(clip.squares, device(x), 100).get()
    assert np.isnan(found[2]) and found[7] == np.inf and np.isfinite(found).sum() == 8


def test_squares_that_float32_cannot_hold(gpu):
    x = np.array([3e38, 1e-30], "f4")
    assert np.isclose(run(clip.squares, device(x), 1).get(), x.astype("f8") ** 2, rtol=1e-15).all()
