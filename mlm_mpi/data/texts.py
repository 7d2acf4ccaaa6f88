"""Labelled texts as micro-batches: one behind the other in a row, so that nothing is computed for padding."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mlm_mpi import order
from mlm_mpi.data.batch import Batch
from mlm_mpi.data.labelled import Example, Examples
from mlm_mpi.data.sentences import Sentence
from mlm_mpi.errors import DataError
from mlm_mpi.rng import key_of, uniform


def sequence(example: Example, context: int, eot: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, segments) of what a model reads: an end of text, the text, an end; of a pair also the second and its end.

    Where that is longer than the context, texts lose their ends, the longer one first, as BERT's do. Shapes: (t,) each.
    """
    first, second = example.ids, example.ids[:0]
    if example.second:
        first, second = example.ids[: example.second], example.ids[example.second :]
    keep = kept(len(first), len(second), context)
    parts = [[eot], first[: keep[0]], [eot], *([second[: keep[1]], [eot]] if example.second else [])]
    ids = np.concatenate([np.asarray(part, np.int32) for part in parts])
    segments = np.zeros(len(ids), np.int32)
    segments[keep[0] + 2 :] = 1
    return ids, segments


def kept(first: int, second: int, context: int) -> tuple[int, int]:
    """Of so many tokens of a text, and of the second of a pair, as many as there is room for."""
    room = context - (3 if second else 2)
    over = max(0, first + second - room)
    from_longer = min(over, abs(first - second))
    both = over - from_longer
    if first >= second:
        return first - from_longer - -(-both // 2), second - both // 2
    return first - both // 2, second - from_longer - -(-both // 2)


def batch_of(
    examples: Sequence[Example], context: int, eot: int, segments: bool, step: int = 0, index: int = 0
) -> Batch:  # fmt: skip
    """Texts in a row that is filled up to a multiple of 8. Targets: their labels. Those of one length had better be
    neighbours: attention takes them together.

    Shapes: ids, places (1, N) int32, and segments where asked for; targets classes (B,) int32.
    """
    read = [sequence(example, context, eot) for example in examples]
    ends = np.cumsum([len(ids) for ids, _ in read])
    length = -(-int(ends[-1]) // order.MOST) * order.MOST
    inputs = {"ids": np.full((1, length), eot, np.int32), "places": np.zeros((1, length), np.int32)}
    if segments:
        inputs["segments"] = np.zeros((1, length), np.int32)
    for (ids, sides), end in zip(read, ends.tolist(), strict=True):
        own = slice(end - len(ids), end)
        inputs["ids"][0, own], inputs["places"][0, own] = ids, np.arange(len(ids))
        if segments:
            inputs["segments"][0, own] = sides
    classes = np.array([example.label for example in examples], np.int32)
    return Batch(step, index, inputs, {"classes": classes}, len(classes), texts=tuple(ends.tolist()))


@dataclass(frozen=True)
class Noise:
    """How a text is changed each time it is learned from, drawn of the step and its number: a part of it in place of
    the whole (with probability `crop`; of pairs always the whole), tokens split into the two that they were merged
    from, and these again (each with probability `split`), tokens hidden (each with probability `hide`).

    `parents` (V, 2) int32: what each token was merged from, -1 where nothing. Sources: Iyyer et al., ACL 2015, for
    hiding (word dropout); Provilkov et al., arXiv:1910.13267, for splitting, which gives what their BPE-dropout gives.
    """

    crop: float
    hide: float
    seed: int
    split: float = 0.0
    parents: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int32))

    def changed(self, example: Example, step: int, number: int) -> Example:
        """The text, cropped, then split."""
        example = self.cropped(example, step, number)
        return self.apart(example, step, number) if self.split else example

    def cropped(self, example: Example, step: int, number: int) -> Example:
        """The text, or a part of it that has between one token and all, each number of them as likely as any other."""
        length = len(example.ids)
        chosen, share, place = uniform(key_of(self.seed, "crop", number), 0, 3, step)
        if chosen >= self.crop or example.second or length < 2:
            return example
        count = 1 + int(share * length)
        start = int(place * (length - count + 1))
        return example._replace(ids=example.ids[start : start + count])

    def apart(self, example: Example, step: int, number: int) -> Example:
        """The text in smaller tokens."""
        key, ids, second = key_of(self.seed, "split", number), example.ids, example.second
        new, drawn = np.ones(len(ids), bool), 0
        while new.any():
            draws = uniform(key, drawn, len(ids), step)
            drawn += len(ids)
            chosen = new & (draws < self.split) & (self.parents[ids, 0] >= 0)
            second += int(chosen[:second].sum())
            counts = 1 + chosen
            ends = np.cumsum(counts)
            pieces, new = np.repeat(ids, counts), np.repeat(chosen, counts)
            pieces[ends[chosen] - 2], pieces[ends[chosen] - 1] = self.parents[ids[chosen]].T
            ids = pieces
        return example._replace(ids=ids, second=second)

    def hidden(self, made: Batch, numbers: Sequence[int]) -> np.ndarray:
        """Shapes: -> (1, N) bool; the first position of a text is never hidden."""
        out = np.zeros(made.inputs["ids"].shape, bool)
        for (start, stop), number in zip(made.spans(), numbers, strict=True):
            drawn = uniform(key_of(self.seed, "hide", int(number)), 0, stop - start, made.step)
            out[0, start + 1 : stop] = drawn[1:] < self.hide
        return out


