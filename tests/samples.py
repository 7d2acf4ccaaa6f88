"""Micro-batches of tasks whose samples are no windows of a stream: pure functions of (step, index), made in memory."""

from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import numpy as np

from mlm_mpi.config import Config
from mlm_mpi.data import tagged, texts, windows
from mlm_mpi.data.batch import Batch
from mlm_mpi.data.corruption import Corrupted, Spans
from mlm_mpi.data.dialogues import Dialogues, Rows
from mlm_mpi.data.preferences import Pairs
from mlm_mpi.data.questions import Cut
from mlm_mpi.data.sentences import Sentence
from mlm_mpi.data.translation import Pair, pairs_batch

VOCABULARY, LABELS = 64, 5
Plan = Iterable[tuple[int, int]]


def pairs(config: Config, plan: Plan) -> Iterator[Batch]:
    """Micro-batches of three pairs of texts, each of lengths of its own."""
    for step, index in plan:
        random = np.random.default_rng([step, index])
        some = []
        for source, target in random.integers(1, 12, (3, 2)):
            read, wanted, other = (random.integers(0, VOCABULARY, n).astype("i4") for n in (target, target, source))
            some.append(Pair(other, read, wanted))
        yield pairs_batch(some, 0, step, index)


class Text:
    """A stream of tokens."""

    tokens, split = 1000, "train"

    def read(self, start: int, stop: int):
        return (np.arange(start, stop) * 7 % VOCABULARY).astype(np.uint8)


def spans(config: Config, plan: Plan) -> Iterator[Batch]:
    """Micro-batches of windows from which spans are taken out."""
    samples = Corrupted(Text(), config.model.context, True, VOCABULARY, 0, Spans(0.3, 2.0), config.train.seed)
    return (samples.batch(range(index, index + 3), step, index) for step, index in plan)


def questions(config: Config, plan: Plan) -> Iterator[Batch]:
    """Micro-batches of three questions over contexts, one without an answer, some of whose tokens are hidden."""
    noise = texts.Noise(0.0, config.task.hide, config.train.seed)
    for step, index in plan:
        random = np.random.default_rng([step, index])
        some = []
        for number, (asked, context) in enumerate(zip(random.integers(1, 5, 3), random.integers(4, 8, 3), strict=True)):
            ids, text = (random.integers(0, VOCABULARY, count).astype("i4") for count in (asked, context))
            some.append(windows.Seen(ids, text, *((1, 4) if number else (0, 0)), 3 * index + number))
        made = windows.batch_of(some, Cut(config.model.context, 8, 0), 0, 0, step, index)
        made.inputs["hidden"] = noise.hidden(made, [one.number for one in some])
        yield made


def tagged_sentences(config: Config, plan: Plan) -> Iterator[Batch]:
    """Micro-batches of three sentences of several lengths, some words of which have two tokens."""
    for step, index in plan:
        random = np.random.default_rng([step, index])
        some = []
        for count in random.integers(2, 14, 3):
            tags = np.where(random.random(count) < 0.7, random.integers(0, LABELS, count), -1).astype("i4")
            tags[0] = 0
            some.append(Sentence(random.integers(0, VOCABULARY, count).astype("i4"), tags))
        yield tagged.batch_of(some, config.model.context, 0, step, index)


def talks() -> Dialogues:
    """Dialogues of several lengths, whose second halves are answers; two follow one another as pairs do."""
    lengths = np.random.default_rng(5).integers(4, 20, 40)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.random.default_rng(6).integers(1, VOCABULARY, offsets[-1])
    tokens[offsets[1:] - 1] = 0
    places = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return Dialogues(tokens, offsets, places >= np.repeat(lengths // 2, lengths))


def dialogues(config: Config, plan: Plan) -> Iterator[Batch]:
    rows = Rows(talks(), config.model.context, SimpleNamespace(eot=0))
    return (rows.batch([index, index + 5], step, index) for step, index in plan)


def preferences(config: Config, plan: Plan) -> Iterator[Batch]:
    """Micro-batches of two pairs; the reference is made up."""
    found = Pairs(talks(), config.model.context, 0, np.random.default_rng(7).normal(-30, 3, (20, 2)))
    return (found.batch([index, index + 5], step, index) for step, index in plan)


OTHERS = {
    "translation": pairs,
    "span_corruption": spans,
    "question_answering": questions,
    "tagging": tagged_sentences,
    "dialogue": dialogues,
    "preference": preferences,
}
