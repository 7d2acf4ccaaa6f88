"""Drawing tokens, and continuing a prompt with and without a cache."""

import itertools

import numpy as np
import pytest
from whole import Whole

from mlm_mpi.errors import ConfigError
from mlm_mpi.generation import Sampling, choose, continue_prompt
from mlm_mpi.models.gpt import Settings
from mlm_mpi.tasks.language_model import quality
from mlm_mpi.train.measure import Sums
from mlm_mpi.train.task import plain_lines

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1]))


def frequencies(sampling, draws=4000):
    chosen = [choose(LOGITS, sampling, number) for number in range(draws)]
    return np.bincount(chosen, minlength=4) / draws


def test_draws_follow_the_probabilities():
    np.testing.assert_allclose(frequencies(Sampling(temperature=1.0)), [0.5, 0.25, 0.15, 0.1], atol=0.03)


def test_temperature_sharpens_and_zero_is_the_likeliest():
    sharp = frequencies(Sampling(temperature=0.5))
    squares = np.array([0.5, 0.25, 0.15, 0.1]) ** 2
    np.testing.assert_allclose(sharp, squares / squares.sum(), atol=0.03)
    assert choose(LOGITS[::-1].copy(), Sampling(temperature=0), 0) == 3


def test_top_k_and_top_p_cut_the_tail():
    np.testing.assert_allclose(frequencies(Sampling(temperature=1.0, top_k=2)), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(Sampling(temperature=1.0, top_p=0.7)), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    assert set(np.flatnonzero(frequencies(Sampling(temperature=1.0, top_p=1e-6)))) == {0}


def test_a_seed_is_a_text():
    one, same, other = ([choose(LOGITS, Sampling(temperature=1.0, seed=s), n) for n in range(50)] for s in (1, 1, 2))
    assert one == same != other


def test_a_temperature_of_nearly_zero_is_zero():
    draw = np.random.default_rng(4)
    for number in range(100):
        logits = draw.normal(scale=10.0 ** draw.integers(-6, 30), size=50).astype("f4")
        logits[draw.integers(50)] = logits.max()  # often a tie
        for temperature in (1e-31, 1e-300, 1e-320, 5e-324):
            assert choose(logits, Sampling(temperature=temperature), number) == logits.argmax()
        if len(set(logits)) == 50:
            assert choose(logits, Sampling(temperature=1e-29), number) == logits.argmax()
        assert 0 <= choose(logits, Sampling(temperature=1e308), number) < 50


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": np.inf},
        {"temperature": np.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_impossible_sampling_is_refused(bad):
    with pytest.raises(ConfigError, match="must"):
        Sampling(**bad)


def test_cached_and_uncached_continuations_agree_beyond_the_context():
    whole = Whole(Settings(layers=2, width=24, heads=3, context=16, feed_forward=48, init_std=0.3), 40)
    whole.store.initialise(2)
    greedy = Sampling(temperature=0)
    texts = [
        list(itertools.islice(continue_prompt(whole.chain, 16, [1, 2, 3], greedy, cached=cached), 60))
        for cached in (True, False)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 2


def test_bits_per_character_compare_across_tokenizers():
    assert quality(Sums(300 * np.log(2.0), 300), 100)["bits_per_character"] == pytest.approx(3.0)


def test_figures_of_any_task_stand_in_one_column() -> None:
    numbers = {"tokens": 7, "loss": 1.0, "hidden_perplexity": 2.5, "nats of a guess": 3.0}
    lines = plain_lines(numbers, "checkpoint of step 1", ["hidden_perplexity", "nats of a guess"])
    assert lines[2:] == ["hidden perplexity   2.5", "nats of a guess     3"] and lines[1].index("1.0000") == 20
