import cupy
import numpy as np
import pytest
from agreement import device, run, same_bits, shifted

from mlm_mpi.ops import sums


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9, 19, 65])
def test_tree(gpu, count, rng):
    size, place = (333 if count < 9 else 13), (shifted if count == 5 else device)
    parts = [(rng.normal(size=size) * 10.0 ** rng.integers(-6, 6, size)).astype("f4") for _ in range(count)]
    wanted = np.empty(size, "f4")
    sums.tree.__wrapped__(parts, wanted)
    placed, out = [place(part) for part in parts], place(np.full(size, np.nan, "f4"))
    run(sums.tree, placed, out)
    assert same_bits(out, device(wanted)), "the same tree, so the same bits"
    assert all(same_bits(a, device(b)) for a, b in zip(placed, parts, strict=True)), "parts are only read"
    for position in {0, count - 1}:
        own = [cupy.array(part) for part in placed]
        run(sums.tree, own, own[position])
        assert same_bits(own[position], out), "out may be a part"


def test_not_finite_stays_where_it_is(gpu, rng):
    parts = rng.normal(size=(3, 40)).astype("f4")
    parts[1, 6] = np.inf
    out = device(np.zeros(40, "f4"))
    run(sums.tree, [device(part) for part in parts], out)
    assert np.flatnonzero(~np.isfinite(out.get())).tolist() == [6]


def test_the_reference_is_the_tree_of_the_reduction(rng):
    from mlm_mpi.comm.reduction import middle

    parts = rng.normal(size=(13, 50)).astype("f4")

    def add_up(first, stop):
        if stop - first == 1:
            return parts[first]
        return add_up(first, middle(first, stop)) + add_up(middle(first, stop), stop)

    out = np.empty(50, "f4")
    sums.tree.__wrapped__(list(parts), out)
    assert np.array_equal(out, add_up(0, 13))
