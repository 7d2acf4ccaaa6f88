import cupy
import numpy as np
import pytest
from agreement import assert_close, device, run, same_bits, tree

from mlm_mpi.backend import registry
from mlm_mpi.ops import rotary

# (B, T, G, U, D, numbers turned): 16 bytes at a time, a part of a head, one by one, more than a warp's lanes
SHAPES = [
    (2, 5, 2, 3, 64, 64),
    (1, 2, 1, 2, 128, 128),
    (1, 7, 2, 2, 32, 16),
    (2, 3, 1, 4, 10, 6),
    (1, 5, 4, 2, 6, 0),
    (1, 2, 1, 2, 130, 90),
]


def heads(rng, shape, dtype):
    """Queries and keys beside values in one array, and a view of that without them."""
    b, t, g, u, d = shape
    whole = rng.normal(0.5, 1, (b, t, g, u + 1, d)).astype(dtype)
    return whole, device(whole)[:, :, :, :u]


def tables(length, width):
    return rotary.tables(np.arange(length), width, 100.0)


def wide(*arrays):
    return [a if a is None else a.astype("f8") for a in arrays]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normal", [False, True])
def test_forward(gpu, dtype, shape, normal, rng):
    *shape, width = shape
    whole, x = heads(rng, shape, dtype)
    (cos, sin), gain = tables(shape[1], width), rng.normal(1, 0.3, (2, shape[4])).astype(dtype) if normal else None
    y, inverse = run(rotary.forward, x, device(cos), device(sin), device(gain) if normal else None, 0.1)
    wanted, exact = rotary.forward.__wrapped__(*wide(whole[:, :, :, :-1], cos, sin, gain), 0.1)
    assert y.dtype == dtype and y.flags.c_contiguous
    assert_close(y, wanted, dtype, 2)
    assert inverse is None if exact is None else inverse.dtype == np.float32
    if normal:
        assert_close(inverse, exact, "f4", 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("in_place", [False, True])
def test_backward_without_a_gain(gpu, dtype, shape, in_place, rng):
    *shape, width = shape
    whole, dy = heads(rng, shape, dtype)
    cos, sin = tables(shape[1], width)
    dx = run(rotary.backward, dy, None, device(cos), device(sin), out=dy if in_place else None)
    assert (dx is dy) == in_place
    wanted = rotary.backward.__wrapped__(*wide(whole[:, :, :, :-1], None, cos, sin))
    assert_close(cupy.ascontiguousarray(dx), wanted, dtype, 2)


def arrays(rng, shape, dtype):
    """dy, x (host), gain, inverse"""
    *shape, _ = shape
    dy, x = heads(rng, shape, dtype)[0][:, :, :, :-1], heads(rng, shape, dtype)[0][:, :, :, :-1]
    inverse = 1 / np.sqrt((x.astype("f8") ** 2).mean(axis=4) + 0.1)
    return dy, x, rng.normal(1, 0.3, (2, shape[4])).astype(dtype), inverse.astype("f4")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_backward(gpu, dtype, shape, accumulate, rng):
    cos, sin = tables(shape[1], shape[5])
    dy, x, gain, inverse = arrays(rng, shape, dtype)
    start = (rng.normal(size=gain.shape) if accumulate else np.full(gain.shape, np.nan)).astype("f4")
    found, exact, given = device(start), start.astype("f8"), [device(a) for a in (dy, x, cos, sin, gain, inverse)]
    dx = run(rotary.backward, *given, found, accumulate, out=given[0] if accumulate else None)
    wanted = rotary.backward.__wrapped__(*wide(dy, x, cos, sin, gain, inverse), exact, accumulate)
    assert_close(dx, wanted, dtype, 3)
    assert_close(found, exact, "f4", 4)


@pytest.mark.parametrize(("pieces", "shares"), [(1, 2), (4, 1), (12, 4)])
def test_pieces_and_shares_are_sums_of_whoever_has_them_alone(gpu, dtype, pieces, shares, rng):
    dy, x, gain, inverse = arrays(rng, (1, 12, 4, 3, 32, 32), dtype)
    cos, sin = tables(12, 32)

    def backward(t, g, accumulate=False, **how):
        start = np.ones((2, 32), "f4") if accumulate else np.full((2, 32), np.nan, "f4")
        dgain = device(start)
        given = (dy[:, t, g], x[:, t, g], cos[t], sin[t], gain, inverse[:, t, g])
        run(rotary.backward, *map(device, given), dgain, accumulate, **how)
        return dgain.get()

    rows, groups = 12 // pieces, 4 // shares
    sums = [
        tree([backward(slice(r, r + rows), slice(g, g + groups)) for r in range(0, 12, rows)])
        for g in range(0, 4, groups)
    ]
    everything = slice(None), slice(None)
    assert np.array_equal(backward(*everything, pieces=pieces, shares=shares), tree(sums))
    assert np.array_equal(backward(*everything, True, pieces=pieces, shares=shares), 1 + tree(sums)), (
        "whole, then added"
    )


def test_nan_stays_in_its_head_and_twice_the_same_bits(gpu, dtype, rng):
    dy, x, gain, inverse = arrays(rng, (2, 40, 2, 3, 32, 32), dtype)
    x[1, 3, 1, 2, 5] = np.nan
    cos, sin = tables(40, 32)
    y, _ = run(rotary.forward, *map(device, (x, cos, sin, gain)), 0.1)
    results = []
    for _ in range(2):
        dgain = device(np.zeros((2, 32), "f4"))
        results.append((run(rotary.backward, *map(device, (dy, x, cos, sin, gain, inverse)), dgain, False), dgain))
    for found in (y, results[0][0]):
        bad = np.isnan(found.get().astype("f8")).any(axis=4)
        assert bad[1, 3, 1, 2] and bad.sum() == 1
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_heads_too_wide_are_refused(gpu, dtype):
    x, empty = device(np.ones((1, 1, 1, 2, 1000 + 1), dtype)), device(np.empty((1, 0), "f4"))
    rotary.forward(x, empty, empty)
    assert registry.fallbacks() == {"rotary.forward: heads too wide": 1}
