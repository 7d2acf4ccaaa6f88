"""Sentences whose words have labels as micro-batches. Words behind the context have no target."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlm_mpi.data import texts
from mlm_mpi.data.batch import Batch
from mlm_mpi.data.labelled import Example
from mlm_mpi.data.sentences import ENDS, Sentence, Sentences


def batch_of(sentences: Sequence[Sentence], context: int, eot: int, step: int = 0, index: int = 0) -> Batch:
    """Sentences in a row, as `texts.batch_of` has them. Targets: labels of the words that lie within the context.

    Shapes: ids, places (1, N) int32; targets classes (M,) int32, at (M,) int32: their positions in the row, and begins
    (M,) bool: which of them are the first of their sentence.
    """
    made = texts.batch_of([Example(one.ids, 0, 0) for one in sentences], context, eot, False, step, index)
    tags = [one.tags[: context - ENDS] for one in sentences]
    places = [np.flatnonzero(some >= 0) for some in tags]
    at = [start + 1 + some for (start, _), some in zip(made.spans(), places, strict=True)]
    targets = {
        "classes": np.concatenate([some[place] for some, place in zip(tags, places, strict=True)]).astype(np.int32),
        "at": np.concatenate(at).astype(np.int32),
        "begins": np.concatenate([np.arange(len(some)) == 0 for some in places]),
    }
    return replace(made, targets=targets, count=len(targets["at"]))


class TaggedTexts:
    """The samples of a split, its sentences. `noise`: what is hidden of them in training. `weights` (L,): of the losses
    of each label, None: all count alike."""

    def __init__(
        self, sentences: Sentences, context: int, eot: int, noise: texts.Noise | None = None,
        weights: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.sentences, self.context, self.eot, self.noise, self.weights = sentences, context, eot, noise, weights

    def __len__(self) -> int:
        return len(self.sentences)

    def batch(self, numbers: Sequence[int], step: int, index: int, rows: int | None = None) -> Batch:
        """No sentence is padded, whatever `rows` says."""
        read = [self.sentences.read(int(number)) for number in numbers]
        order = texts.by_length(read, self.context)
        made = batch_of([read[place] for place in order], self.context, self.eot, step, index)
        if self.weights is not None:
            made.targets["weights"] = self.weights[made.targets["classes"]]
        if self.noise is not None:
            made.inputs["hidden"] = self.noise.hidden(made, [int(numbers[place]) for place in order])
        return made
