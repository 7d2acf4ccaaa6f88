import numpy as np
import pytest
from agreement import assert_close, device, run, same_bits, shifted, tree

from mlm_mpi.backend import registry
from mlm_mpi.ops import rmsnorm

SHAPES = [(19, 7), (9, 768), (2, 5000)]  # a warp, two and more to a row; few, because each is a compilation
EPSILON = 1e-5


def drawn(rng, shape, dtype):
    """dy, x, add (N, C), gain (C,), inverse (N,)"""
    dy, x, add = rng.normal(0.5, 1.5, (3, *shape)).astype(dtype)
    inverse = 1 / np.sqrt((x.astype("f8") ** 2).mean(axis=1) + EPSILON)
    return dy, x, add, rng.normal(1, 0.2, shape[1]).astype(dtype), inverse.astype("f4")


def wide(*arrays):
    return [a if a is None else a.astype("f8") for a in arrays]


@pytest.mark.parametrize("shape", [(1, 1), *SHAPES])
@pytest.mark.parametrize("place", [device, shifted])
def test_forward(gpu, dtype, shape, place, rng):
    _, x, _, gain, _ = drawn(rng, shape, dtype)
    y, inverse = run(rmsnorm.forward, place(x), place(gain), EPSILON)
    exact, exact_inverse = rmsnorm.forward.__wrapped__(*wide(x, gain), EPSILON)
    assert y.dtype == dtype and inverse.dtype == np.float32
    assert_close(y, exact, dtype, 2)
    assert_close(inverse, exact_inverse, "f4")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_backward(gpu, dtype, shape, accumulate, added, rng):
    dy, x, add, gain, inverse = drawn(rng, shape, dtype)
    start = rng.normal(size=shape[1]).astype("f4") if accumulate else np.full(shape[1], np.nan, "f4")
    found, exact, add = device(start), start.astype("f8"), add if added else None
    arguments = [device(a) for a in (dy, x, gain, inverse)]
    dx = run(rmsnorm.backward, *arguments, found, accumulate, device(add) if added else None)
    wanted = rmsnorm.backward.__wrapped__(*wide(dy, x, gain, inverse), exact, accumulate, *wide(add))
    assert dx.dtype == dtype
    assert_close(dx, wanted, dtype, 3)
    assert_close(found, exact, "f4", 2)


@pytest.mark.parametrize(("rows", "pieces"), [(12, 4), (260, 5)])
def test_a_piece_is_the_sum_of_whoever_has_it_alone(gpu, dtype, rows, pieces, rng):
    dy, x, _, gain, inverse = drawn(rng, (rows, 40), dtype)
    own = []
    for part in np.split(np.arange(rows), pieces):
        own.append(device(np.full(40, np.nan, "f4")))
        run(rmsnorm.backward, *map(device, (dy[part], x[part], gain, inverse[part])), own[-1], False)
    start = rng.normal(size=40).astype("f4")
    added = device(start)
    run(rmsnorm.backward, *map(device, (dy, x, gain, inverse)), added, True, pieces=pieces)
    assert np.array_equal(added.get(), start + tree([a.get() for a in own])), "complete before it joins"


def test_what_is_not_finite_stays_in_its_row_and_twice_the_same_bits(gpu, dtype, rng):
    dy, x, add, gain, inverse = drawn(rng, (70, 768), dtype)
    x[4, 3] = np.nan
    y, _ = run(rmsnorm.forward, device(x), device(gain), EPSILON)
    results = []
    for _ in range(2):
        dgain = device(np.zeros(768, "f4"))
        results.append((run(rmsnorm.backward, *map(device, (dy, x, gain, inverse)), dgain, True, device(add)), dgain))
    for found in (y, results[0][0]):
        finite = np.isfinite(found.get().astype("f8")).all(axis=1)
        assert not finite[4] and finite.sum() == 69
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_a_row_too_long_for_the_registers_is_refused(gpu, dtype):
    x, gain = device(np.ones((1, 12289), dtype)), device(np.ones(12289, dtype))
    rmsnorm.forward(x, gain, EPSILON)
    assert registry.fallbacks() == {"rmsnorm.forward: rows too long": 1}
