import numpy as np
import pytest
from agreement import assert_close, device, run, same_bits, shifted, tree

from mlm_mpi.backend import registry
from mlm_mpi.ops import layernorm

SHAPES = [(19, 7), (9, 768), (3, 1000), (2, 5000)]  # a warp, two and more to a row; few, because each is a compilation
EPSILON = 1e-5


def drawn(rng, shape, dtype):
    """dy, x, add (N, C), gain, bias (C,)"""
    x = 1.5 * rng.normal(size=shape) + 2
    matrices = [rng.normal(size=shape), x, rng.normal(size=shape)]
    return [a.astype(dtype) for a in (*matrices, rng.normal(1, 0.2, shape[1]), rng.normal(0, 0.2, shape[1]))]


def wide(*arrays):
    return [a if a is None else a.astype("f8") for a in arrays]


def statistics_of(x):
    x = x.astype("f8")
    return np.stack([x.mean(axis=1), 1 / np.sqrt(x.var(axis=1) + EPSILON)]).astype("f4")


@pytest.mark.parametrize("shape", [(1, 1), *SHAPES])
def test_forward(gpu, dtype, shape, rng):
    _, x, _, gain, bias = drawn(rng, shape, dtype)
    y, statistics = run(layernorm.forward, *map(device, (x, gain, bias)), EPSILON)
    exact, exact_statistics = layernorm.forward.__wrapped__(*wide(x, gain, bias), EPSILON)
    assert y.dtype == dtype and statistics.dtype == np.float32
    assert_close(y, exact, dtype, 2)
    assert_close(statistics, exact_statistics, "f4")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_backward(gpu, dtype, shape, accumulate, added, rng):
    dy, x, add, gain, _ = drawn(rng, shape, dtype)
    statistics = statistics_of(x)
    sums = [rng.normal(size=shape[1]).astype("f4") if accumulate else np.full(shape[1], np.nan, "f4") for _ in range(2)]
    found, exact = [device(a) for a in sums], wide(*sums)
    add = add if added else None
    arguments = [device(a) for a in (dy, x, gain, statistics)]
    dx = run(layernorm.backward, *arguments, *found, accumulate, device(add) if added else None)
    wanted = layernorm.backward.__wrapped__(*wide(dy, x, gain, statistics), *exact, accumulate, *wide(add))
    assert dx.dtype == dtype
    assert_close(dx, wanted, dtype, 3)
    for got, want in zip(found, exact, strict=True):
        assert_close(got, want, "f4", 2)


def test_float32_weights(gpu, dtype, rng):
    dy, x, add, gain, bias = drawn(rng, (9, 768), dtype)
    gain, bias = gain.astype("f4"), bias.astype("f4")
    y, statistics = run(layernorm.forward, *map(device, (x, gain, bias)), EPSILON)
    assert_close(y, layernorm.forward.__wrapped__(*wide(x, gain, bias), EPSILON)[0], dtype, 2)
    found, exact = [device(np.full(768, np.nan, "f4")) for _ in range(2)], [np.zeros(768) for _ in range(2)]
    dx = run(layernorm.backward, *map(device, (dy, x, gain)), statistics, *found, False, device(add))
    wanted = layernorm.backward.__wrapped__(*wide(dy, x, gain, statistics.get()), *exact, False, *wide(add))
    assert_close(dx, wanted, dtype, 3)


def test_rows_in_many_parts(gpu, dtype, rng):
    dy, x, _, gain, _ = drawn(rng, (2600, 7), dtype)  # more rows than one round of 256 parts of 8
    statistics = statistics_of(x)
    found, exact = [device(np.full(7, np.nan, "f4")) for _ in range(2)], [np.zeros(7) for _ in range(2)]
    dx = run(layernorm.backward, *map(device, (dy, x, gain, statistics)), *found, False)
    assert_close(dx, layernorm.backward.__wrapped__(*wide(dy, x, gain, statistics), *exact, False), dtype, 3)
    for got, want in zip(found, exact, strict=True):
        assert_close(got, want, "f4", 4)


