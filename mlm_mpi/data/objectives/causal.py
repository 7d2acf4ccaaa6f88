"""The next token from those before it. Sample w is the window of tokens wT … wT+T."""

from collections.abc import Sequence

import numpy as np

from mlm_mpi.data.batch import Batch
from mlm_mpi.data.objectives import Samples
from mlm_mpi.data.stream import TokenStream
from mlm_mpi.errors import DataError

HEEDS = ("train.context_warmup_steps",)  # a window cut in two is two windows


def windows_of(tokens: int, context: int) -> int:
    """Whole windows of T+1 tokens in a stream."""
    return max(0, (tokens - 1) // context)


def samples(stream: TokenStream, context: int, training: bool) -> Samples:
    """Windows of a stream. In training whole ones only; else every target once: the last window may be short."""
    return Windows(stream, context, training)


class Windows:
    """Shapes of a batch: ids, targets (B, T) int32; mask (B, T) bool where a target is missing."""

    def __init__(self, stream: TokenStream, context: int, whole: bool) -> None:
        self.stream, self.context = stream, context
        self._count = windows_of(stream.tokens, context) if whole else -(-max(0, stream.tokens - 1) // context)

    def __len__(self) -> int:
        return self._count

    def batch(self, numbers: Sequence[int], step: int, index: int, rows: int | None = None) -> Batch:
        if not self._count:
            raise DataError(
                f"{self.stream.split} has {self.stream.tokens} tokens, a target needs 2: "
                "prepare with a larger --heldout or more text"
            )
        shape = (rows or len(numbers), self.context)
        ids, targets, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row, number in enumerate(numbers):
            start = int(number) * self.context
            tokens = self.stream.read(start, min(start + self.context + 1, self.stream.tokens))
            count = len(tokens) - 1
            ids[row, :count], targets[row, :count], mask[row, :count] = tokens[:-1], tokens[1:], True
        count = int(mask.sum())
        wanted = {"ids": targets} if count == mask.size else {"ids": targets, "mask": mask}
        return Batch(step, index, {"ids": ids}, wanted, count)
