"""What a run asks of a task. Nothing in this room names one; `tasks/` holds them, a file each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mlm_mpi.data.objectives import Samples
from mlm_mpi.layers.base import Least, Part
from mlm_mpi.train.checkpoint import Manifest
from mlm_mpi.train.measure import Sums


class Task(Protocol):
    """Data, model and head of a run on one rank; opening it has verified what can be verified without reading all.

    A task whose samples are no rows of tokens, though its targets are tokens, has their name too, `sample`: "pairs".
    """

    model: str  # the kind of the model, for the start table
    vocabulary: int
    width: int  # of what flows between parts (B, T, width)
    row_tokens: int  # positions of a row, T
    tokenizer: bytes  # saved with every checkpoint, so that the model outlives its corpus
    unit: str  # what targets are, for people: "tokens", "texts"
    figures: Mapping[str, bool]  # names in `quality` that a run may go by, and whether more of it is better
    content: str  # hash of the corpus' content, printed beside that of the weights

    def samples(self, split: str) -> Samples:
        """The samples of "train" or "heldout". Raises DataError where there are none to train with."""

    def tokens(self, split: str) -> int:
        """The size of a split."""

    def parts(self) -> list[Part]:
        """The model, newly made, ended by this task's head."""

    def least(self, rows: int) -> Least:
        """Lower bounds for micro-batches of B rows."""

    def about(self) -> dict[str, Any]:
        """The manifest's fields `vocabulary`, `catalog` and `corpus`."""

    def quality(self, sums: Sums) -> dict[str, Any]:
        """Figures of held-out sums beside the mean loss, for people."""

    def notes(self) -> list[tuple[str, str]]:
        """(name, text) of lines in the start table."""

    def lines(self, numbers: dict[str, Any], of: str) -> list[str]:
        """Figures in words, `of` a checkpoint; [] for those of `plain_lines`."""

    def baselines(self, split: str) -> dict[str, Any]:
        """Figures of simple methods on the same data. Raises DataError."""

    def refuse_other(self, path: Path, manifest: Manifest) -> None:
        """Raises CheckpointError where a checkpoint was trained on other data than this."""


@runtime_checkable
class Refers(Protocol):
    """A task whose loss compares the model with the weights that a run begins with: what they say is measured once."""

    splits: Sequence[str]  # those that it has

    def samples(self, split: str) -> Samples:
        """Until `refer` they have no reference, from then on it is in their targets."""

    def refer(self, found: Mapping[str, np.ndarray]) -> None:
        """`found`: split -> the outcomes of its samples under those weights, columns [log π(c), log π(r)] (n, 2).

        Raises CheckpointError where they are of other samples.
        """


def plain_lines(numbers: dict[str, Any], of: str, own: list[str]) -> list[str]:
    """What can be said of any task; `own`: the names of its own figures."""
    lines = [
        f"held-out            {numbers['tokens']:,} targets; {of}",
        f"loss                {numbers['loss']:.4f} nats per target",
    ]
    return lines + [f"{name.replace('_', ' '):<20}{numbers[name]:.4g}" for name in own]
