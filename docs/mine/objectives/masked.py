"""One token in seven is hidden and has to be found from what stands before it. An objective is one file."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlm_mpi.data.batch import Batch
from mlm_mpi.data.objectives.causal import Windows
from mlm_mpi.data.stream import TokenStream
from mlm_mpi.rng import key_of, uniform

HIDDEN = 0  # the id that stands where a token is hidden
SHARE = 1 / 7


def samples(stream: TokenStream, context: int, training: bool) -> "Masked":
    """Windows of a stream; in training whole ones only."""
    return Masked(stream, context, training)


class Masked(Windows):
    """Windows of the text; the targets are the tokens themselves, and only hidden ones count.

    Shapes of a batch: ids, targets (B, T) int32; mask (B, T) bool, true where a token is hidden.
    """

    def batch(self, numbers: Sequence[int], step: int, index: int, rows: int | None = None) -> Batch:
        plain = super().batch(numbers, step, index, rows)
        ids = plain.inputs["ids"]
        hidden = np.zeros(ids.shape, bool)
        for row, number in enumerate(numbers):  # drawn by the sample's number: any rank draws the same, at any step
            hidden[row] = uniform(key_of(0, "masked", int(number)), 0, self.context) < SHARE
        hidden &= plain.targets.get("mask", True)  # a short window is padded, and padding is nothing to find
        inputs, targets = {"ids": np.where(hidden, HIDDEN, ids)}, {"ids": ids, "mask": hidden}
        return replace(plain, inputs=inputs, targets=targets, count=int(hidden.sum()))
