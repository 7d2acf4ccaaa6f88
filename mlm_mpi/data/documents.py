"""Where documents begin in the rows of a batch, for an attention that does not look across their borders.

An end of text opens the document behind it, as it does for `mlm-mpi generate`: it sees nothing else and predicts the
first token. That target counts like any other: Llama 3 (arXiv:2407.21783, 3.2) and modded-nanogpt mask attention and
no loss, a model has to learn how documents begin, and bits per character count every character.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlm_mpi.data.batch import Batch
from mlm_mpi.data.objectives import Samples


def starts_of(ids: np.ndarray, eot: int) -> np.ndarray:
    """For each position, where in its row its document begins: at 0, or at the last end of text up to it.

    Shapes: (B, T) -> (B, T) int32, non-decreasing along T.
    """
    begins = np.zeros(ids.shape, np.int32)
    begins[:, 1:] = np.where(ids[:, 1:] == eot, np.arange(1, ids.shape[1], dtype=np.int32), np.int32(0))
    starts: np.ndarray = np.maximum.accumulate(begins, axis=1)
    return starts


class Documents:
    """Samples with an input more, `starts` (B, T) int32."""

    def __init__(self, samples: Samples, eot: int) -> None:
        self._samples, self._eot = samples, eot

    def __len__(self) -> int:
        return len(self._samples)

    def batch(self, numbers: Sequence[int], step: int, index: int, rows: int | None = None) -> Batch:
        batch = self._samples.batch(numbers, step, index, rows)
        return replace(batch, inputs=batch.inputs | {"starts": starts_of(batch.inputs["ids"], self._eot)})
