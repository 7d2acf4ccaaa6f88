"""Several corpora as one: which of them a sample comes from, and batches of rows from several.

Of the first s samples, corpus 0 has ⌊s·w₀/W⌋ (w of W parts are its weight); of those left, corpus 1 has its share of
the other weights, and so on. So a corpus comes up as evenly as whole numbers allow, in a step as in the whole run, and
how many samples each had before is known without going through them. No random number is needed: chance decides only
which window of a corpus comes next (sampler.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from mlm_mpi.data.batch import Batch
from mlm_mpi.data.objectives import Samples


@dataclass(frozen=True)
class Mixture:
    """Windows, weights and names of corpora. Weights are whole numbers, shares of their sum W < 2^62 / samples a step.

    Of any number of samples a corpus has its share, give or take less than one for each corpus.
    """

    windows: tuple[int, ...]
    weights: tuple[int, ...] = (1,)
    names: tuple[str, ...] = ("the corpus",)

    @property
    def whole(self) -> int:
        """The sum W of the weights."""
        return sum(self.weights)

    def split(self, first: int, count: int) -> list[tuple[int, np.ndarray]]:
        """For each corpus how many samples it had before sample `first`, and which of the next `count` are its own.

        Shapes: the second (n,) int64, ascending places below `count`; every place is one corpus' own.
        """
        places, before, total = np.arange(count), first, self.whole
        found = []
        for weight in self.weights:
            had, rest = divmod(before * weight, total)
            own = np.diff((rest + weight * np.arange(len(places) + 1)) // total) > 0
            found.append((had, places[own]))
            places, before, total = places[~own], before - had, total - weight
        return found

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` are each corpus' own."""
        return [had for had, _ in self.split(samples, 0)]


class Joined:
    """The samples of several corpora, numbered one corpus after the other."""

    def __init__(self, parts: Sequence[Samples], weights: Sequence[int], names: Sequence[str]) -> None:
        self.parts = tuple(parts)
        self.mixture = Mixture(tuple(map(len, parts)), tuple(weights), tuple(names))
        self._starts = np.cumsum([0, *self.mixture.windows])

    def __len__(self) -> int:
        return sum(self.mixture.windows)

    def batch(self, numbers: Sequence[int], step: int, index: int, rows: int | None = None) -> Batch:
        made, left = [], len(numbers) if rows is None else rows
        for part, run in groupby(numbers, self._part_of):
            own = [number - int(self._starts[part]) for number in run]
            left -= len(own)
            made.append((part, own))
        batches = [
            self.parts[part].batch(own, step, index, len(own) + (left if last == len(made) else 0))
            for last, (part, own) in enumerate(made, 1)
        ]
        return batches[0] if len(batches) == 1 else _stacked(batches)

    def _part_of(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1


def _stacked(batches: Sequence[Batch]) -> Batch:
    """Rows of one batch after the other; a mask where one of them has one."""
    if any("mask" in batch.targets for batch in batches):
        batches = [
            batch if "mask" in batch.targets
            else replace(batch, targets=batch.targets | {"mask": np.ones(batch.targets["ids"].shape, bool)})
            for batch in batches
        ]  # fmt: skip

    def stack(tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}

    inputs, targets = stack([batch.inputs for batch in batches]), stack([batch.targets for batch in batches])
    return replace(batches[0], inputs=inputs, targets=targets, count=sum(batch.count for batch in batches))


def mixture_of(samples: Samples) -> Mixture:
    """What the samples are mixed of; a mixture of one where they come from a single corpus."""
    return samples.mixture if isinstance(samples, Joined) else Mixture((len(samples),))
