"""Labelled texts and masked windows as micro-batches; figures of classes."""

from collections import Counter

import numpy as np
import pytest
from streams import Tokens

from mlm_mpi.data.labelled import Example, Examples
from mlm_mpi.data.masking import Masked
from mlm_mpi.data.texts import Noise, Texts, balanced, batch_of, kept, sequence, too_long
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.figures import classes

EOT = 99


def example(first: int, second: int = 0, label: int = 0) -> Example:
    """Tokens 1, 2, … of a text, then 51, 52, … of a second one."""
    return Example(np.array([*range(1, first + 1), *range(51, 51 + second)], np.int32), first if second else 0, label)


def examples(lengths: list[int], labels: list[int]) -> Examples:
    offsets = np.cumsum([0, *lengths])
    return Examples(np.arange(offsets[-1]) % 90, offsets, np.array(labels), np.zeros(len(labels)))


@pytest.mark.parametrize("first", [0, 1, 4, 30])
@pytest.mark.parametrize("second", [0, 1, 5, 31])
@pytest.mark.parametrize("context", [8, 13, 80])
def test_what_is_too_long_loses_its_ends_the_longer_text_first(first: int, second: int, context: int) -> None:
    a, b = kept(first, second, context)
    room = context - (3 if second else 2)
    assert 0 <= a <= first and 0 <= b <= second and a + b == min(first + second, room)
    if a < first and b < second:
        assert abs(a - b) <= 1
    elif a < first:
        assert a >= b or not second
    elif b < second:
        assert b >= a


def test_a_sequence_has_ends_and_segments() -> None:
    ids, segments = sequence(example(2), 8, EOT)
    assert ids.tolist() == [EOT, 1, 2, EOT] and not segments.any()
    ids, segments = sequence(example(2, 3), 8, EOT)
    assert ids.tolist() == [EOT, 1, 2, EOT, 51, 52, 53, EOT]
    assert segments.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    ids, segments = sequence(example(9, 9), 8, EOT)
    assert ids.tolist() == [EOT, 1, 2, EOT, 51, 52, 53, EOT] or ids.tolist() == [EOT, 1, 2, 3, EOT, 51, 52, EOT]


def test_texts_lie_one_behind_the_other_and_no_text_is_padded() -> None:
    batch = batch_of([example(2, label=1), example(3, 1), example(0, label=2)], 16, EOT, segments=True)
    assert batch.texts == (4, 11, 13) and batch.spans() == [(0, 4), (4, 11), (11, 13)]
    assert batch.inputs["ids"][0].tolist() == [EOT, 1, 2, EOT, EOT, 1, 2, 3, EOT, 51, EOT, EOT, EOT, *3 * [EOT]]
    assert batch.inputs["places"][0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 0, 1, 0, 0, 0]
    assert batch.inputs["segments"][0].tolist() == [0] * 9 + [1] * 2 + [0] * 5
    assert batch.targets["classes"].tolist() == [1, 0, 2] and batch.count == 3


def test_a_batch_depends_on_its_arguments_alone() -> None:
    samples = Texts(examples([5, 9, 2], [0, 1, 0]), 16, EOT, noise=Noise(0.7, 0.3, 5))
    one, same, later = (samples.batch([2, 0, 1], step, 7) for step in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(one.arrays(), same.arrays(), strict=True))
    assert not np.array_equal(one.inputs["hidden"][0, :8], later.inputs["hidden"][0, :8]) or one.texts != later.texts


def test_noise_takes_parts_and_hides_tokens_as_often_as_it_says() -> None:
    noise, lengths, hidden, seen = Noise(0.5, 0.2, 0), Counter(), 0, 0
    for step in range(2000):
        part = noise.cropped(example(4), step, 3)
        lengths[len(part.ids)] += 1
        assert np.array_equal(part.ids, np.arange(part.ids[0], part.ids[0] + len(part.ids)))
        batch = batch_of([example(8)], 16, EOT, False, step)
        where = noise.hidden(batch, [3])
        assert not where[0, 0] and not where[0, 10:].any()
        hidden, seen = hidden + int(where.sum()), seen + 9
    assert 0.17 < hidden / seen < 0.23
    assert 0.56 < lengths[4] / 2000 < 0.69  # half of them, and a quarter of the others
    assert all(0.09 < lengths[k] / 2000 < 0.16 for k in (1, 2, 3))
    assert len(noise.cropped(example(3, 2), 1, 1).ids) == 5, "a pair stays whole"


def test_split_tokens_are_the_same_text_in_smaller_pieces() -> None:
    tokenizer = Tokenizer.train(["the other brother bothers the mother"] * 9, 300)
    parents = tokenizer.parents()
    assert (parents[:257] == -1).all() and (parents[257:] >= 0).all()
    ids = np.array(tokenizer.encode("the mother of the brother"), np.int32)
    second, whole = len(ids) - 2, tokenizer.decode(ids.tolist())
    lengths = []
    for step in range(300):
        made = Noise(0.0, 0.0, 4, 0.3, parents).apart(Example(ids, second, 0), step, 5)
        assert tokenizer.decode(made.ids.tolist()) == whole
        assert tokenizer.decode(made.ids[: made.second].tolist()) == tokenizer.decode(ids[:second].tolist())
        lengths.append(len(made.ids))
    assert min(lengths) == len(ids) and len(set(lengths)) > 5
    every = Noise(0.0, 0.0, 4, 1.0, parents).apart(Example(ids, second, 0), 0, 5)
    assert len(every.ids) == len(whole), "down to bytes"


