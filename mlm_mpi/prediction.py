"""Labels of new texts or words, what is made of texts, or answers to questions: rows, sentences or questions of a file,
in their order, by any number of ranks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from mlm_mpi.backend.arrays import Place, to_host
from mlm_mpi.beams import Beams, written
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.data import dictionary, squad, tagged, texts, windows, words
from mlm_mpi.data.batch import Batch
from mlm_mpi.data.labelled import Example
from mlm_mpi.data.questions import Cut, Question, best_span
from mlm_mpi.data.rows import Row
from mlm_mpi.data.sentences import ENDS, Sentence
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.data.tokenizing import bounds_of, characters_of, encode_pairs, encode_words
from mlm_mpi.errors import DataError
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.chain import Chain

T = TypeVar("T")


class Round(NamedTuple):
    """Rows, the probabilities of their labels (n, L) float32, and how many of them did not fit the context."""

    rows: Sequence[Row]
    probabilities: np.ndarray
    cut: int


class WordRound(NamedTuple):
    """Sentences, the probabilities of the labels of all their words (w, L) float32, NaN for words that have no token or
    lie behind the context, and how many sentences did not fit it."""

    sentences: Sequence[words.Sentence]
    probabilities: np.ndarray
    cut: int


def predict(
    chain: Chain, tokenizer: Tokenizer, rows: Iterator[Row], context: int, pairs: bool, at_once: int, mesh: Mesh,
    place: Place,
) -> Iterator[Round]:  # fmt: skip
    """Rows in rounds of `at_once` for each copy of the model, all of them on every rank. Collective.

    A file of any length: no more than a round is held. Every rank reads all rows and computes its part of them.
    """

    def labelled(mine: list[Row]) -> tuple[np.ndarray, int]:
        examples = [
            Example(ids.astype(np.int32), second, 0)
            for ids, second in encode_pairs(tokenizer, ((row.text, row.second) for row in mine))
        ]
        order, batch = texts.by_length(examples, context), None
        if examples:
            made = texts.batch_of([examples[number] for number in order], context, tokenizer.eot, pairs)
            batch = replace(made, targets={})
        found = _probabilities(chain, batch, mesh, place)
        return found[np.argsort(order)], sum(_is_cut(example, context) for example in examples)

    return (Round(*round) for round in _rounds(rows, at_once, mesh, labelled))


def predict_words(
    chain: Chain, tokenizer: Tokenizer, sentences: Iterator[words.Sentence], context: int, labels: int, at_once: int,
    mesh: Mesh, place: Place,
) -> Iterator[WordRound]:  # fmt: skip
    """Likewise of sentences, for words that have one of so many labels. Collective."""

    def labelled(mine: list[words.Sentence]) -> tuple[np.ndarray, int]:
        encoded = list(encode_words(tokenizer, [sentence.words for sentence in mine]))
        made = [Sentence(ids.astype(np.int32), _marked(len(ids), begins)) for ids, begins in encoded]
        order = [number for number in texts.by_length(made, context) if len(made[number].ids)]
        batch = None
        if order:
            batch = tagged.batch_of([made[number] for number in order], context, tokenizer.eot)
            batch = replace(batch, targets={"at": batch.targets["at"]})
        found = _probabilities(chain, batch, mesh, place)
        first = np.cumsum([0, *(len(begins) for _, begins in encoded)])
        table = np.full((int(first[-1]), labels), np.nan, np.float32)
        seen = [np.flatnonzero((begins >= 0) & (begins < context - ENDS)) for _, begins in encoded]
        if order:
            table[np.concatenate([first[number] + seen[number] for number in order])] = found
        return table, sum(len(ids) > context - ENDS for ids, _ in encoded)

    return (WordRound(*round) for round in _rounds(sentences, at_once, mesh, labelled))


def _rounds(
    rows: Iterator[T], at_once: int, mesh: Mesh, labelled: Callable[[list[T]], tuple[np.ndarray, int]]
) -> Iterator[tuple[list[T], np.ndarray, int]]:
    """(rows, a table of all of them, how many were cut): each copy of the model has its part labelled. Collective."""
    group = mesh.group("dp")
    for some, mine in _shares(rows, at_once, mesh):
        found, cut = labelled(mine)
        every = group.allgather([cut, found.tolist()], "probabilities of labels")
        table = np.array([row for _, part in every for row in part], found.dtype)
        yield some, table, sum(part for part, _ in every)


def _shares(rows: Iterator[T], at_once: int, mesh: Mesh) -> Iterator[tuple[list[T], list[T]]]:
    """(rows of a round, those of this copy of the model). Collective."""
    group = mesh.group("dp")
    while True:
        with mesh.world.together("reading rows"):
            some = list(islice(rows, at_once * group.size))
        if not some:
            return
        yield some, some[group.rank * at_once : (group.rank + 1) * at_once]


class Answered(NamedTuple):
    """Questions, and of each the characters of its context that are its answer, the first and one past the last, and
    the probability (n, 3) float64; NaN for what has no question or no context, 0 and 0 for no answer. `cut`: questions
    that lost their ends."""

    questions: Sequence[squad.Question]
    answers: np.ndarray
    cut: int


def predict_answers(
    chain: Chain, tokenizer: Tokenizer, questions: Iterator[squad.Question], cut: Cut, may_be_none: bool, at_once: int,
    mesh: Mesh, place: Place,
) -> Iterator[Answered]:  # fmt: skip
    """Likewise of questions over texts of any length, `at_once` windows at a time. Collective."""

    def answered(mine: list[squad.Question]) -> tuple[np.ndarray, int]:
        asked = {number: _encoded(tokenizer, one) for number, one in enumerate(mine) if one.text and one.second}
        sizes = [(number, len(one.ids), len(one.context)) for number, one in asked.items()]
        every = [window for size in sizes for window in cut.windows(*size)]
        some = [windows.seen(asked[window.question], window, cut, k) for k, window in enumerate(every)]
        some.sort(key=lambda one: len(one.ids) + len(one.context))
        found = np.zeros((len(every), 4))
        for start in range(0, len(some), at_once):
            batch = windows.batch_of(some[start : start + at_once], cut, tokenizer.eot)
            told = _told(chain, batch, mesh, place, "outcomes")
            found[told[:, 1].astype(int)] = told[:, 2:]
        table = np.full((len(mine), 3), np.nan)
        owners, firsts = np.array([window[:2] for window in every], int).reshape(-1, 2).T
        for number, one in asked.items():
            span = best_span(firsts[owners == number], found[owners == number], may_be_none)
            context = mine[number].second
            bounds = bounds_of(tokenizer, one.context, context)
            assert bounds is not None, "looked at when it was encoded"
            characters = characters_of(context, bounds, span.first, span.stop) if span.stop else (0, 0)
            table[number] = *characters, span.probability
        return table, sum(cut.kept(size) < size for _, size, _ in sizes)

    for some, table, lost in _rounds(questions, at_once, mesh, answered):
        yield Answered(some, table.reshape(-1, 3), lost)


def _encoded(tokenizer: Tokenizer, one: squad.Question) -> Question:
    """Raises DataError for a tokenizer whose tokens are not the text."""
    [(ids, second)] = encode_pairs(tokenizer, [(one.text, one.second)])
    if bounds_of(tokenizer, ids[second:], one.second) is None:
        raise DataError(f"the model's tokenizer loses some of the text of {one.place}: leave it out")
    return Question(ids[:second].astype(np.int32), ids[second:].astype(np.int32), 0, 0)


class Written(NamedTuple, Generic[T]):
    """Rows, what was made of each, and how many of them did not fit the context."""

    rows: Sequence[T]
    texts: list[str]
    cut: int


def write(
    chain: Chain, tokenizer: Tokenizer, rows: Iterator[T], sources: Callable[[Sequence[T]], list[np.ndarray]],
    context: int, at_once: int, beams: Beams, mesh: Mesh, place: Place,
) -> Iterator[Written[T]]:  # fmt: skip
    """What an encoder-decoder makes of rows, in rounds as `predict` has them; nothing of an empty one. Collective.

    `sources`: the token ids of some rows, without an end of text; of a table's, `encoded`. No text depends on those
    beside it, nor on the number of ranks.
    """
    end = np.array([tokenizer.eot], np.int32)
    for some, mine in _shares(rows, at_once, mesh):
        ended = [np.concatenate([ids, end]) for ids in sources(mine)]
        texts = [""] * len(mine)
        there = [number for number, ids in enumerate(ended) if len(ids) > 1]
        made = written(
            chain, [ended[number][:context] for number in there], context, tokenizer.eot, beams, mesh, place
        )  # fmt: skip
        for number, ids in zip(there, made, strict=True):
            texts[number] = tokenizer.decode(ids)
        every = mesh.group("dp").allgather([sum(len(ids) > context for ids in ended), texts], "what was written")
        yield Written(some, [text for _, part in every for text in part], sum(cut for cut, _ in every))


def encoded(tokenizer: Tokenizer, rows: Sequence[Row], hints: Mapping[str, str] | None = None) -> list[np.ndarray]:
    """The token ids of texts, (t,) int32 each, without an end of text. `hints`: the dictionary that they have hints by;
    without it they have none."""
    if hints:
        texts = [row.text for row in rows]
        found = dictionary.hinted(tokenizer, texts, (dictionary.translated(text, hints) for text in texts))
        return [ids.astype(np.int32) for ids in found]
    return [ids.astype(np.int32) for ids, _ in encode_pairs(tokenizer, ((row.text, "") for row in rows))]


def _probabilities(chain: Chain, batch: Batch | None, mesh: Mesh, place: Place) -> np.ndarray:
    """In the order of the batch, None for an empty one. Shapes: -> (n, L), on every rank that shares the model."""
    found = np.zeros((0, 0)) if batch is None else _told(chain, batch, mesh, place, "probabilities")
    return found.astype(np.float32)


def _told(chain: Chain, batch: Batch, mesh: Mesh, place: Place, what: str) -> np.ndarray:
    """What the head tells of a batch, on every rank that shares the model. Collective."""
    ctx = Context(mesh, batch=batch.map(place.put))
    chain.forward((), ctx)
    found = to_host(ctx.tally[what]).tolist() if what in ctx.tally else []
    return np.array(mesh.group("pp").allgather(found, "the last stage")[-1])


def _marked(tokens: int, begins: np.ndarray) -> np.ndarray:
    """Tags that say of which tokens a label is wanted. Shapes: (n,) -> (t,) int32."""
    tags = np.full(tokens, -1, np.int32)
    tags[begins[begins >= 0]] = 0
    return tags


def _is_cut(example: Example, context: int) -> bool:
    first = example.second or len(example.ids)
    second = len(example.ids) - first
    return texts.kept(first, second, context) != (first, second)
