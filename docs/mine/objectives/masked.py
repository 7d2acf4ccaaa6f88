"""One token in seven is hidden and has to be found from what stands before it. An objective is one file."""

from dataclasses import replace

import numpy as np

from mlm_mpi.data.objectives.causal import Windows
from mlm_mpi.rng import key_of, uniform

HIDDEN = 0  # the id that stands where a token is hidden


def samples(stream, context, training):
    return Masked(stream, context, training)


class Masked(Windows):
    """Windows of the text; the targets are the tokens themselves, and only hidden ones count."""

    def batch(self, numbers, step, index, rows=None):
        plain = super().batch(numbers, step, index, rows)
        ids = plain.inputs["ids"]
        hidden = np.zeros(ids.shape, bool)
        for row, number in enumerate(numbers):  # a pure function of the sample's number
            hidden[row] = uniform(key_of(0, "masked", int(number)), 0, self.context) < 1 / 7
        hidden &= plain.targets.get("mask", True)
        return replace(
            plain, inputs={"ids": np.where(hidden, HIDDEN, ids)}, targets={"ids": ids, "mask": hidden},
            count=int(hidden.sum()),
        )  # fmt: skip