def test_balanced_weights_make_labels_count_alike_and_texts_one_on_average() -> None:
    targets = np.array([0, 0, 0, 1, 2, 2])
    weights = balanced(targets, 3)
    assert np.allclose(np.bincount(targets, weights[targets]), 2) and weights[targets].mean() == pytest.approx(1)


def test_texts_that_are_too_long_are_counted() -> None:
    assert too_long(examples([5, 6, 7], [0, 0, 0]), 8, pairs=False) == (1, 9)
    assert too_long(examples([5, 6, 7], [0, 0, 0]), 8, pairs=True) == (2, 10)


class Words:
    """A tokenizer of 90 tokens; those with an odd number go on with a word."""

    eot, vocab_size = 89, 90


INNER = np.arange(90) % 2 == 1, np.ones(90, bool)  # (may continue a word, may be continued)


def masked(rate: float, whole: bool = True, context: int = 40) -> Masked:
    inner = INNER if whole else (np.zeros(90, bool), np.zeros(90, bool))
    return Masked(Tokens(4000), context, True, Words(), inner, rate, 1)  # type: ignore[arg-type]


def test_words_are_chosen_whole_and_their_tokens_hidden_replaced_or_left() -> None:
    samples, chosen, hidden, other, tokens = masked(0.15), 0, 0, 0, 0
    for step in range(60):
        batch = samples.batch([1, 4, 9], step, 0)
        plain = samples.windows.batch([1, 4, 9], step, 0).inputs["ids"]
        at, count = batch.targets["at"], batch.count
        assert len(at) % 8 == 0 and batch.targets["mask"].sum() == count and batch.targets["mask"][:count].all()
        where = np.zeros(plain.size, bool)
        where[at[:count]] = True
        assert np.array_equal(batch.targets["ids"][:count], plain.reshape(-1)[at[:count]])
        where = where.reshape(plain.shape)
        inside = INNER[0][plain[:, 1:]]
        assert np.array_equal(where[:, 1:][inside], where[:, :-1][inside]), "a word is chosen as a whole"
        assert not (batch.inputs["hidden"] & ~where).any()
        changed = (batch.inputs["ids"] != plain) & ~batch.inputs["hidden"]
        assert not (changed & ~where).any()
        chosen, hidden = chosen + int(where.sum()), hidden + int(batch.inputs["hidden"].sum())
        other, tokens = other + int(changed.sum()), tokens + plain.size
    assert 0.12 < chosen / tokens < 0.18 and 0.76 < hidden / chosen < 0.84 and 0.07 < other / chosen < 0.13


def test_a_window_always_has_something_to_find_and_ends_of_texts_are_nothing() -> None:
    samples = masked(1e-6, whole=False, context=8)
    for number in range(20):
        assert samples.batch([number], 0, 0).count >= 1
    ends = Masked(Tokens(100, value=89), 8, True, Words(), INNER, 0.5, 1)  # type: ignore[arg-type]
    assert ends.batch([0, 1], 0, 0).count == 0


def test_figures_of_classes_are_those_of_their_definitions() -> None:
    outcomes = np.array(
        [[0, 0, 0.9, 0.9], [0, 1, 0.6, 0.3], [1, 1, 0.8, 0.8], [1, 1, 0.7, 0.7], [2, 0, 0.5, 0.2], [2, 2, 0.4, 0.4]]
    )
    told = classes.figures(outcomes, ["a", "b", "c"])
    assert told["confusion"] == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]
    assert told["accuracy"] == pytest.approx(4 / 6)
    assert told["macro_precision"] == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
    assert told["macro_recall"] == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
    assert told["macro_f1"] == pytest.approx((1 / 2 + 4 / 5 + 2 / 3) / 3) == told["weighted_f1"]
    gaps = [0.1, -0.6, 0.2, 0.3, -0.5, 0.6]  # each outcome has a bin of its own, but 0.5 and 0.4 differ too
    assert told["calibration_error"] == pytest.approx(sum(map(abs, gaps)) / 6)
    lines = classes.lines(told | {"tokens": 6, "loss": 0.5}, "a checkpoint")
    assert lines[1].split()[-1] == "0.6667" and lines[7].split()[0] == "a"


def test_counts_of_labels_in_words() -> None:
    assert classes.counted(np.array([0, 1, 1]), ["no", "yes"]) == "yes 2, no 1"
    many = np.repeat(np.arange(8), np.arange(8, 0, -1))
    assert classes.counted(many, list("abcdefgh")) == "a 8, b 7, c 6, d 5, …, h 1"
