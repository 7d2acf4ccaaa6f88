"""Labelled texts as micro-batches: one behind the other in a row, so that nothing is computed for padding."""

from collections.abc import Sequence

import numpy as np

from mlm_mpi import order
from mlm_mpi.data.batch import Batch
from mlm_mpi.data.labelled import Example, Examples
from mlm_mpi.errors import DataError


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
    """Texts in a row that is filled up to a multiple of 8. Targets: their labels.

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


class Texts:
    """The samples of a split. `weights` (L,): of the losses of each label, None: all count alike."""

    def __init__(
        self, examples: Examples, context: int, eot: int, pairs: bool = False, weights: np.ndarray | None = None
    ) -> None:  # fmt: skip
        """`pairs`: examples have a second text."""
        self.examples, self.context, self.eot, self.pairs, self.weights = examples, context, eot, pairs, weights

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, numbers: Sequence[int], step: int, index: int, rows: int | None = None) -> Batch:
        """No text is padded, whatever `rows` says."""
        read = [self.examples.read(int(number)) for number in numbers]
        made = batch_of(read, self.context, self.eot, self.pairs, step, index)
        if self.weights is not None:
            made.targets["weights"] = self.weights[made.targets["classes"]]
        return made


class Nothing:
    """The samples of a split that does not exist."""

    def __len__(self) -> int:
        return 0

    def batch(self, numbers: Sequence[int], step: int, index: int, rows: int | None = None) -> Batch:
        raise DataError("there are no texts to be read: prepare with a larger --heldout, or a file for it")


def balanced(targets: np.ndarray, labels: int) -> np.ndarray:
    """Weights by which each label counts as much as any other, 1 on average over the texts. Shapes: (n,) -> (L,)."""
    counts = np.bincount(targets, minlength=labels)
    return (len(targets) / (labels * np.maximum(counts, 1))).astype(np.float32)


def too_long(examples: Examples, context: int, pairs: bool) -> tuple[int, int]:
    """(texts that do not fit the context, positions that the longest needs)."""
    needed = examples.lengths + (3 if pairs else 2)
    return int((needed > context).sum()), int(needed.max(initial=0))
