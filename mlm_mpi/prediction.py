"""Labels of new texts, or what is made of them: rows of a file, in their order, by any number of ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np

from mlm_mpi.backend.arrays import Place, to_host
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.data.labelled import Example
from mlm_mpi.data.rows import Row
from mlm_mpi.data.texts import batch_of, by_length, kept
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.data.tokenizing import encode_pairs
from mlm_mpi.generation import written
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.chain import Chain


class Round(NamedTuple):
    """Rows, the probabilities of their labels (n, L) float32, and how many of them did not fit the context."""

    rows: Sequence[Row]
    probabilities: np.ndarray
    cut: int


def predict(
    chain: Chain, tokenizer: Tokenizer, rows: Iterator[Row], context: int, pairs: bool, at_once: int, mesh: Mesh,
    place: Place,
) -> Iterator[Round]:  # fmt: skip
    """Rows in rounds of `at_once` for each copy of the model, all of them on every rank. Collective.

    A file of any length: no more than a round is held. Every rank reads all rows and computes its part of them.
    """
    group = mesh.group("dp")
    for some, mine in _rounds(rows, at_once, mesh):
        examples = [
            Example(ids.astype(np.int32), second, 0)
            for ids, second in encode_pairs(tokenizer, ((row.text, row.second) for row in mine))
        ]
        found = _probabilities(chain, examples, context, tokenizer.eot, pairs, mesh, place)
        cut = sum(_is_cut(example, context) for example in examples)
        every = group.allgather([cut, found.tolist()], "probabilities of labels")
        table = np.array([row for _, part in every for row in part], np.float32)
        yield Round(some, table, sum(part for part, _ in every))


def _rounds(rows: Iterator[Row], at_once: int, mesh: Mesh) -> Iterator[tuple[list[Row], list[Row]]]:
    """(rows of a round, those of this copy of the model). Collective."""
    group = mesh.group("dp")
    while True:
        with mesh.world.together("reading rows"):
            some = list(islice(rows, at_once * group.size))
        if not some:
            return
        yield some, some[group.rank * at_once : (group.rank + 1) * at_once]


class Written(NamedTuple):
    """Rows, what was made of each, and how many of them did not fit the context."""

    rows: Sequence[Row]
    texts: list[str]
    cut: int


def write(
    chain: Chain, tokenizer: Tokenizer, rows: Iterator[Row], context: int, at_once: int, mesh: Mesh, place: Place
) -> Iterator[Written]:  # fmt: skip
    """What an encoder-decoder makes of rows, in rounds as `predict` has them; none of a row without text. Collective.

    Sources of one length are read together. No text depends on those beside it, nor on the number of ranks.
    """
    end = np.array([tokenizer.eot], np.int32)
    for some, mine in _rounds(rows, at_once, mesh):
        encoded = [ids.astype(np.int32) for ids, _ in encode_pairs(tokenizer, ((row.text, "") for row in mine))]
        sources = [np.concatenate([ids, end])[:context] for ids in encoded]
        texts = [""] * len(mine)
        for length in sorted({len(source) for source in sources if len(source) > 1}):
            same = [number for number, source in enumerate(sources) if len(source) == length]
            stacked = np.stack([sources[number] for number in same])
            for number, ids in zip(same, written(chain, stacked, context, tokenizer.eot, mesh, place), strict=True):
                texts[number] = tokenizer.decode(ids)
        every = mesh.group("dp").allgather([sum(len(ids) >= context for ids in encoded), texts], "what was written")
        yield Written(some, [text for _, part in every for text in part], sum(cut for cut, _ in every))


def _probabilities(
    chain: Chain, examples: list[Example], context: int, eot: int, pairs: bool, mesh: Mesh, place: Place
) -> np.ndarray:  # fmt: skip
    """Shapes: -> (n, L), on every rank that shares the model."""
    found, order = np.zeros((0, 0), np.float32), by_length(examples, context)
    if examples:
        batch = replace(batch_of([examples[place] for place in order], context, eot, pairs), targets={})
        ctx = Context(mesh, batch=batch.map(place.put))
        chain.forward((), ctx)
        found = to_host(ctx.tally["probabilities"])[np.argsort(order)] if "probabilities" in ctx.tally else found
    return np.array(mesh.group("pp").allgather(found.tolist(), "the last stage")[-1], np.float32)


def _is_cut(example: Example, context: int) -> bool:
    first = example.second or len(example.ids)
    second = len(example.ids) - first
    return kept(first, second, context) != (first, second)
