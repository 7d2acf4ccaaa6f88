"""Micro-batches that grow: no sample is left out or repeated, no token lost, and bad ramps are one line."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import Tokens

from mlm_mpi import config
from mlm_mpi.data.documents import Documents
from mlm_mpi.data.mixture import Mixture
from mlm_mpi.data.objectives import causal
from mlm_mpi.data.sampler import Sampler
from mlm_mpi.data.warmup import Pieces, Ramp
from mlm_mpi.errors import ConfigError
from mlm_mpi.rng import key_of, permute


def walked(ramp, steps):
    """The numbers of the first steps, stage by stage."""
    stages = 0
    while ramp.steps and ramp.first << stages < ramp.last:
        stages += 1
    numbers = []
    for step in range(steps):
        stage = sum(n * ramp.steps // stages <= step for n in range(stages)) - 1 if stages else 0
        numbers.append(ramp.last if step >= ramp.steps or not stages else ramp.first << stage)
    return numbers


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 30))
def test_a_ramp_doubles_in_stages_and_sums_in_closed_form(first, last, steps):
    ramp = Ramp(max(first, last), min(first, last), steps)
    if steps < ramp.doublings:
        return
    numbers = walked(ramp, 50)
    assert [ramp.at(step) for step in range(50)] == numbers
    assert [ramp.before(step) for step in range(51)] == [sum(numbers[:step]) for step in range(51)]
    assert ramp.stages()[0][0] == 0 and ramp.stages()[-1][1] == numbers[-1]
    assert [number for _, number in ramp.stages()] == sorted(set(numbers))


def test_stages():
    assert Ramp(16, 2, 9).stages() == [(0, 2), (3, 4), (6, 8), (9, 16)]
    assert Ramp(6, 2, 5).stages() == [(0, 2), (2, 4), (5, 6)]
    assert Ramp(8).stages() == [(0, 8)] and Ramp(8).at(0) == 8 and Ramp(8).before(10**9) == 8 * 10**9


def test_samples_are_contiguous_over_the_stages():
    seed, n, m, ramp = 7, 97, 3, Ramp(10, 2, 7)
    sampler = Sampler(seed, Mixture((n,)), m, ramp)
    drawn = [sampler.positions(step, index) for step in range(12) for index in range(m)]
    assert [len(rows) for rows in drawn[::m]] == [2, 2, 4, 4, 8, 8, 8, 10, 10, 10, 10, 10]
    stream = np.concatenate(drawn)
    expected = np.concatenate([permute(key_of(seed, "sampler", epoch), n, np.arange(n)) for epoch in range(3)])
    assert np.array_equal(stream, expected[: len(stream)]) and len(stream) == sampler.samples(12) == 3 * 86
    again = Sampler(seed, Mixture((n,)), m, ramp)
    for step, index in ((11, 2), (0, 1), (6, 0), (7, 1), (3, 2)):
        assert np.array_equal(again.positions(step, index), drawn[step * m + index])


def test_shorter_windows_are_the_same_text():
    whole = causal.samples(Tokens(100), 16, True)
    pieces = Pieces(whole, Ramp(16, 4, 6))
    for step, length in ((0, 4), (2, 4), (3, 8), (5, 8), (6, 16)):
        cut, full = pieces.batch([1, 4], step, 3), whole.batch([1, 4], step, 3)
        for mine, theirs in zip(cut.arrays(), full.arrays(), strict=True):
            assert mine.shape == (32 // length, length)
            assert mine.ravel().tolist() == theirs.ravel().tolist()
        assert (cut.count, cut.step, cut.index) == (full.count, step, 3) and len(pieces) == len(whole)
    cut = Documents(pieces, eot=5).batch([1, 4], 0, 0)
    assert cut.inputs["starts"].shape == (8, 4) and cut.inputs["starts"].max() < 4


GROWS = ("train.rows=8", "train.rows_warmup_steps=6")
LENGTHENS = ("model.context=128", "train.context_warmup_steps=6")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((*GROWS, "train.first_rows=8"), r"train\.first_rows = 8 must be below train\.rows = 8 to grow: lower it, or"),
        (("train.rows=8", "train.rows_warmup_steps=2"), r"_steps = 2 is too few for 3 stages from 1 to 8: set it to 3"),
        ((*GROWS, "train.steps=5", "optim.warmup_steps=0"), r"rows_warmup_steps = 6 exceeds train\.steps = 5: lower"),
        ((*LENGTHENS, "train.first_context=40"), r"= 40 does not double to model\.context = 128: set it to 32, or"),
        ((*LENGTHENS, "train.first_context=128"), r"= 128 does not double to model\.context = 128: set it to 64, or"),
        (("model.context=31", "train.context_warmup_steps=6"), r"to model\.context = 31: set an even context, or"),
        (("model.context=128", "train.context_warmup_steps=1"), r"= 1 is too few for 2 stages from 32 to 128: set"),
        ((*LENGTHENS, "train.steps=5", "optim.warmup_steps=0"), r"context_warmup_steps = 6 exceeds train\.steps = 5"),
        ((*GROWS, "backend.device=gpu", "backend.graphs=true"), r"graphs replays .* set backend\.graphs = false"),
        ((*LENGTHENS, "backend.device=gpu", "backend.graphs=true"), r"graphs replays micro-batches of one shape"),
    ],
)  # fmt: skip
def test_a_ramp_that_cannot_be_is_one_line(settings, said):
    with pytest.raises(ConfigError, match=said) as caught:
        config.load(None, settings)
    assert "\n" not in str(caught.value)


def test_other_objectives_are_not_cut(tmp_path):
    from mlm_mpi.plug import Plugins

    (tmp_path / "objectives").mkdir()
    (tmp_path / "objectives/mine.py").write_text("from mlm_mpi.data.objectives.causal import samples\n")
    with pytest.raises(ConfigError, match=r'task\.objective = "mine" does not heed train\.context_warmup_steps: take'):
        config.load(None, [*LENGTHENS, "task.objective=mine"], Plugins(tmp_path))
    assert config.load(None, LENGTHENS).train.context_ramp(128).stages() == [(0, 32), (3, 64), (6, 128)]
