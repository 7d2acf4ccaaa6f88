"""What is predicted from what: `task.objective` names the file.

A file has `samples(stream, context, training) -> Samples`, and in HEEDS `train.context_warmup_steps` where rows of its
batches may be cut into shorter ones (warmup.py).
"""

from collections.abc import Sequence
from typing import Protocol

from mlm_mpi.data.batch import Batch


class Samples(Protocol):
    """Numbered samples of a split."""

    def __len__(self) -> int: ...

    def batch(self, numbers: Sequence[int], step: int, index: int, rows: int | None = None) -> Batch:
        """Micro-batch `index` of `step` with these samples, a pure function of its arguments, padded to `rows`.

        Raises DataError.
        """
