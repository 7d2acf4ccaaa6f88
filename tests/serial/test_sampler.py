"""Sample numbers to windows: the definition, nothing lost or repeated, any size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_mpi.data.mixture import Mixture
from mlm_mpi.data.objectives.causal import windows_of
from mlm_mpi.data.sampler import Sampler
from mlm_mpi.data.warmup import Ramp
from mlm_mpi.errors import DataError
from mlm_mpi.rng import key_of, permute


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 6), st.integers(0, 40))
def test_every_sample_of_an_epoch_exactly_once(seed, micro_batches, rows, more):
    n = micro_batches * rows + more
    sampler = Sampler(seed, Mixture((n,)), micro_batches, Ramp(rows))
    steps = -(-3 * n // (micro_batches * rows))
    drawn = [sampler.positions(s, i) for s in range(steps) for i in range(micro_batches)]
    stream = np.concatenate(drawn)
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


def test_the_definition():
    seed, n, m, b = 7, 11, 2, 4
    sampler = Sampler(seed, Mixture((n,)), m, Ramp(b))
    for step in range(6):
        for index in range(m):
            for row, window in enumerate(sampler.positions(step, index)):
                s = (step * m + index) * b + row
                assert window == permute(key_of(seed, "sampler", s // n), n, np.array([s % n]))[0]


def test_epochs_and_seeds_differ():
    first = Sampler(0, Mixture((64,)), 8, Ramp(8))
    epochs = [np.concatenate([first.positions(step, i) for i in range(8)]).tolist() for step in range(3)]
    other = np.concatenate([Sampler(1, Mixture((64,)), 8, Ramp(8)).positions(0, i) for i in range(8)]).tolist()
    assert len({tuple(order) for order in [*epochs, other]}) == 4


def test_a_million_million_windows():
    n = 10**12
    sampler = Sampler(3, Mixture((n,)), 16, Ramp(64))
    last = n // (16 * 64)
    drawn = np.concatenate([sampler.positions(step, 5) for step in (0, 1, last - 1, last, 10 * last)])
    assert drawn.dtype == np.int64 and drawn.min() >= 0 and drawn.max() < n and len(np.unique(drawn)) == drawn.size
    assert drawn.max() > n // 2


def test_corpus_smaller_than_a_step():
    Sampler(0, Mixture((32,)), 4, Ramp(8))
    with pytest.raises(
        DataError, match=r"has 31 windows, one step takes .* = 32: prepare more text, or lower"
    ) as caught:
        Sampler(0, Mixture((31,)), 4, Ramp(8))
    assert "\n" not in str(caught.value)


def test_windows():
    assert [windows_of(tokens, 4) for tokens in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]
