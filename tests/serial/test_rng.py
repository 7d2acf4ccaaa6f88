"""Philox4x32-10 against its published known answers; streams, permutation, normals as pure functions."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_mpi import rng

# Random123 1.14, tests/kat_vectors: counter, key, result
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _hex(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_published_known_answers(counter: str, key: str, result: str) -> None:
    words = rng.philox(tuple(np.array([c], np.uint32) for c in _hex(counter)), tuple(_hex(key)))
    assert [int(w[0]) for w in words] == _hex(result)


def test_a_stream_is_the_published_function_of_its_counter() -> None:
    key = rng.key_of(3, "name")
    got = rng.words(key, 0, 12, step=7, micro_batch=5)
    for n in range(3):
        quad = rng.philox(tuple(np.array([c], np.uint32) for c in (n, 0, 5, 7)), key)
        assert got[4 * n : 4 * n + 4].tolist() == [int(w[0]) for w in quad]


def test_the_element_index_is_64_bits_wide() -> None:
    key = rng.key_of(3, "name")
    start = 4 * (1 << 32) - 4
    got = rng.words(key, start, 8)
    first = rng.philox(tuple(np.array([c], np.uint32) for c in (0xFFFFFFFF, 0, 0, 0)), key)
    second = rng.philox(tuple(np.array([c], np.uint32) for c in (0, 1, 0, 0)), key)
    assert got.tolist() == [int(w[0]) for w in first] + [int(w[0]) for w in second]


@pytest.mark.parametrize("draw", [rng.words, rng.uniform, rng.normal])
def test_slices_of_a_stream_equal_the_stream(draw) -> None:  # type: ignore[no-untyped-def]
    key = rng.key_of(1, "slices")
    whole = draw(key, 0, 1000)
    for start, count in [(0, 0), (0, 1), (1, 1), (3, 5), (4, 8), (997, 3), (7, 990)]:
        assert np.array_equal(draw(key, start, count), whole[start : start + count])


def test_slices_agree_across_the_inner_chunk() -> None:
    key, border = rng.key_of(1, "slices"), 4 * 65536
    assert np.array_equal(rng.words(key, 0, border + 9)[-17:], rng.words(key, border - 8, 17))
    assert np.array_equal(rng.normal(key, 0, 2 * 65536 + 9)[-17:], rng.normal(key, 2 * 65536 - 8, 17))


def test_seed_name_step_and_micro_batch_all_matter() -> None:
    base = rng.words(rng.key_of(1, "a"), 0, 64)
    others = [
        rng.words(rng.key_of(2, "a"), 0, 64),
        rng.words(rng.key_of(1, "b"), 0, 64),
        rng.words(rng.key_of(1, "a"), 0, 64, step=1),
        rng.words(rng.key_of(1, "a"), 0, 64, micro_batch=1),
    ]
    for other in others:
        assert (other == base).mean() < 0.1
    assert rng.key_of(1, "a", "b") != rng.key_of(1, "ab")


def test_uniform_lies_in_the_half_open_interval_with_the_right_moments() -> None:
    u = rng.uniform(rng.key_of(5, "u"), 0, 200_000)
    assert u.dtype == np.float32 and u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.004 and abs(u.var() - 1 / 12) < 0.002


def test_normal_moments_and_tail() -> None:
    z = rng.normal(rng.key_of(5, "z"), 0, 400_000)
    assert z.dtype == np.float64 and np.isfinite(z).all()
    assert abs(z.mean()) < 0.008 and abs(z.var() - 1) < 0.01
    assert abs((z**3).mean()) < 0.03 and abs((z**4).mean() - 3) < 0.1
    assert abs((np.abs(z) > 1.959964).mean() - 0.05) < 0.002
    assert abs(np.corrcoef(z[0::2], z[1::2])[0, 1]) < 0.01


def test_normals_have_known_bits() -> None:
    """Of 2026-11-27 on x86-64 with AVX2: any CPU, NumPy and Python draws the same weights."""
    drawn = rng.normal(rng.key_of(5, "z"), 0, 100_000).astype("<f8")
    assert hashlib.sha256(drawn.tobytes()).hexdigest()[:16] == "7e76c74140880167"


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63))
def test_permutation_is_a_bijection(n: int, seed: int) -> None:
    image = rng.permute(rng.key_of(seed, "epoch", 0), n, np.arange(n))
    assert np.array_equal(np.sort(image), np.arange(n))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_permutation_of_an_element_does_not_depend_on_its_neighbours(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 10**12))
    some = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True)))
    key = rng.key_of(9, n)
    together = rng.permute(key, n, some)
    assert len(set(together.tolist())) == len(some) and together.min() >= 0 and together.max() < n
    assert together.tolist() == [int(rng.permute(key, n, np.array(i))) for i in some]


def test_each_index_may_have_a_key_of_its_own() -> None:
    """As many epochs of a small corpus at once; more indices than are walked in one go."""
    n, epochs = 300, np.repeat(np.arange(60), 300)
    keys = [rng.key_of(4, "epoch", epoch) for epoch in range(60)]
    k0, k1 = np.array(keys, np.uint64).T
    together = rng.permute((k0[epochs], k1[epochs]), n, np.tile(np.arange(n), 60))
    assert np.array_equal(together, np.concatenate([rng.permute(key, n, np.arange(n)) for key in keys]))


def test_permutation_works_at_a_million_million_and_mixes() -> None:
    n = 10**12
    image = rng.permute(rng.key_of(1, "epoch", 0), n, np.arange(20_000)) / n
    assert abs(image.mean() - 0.5) < 0.01 and abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 0.03
    other = rng.permute(rng.key_of(1, "epoch", 1), n, np.arange(20_000)) / n
    assert abs(np.corrcoef(image, other)[0, 1]) < 0.03


def test_permutation_of_a_few_elements_reaches_every_order() -> None:
    orders = {tuple(rng.permute(rng.key_of(s, "p"), 4, np.arange(4)).tolist()) for s in range(400)}
    assert len(orders) == 24


def test_permutation_keeps_the_shape_and_refuses_what_is_outside() -> None:
    assert rng.permute((1, 2), 10, np.arange(6).reshape(2, 3)).shape == (2, 3)
    assert rng.permute((1, 2), 10, np.array([], np.int64)).size == 0
    for n, index in [(0, 0), (5, 5), (5, -1), ((1 << 62) + 1, 0)]:
        with pytest.raises(ValueError, match="permute"):
            rng.permute((1, 2), n, np.array([index]))