class Texts:
    """The samples of a split. `weights` (L,): of the losses of each label, None: all count alike."""

    def __init__(
        self, examples: Examples, context: int, eot: int, pairs: bool = False, weights: np.ndarray | None = None,
        noise: Noise | None = None,
    ) -> None:  # fmt: skip
        """`pairs`: examples have a second text."""
        self.examples, self.context, self.eot, self.pairs, self.weights = examples, context, eot, pairs, weights
        self.noise = noise

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, numbers: Sequence[int], step: int, index: int, rows: int | None = None) -> Batch:
        """No text is padded, whatever `rows` says."""
        read = [self.examples.read(int(number)) for number in numbers]
        if self.noise is not None:
            read = [self.noise.changed(one, step, int(number)) for one, number in zip(read, numbers, strict=True)]
        order = by_length(read, self.context)
        read, numbers = [read[place] for place in order], [numbers[place] for place in order]
        made = batch_of(read, self.context, self.eot, self.pairs, step, index)
        if self.noise is not None and self.noise.hide:
            made.inputs["hidden"] = self.noise.hidden(made, numbers)
        if self.weights is not None:
            made.targets["weights"] = self.weights[made.targets["classes"]]
        return made


class Nothing:
    """The samples of a split that does not exist."""

    def __len__(self) -> int:
        return 0

    def batch(self, numbers: Sequence[int], step: int, index: int, rows: int | None = None) -> Batch:
        raise DataError("there are no texts to be read: prepare with a larger --heldout, or a file for it")


def by_length(examples: Sequence[Example | Sentence], context: int) -> list[int]:
    """Their places, the shortest first."""
    return sorted(range(len(examples)), key=lambda place: min(len(examples[place].ids), context))


def balanced(targets: np.ndarray, labels: int) -> np.ndarray:
    """Weights by which each label counts as much as any other, 1 on average over the texts. Shapes: (n,) -> (L,)."""
    counts = np.bincount(targets, minlength=labels)
    return (len(targets) / (labels * np.maximum(counts, 1))).astype(np.float32)


def too_long(examples: Examples, context: int, pairs: bool) -> tuple[int, int]:
    """(texts that do not fit the context, positions that the longest needs)."""
    needed = examples.lengths + (3 if pairs else 2)
    return int((needed > context).sum()), int(needed.max(initial=0))
