"""Pairs of dialogues that differ in their last answer, of which one was preferred, as micro-batches."""

from collections.abc import Sequence

import numpy as np

from mlm_mpi.data.batch import Batch
from mlm_mpi.data.dialogues import Dialogues

_LENGTHS = 64  # rows are as long as the longest dialogue, in whole multiples of it


class Pairs:
    """The samples of a split: pairs whose two dialogues fit into the context, a row each.

    Dialogues 2i and 2i + 1 are pair i, the chosen one first. A row reads an end of text, then a dialogue, and has to
    find its last answer and the end of text behind it. `lost`: pairs that are left out. `reference` (n, 2) float64: the
    log-probabilities of these answers under the weights that a run began with, 0 where nobody has measured them.
    """

    def __init__(self, dialogues: Dialogues, context: int, eot: int, reference: np.ndarray | None = None) -> None:
        """Raises ValueError for a reference of other pairs."""
        self.dialogues, self.eot = dialogues, eot
        lengths = dialogues.lengths.reshape(-1, 2).max(axis=1)
        self._kept = np.flatnonzero(lengths <= context)
        self.lost = len(lengths) - len(self._kept)
        self.longest = int(lengths.max())
        fitting = int(lengths[self._kept].max(initial=1))
        self.length = min(context, -(-fitting // _LENGTHS) * _LENGTHS)
        self.reference = np.zeros((len(self), 2)) if reference is None else reference
        if self.reference.shape != (len(self), 2):
            raise ValueError(f"a reference of {len(self.reference):,} pairs, and there are {len(self):,}")

    def __len__(self) -> int:
        return len(self._kept)

    def batch(self, numbers: Sequence[int], step: int, index: int, rows: int | None = None) -> Batch:
        """Shapes, of P pairs: ids (2P, T) int32; targets ids (2P, T) int32, mask (2P, T) bool, reference (P, 2)
        float64, pairs (P,) bool. `rows`: P, where the last ones are filled up."""
        pairs = rows or len(numbers)
        ids = np.full((2 * pairs, self.length), self.eot, np.int32)
        wanted, mask = ids.copy(), np.zeros(ids.shape, bool)
        reference, counted = np.zeros((pairs, 2)), np.arange(pairs) < len(numbers)
        for pair, number in enumerate(numbers):
            reference[pair] = self.reference[number]
            for which in (0, 1):
                row, found = 2 * pair + which, self.dialogues.read(2 * int(self._kept[number]) + which)
                count = len(found.ids)
                ids[row, 1:count] = found.ids[: count - 1]
                wanted[row, :count], mask[row, :count] = found.ids, found.answers
        targets = {"ids": wanted, "mask": mask, "reference": reference, "pairs": counted}
        return Batch(step, index, {"ids": ids}, targets, len(numbers))

    def answers(self) -> np.ndarray:
        """Tokens of the chosen and of the rejected answer of each pair. Shapes: -> (n, 2) int64."""
        every = [[self.dialogues.read(2 * int(pair) + which).answers for which in (0, 1)] for pair in self._kept]
        return np.array([[np.count_nonzero(own) for own in pair] for pair in every]).reshape(-1, 2)
