"""Pairs of texts as micro-batches: an encoder's one behind the other in a row, and a decoder's in another.

A decoder is told what it should have written so far (teacher forcing): it reads an end of text, then the target, and
has to find the target, then an end of text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlm_mpi import order
from mlm_mpi.data.batch import Batch
from mlm_mpi.data.labelled import Example, Examples


class Pair(NamedTuple):
    """Token ids int32: the source with an end of text (S,), what the decoder reads and what it has to find (T,)."""

    source: np.ndarray
    read: np.ndarray
    wanted: np.ndarray


def pair_of(example: Example, context: int, eot: int) -> Pair:
    """An example's, either side cut where it is longer than the context."""
    source, target, end = example.ids[: example.second], example.ids[example.second :], np.array([eot], np.int32)
    ended = np.concatenate([target, end])
    return Pair(
        np.concatenate([source, end])[:context], np.concatenate([end, target])[:context], ended[:context]
    )  # fmt: skip


def pairs_batch(pairs: Sequence[Pair], eot: int, step: int = 0, index: int = 0) -> Batch:
    """Pairs in two rows, each filled up to a multiple of 8. Those of equal lengths had better be neighbours: attention
    takes them together.

    Shapes: ids, places (1, N) int32 of the targets and of their sources; targets ids (1, N) int32, mask (1, N) bool.
    """
    inputs, texts = _row([pair.source for pair in pairs], eot)
    source = Batch(step, index, inputs, {}, 0, texts=texts)
    inputs, texts = _row([pair.read for pair in pairs], eot)
    wanted, count = np.full_like(inputs["ids"], eot), texts[-1]
    wanted[0, :count] = np.concatenate([pair.wanted for pair in pairs])
    mask = np.arange(wanted.shape[1])[None] < count
    return Batch(step, index, inputs, {"ids": wanted, "mask": mask}, count, texts=texts, source=source)


def _row(texts: Sequence[np.ndarray], eot: int) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
    """(ids and places of texts one behind the other, where each ends)."""
    ends = np.cumsum([len(ids) for ids in texts])
    length = -(-int(ends[-1]) // order.MOST) * order.MOST
    inputs = {"ids": np.full((1, length), eot, np.int32), "places": np.zeros((1, length), np.int32)}
    inputs["ids"][0, : ends[-1]] = np.concatenate(texts)
    inputs["places"][0, : ends[-1]] = np.concatenate([np.arange(len(ids)) for ids in texts])
    return inputs, tuple(ends.tolist())


class TextPairs:
    """The samples of a split."""

    def __init__(self, examples: Examples, context: int, eot: int) -> None:
        """`context`: of either side; what is longer is cut."""
        self.examples, self.context, self.eot = examples, context, eot

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, numbers: Sequence[int], step: int, index: int, rows: int | None = None) -> Batch:
        """The shortest sources first. No text is padded, whatever `rows` says."""
        pairs = [pair_of(self.examples.read(int(number)), self.context, self.eot) for number in numbers]
        pairs.sort(key=lambda pair: (len(pair.source), len(pair.read)))
        return pairs_batch(pairs, self.eot, step, index)


def too_long(examples: Examples, context: int) -> tuple[int, int]:
    """(pairs of which a side does not fit the context, positions that the longest side needs)."""
    needed = np.maximum(examples.seconds, examples.lengths - examples.seconds) + 1
    return int((needed > context).sum()), int(needed.max(initial=0))