@pytest.mark.parametrize(("rows", "pieces"), [(12, 4), (260, 5)])
def test_a_piece_is_the_sum_of_whoever_has_it_alone(gpu, dtype, rows, pieces, rng):
    dy, x, add, gain, _ = drawn(rng, (rows, 40), dtype)
    statistics = statistics_of(x)

    def backward(part, sums, accumulate, **how):
        arrays = (dy[part], x[part], gain, statistics[:, part])
        return run(layernorm.backward, *map(device, arrays), *sums, accumulate, device(add[part]), **how)

    own = []
    for number in range(pieces):
        sums = [device(np.full(40, np.nan, "f4")) for _ in range(2)]
        part = slice(number * rows // pieces, (number + 1) * rows // pieces)
        own.append((backward(part, sums, False).get(), *(s.get() for s in sums)))
    start = [rng.normal(size=40).astype("f4") for _ in range(2)]
    added = [device(s) for s in start]
    dx = backward(slice(None), added, True, pieces=pieces)
    assert np.array_equal(dx.get(), np.concatenate([rows for rows, *_ in own]))
    for got, before, parts in zip(added, start, list(zip(*own, strict=True))[1:], strict=True):
        assert np.array_equal(got.get(), before + tree(parts)), "complete before it joins"
    wanted = [np.zeros(40) for _ in range(2)]
    layernorm.backward.__wrapped__(*wide(dy, x, gain, statistics), *wanted, False, *wide(add))
    for parts, want in zip(list(zip(*own, strict=True))[1:], wanted, strict=True):
        assert np.allclose(tree(parts), want, rtol=1e-4, atol=1e-4)


def test_any_address(gpu, dtype, rng):
    dy, x, add, gain, bias = drawn(rng, (5, 8), dtype)
    y, statistics = run(layernorm.forward, *map(shifted, (x, gain, bias)), EPSILON)
    assert_close(y, layernorm.forward.__wrapped__(*wide(x, gain, bias), EPSILON)[0], dtype, 2)
    found, exact = [shifted(np.full(8, np.nan, "f4")) for _ in range(2)], [np.zeros(8) for _ in range(2)]
    dx = run(layernorm.backward, *map(shifted, (dy, x, gain)), statistics, *found, False, shifted(add))
    wanted = layernorm.backward.__wrapped__(*wide(dy, x, gain, statistics.get()), *exact, False, *wide(add))
    assert_close(dx, wanted, dtype, 3)
    assert_close(found[0], exact[0], "f4", 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row(gpu, dtype, bad, rng):
    dy, x, _, gain, bias = drawn(rng, (11, 768), dtype)
    statistics = device(statistics_of(x))
    x[4, 3] = bad
    y, seen = run(layernorm.forward, *map(device, (x, gain, bias)), EPSILON)
    sums = [device(np.zeros(768, "f4")) for _ in range(2)]
    dx = run(layernorm.backward, *map(device, (dy, x, gain)), statistics, *sums, False)
    for found in (y.get(), dx.get(), seen.get().T):
        finite = np.isfinite(found.astype("f8")).all(axis=1)
        assert not finite[4] and finite.sum() == 10
    assert not np.isfinite(sums[0].get()[3]) and np.isfinite(sums[1].get()).all()


def test_twice_the_same_bits(gpu, dtype, rng):
    dy, x, add, gain, bias = map(device, drawn(rng, (70, 768), dtype))
    results = []
    for _ in range(2):
        y, statistics = run(layernorm.forward, x, gain, bias, EPSILON)
        sums = [device(np.zeros(768, "f4")) for _ in range(2)]
        results.append((y, statistics, run(layernorm.backward, dy, x, gain, statistics, *sums, True, add), *sums))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_a_row_too_long_for_the_registers_is_refused(gpu, dtype):
    x, weight = device(np.ones((1, 12289), dtype)), device(np.ones(12289, dtype))
    layernorm.forward(x, weight, weight, EPSILON)
    assert registry.fallbacks() == {"layernorm.forward: rows too long": 1}
