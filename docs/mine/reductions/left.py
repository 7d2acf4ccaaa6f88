"""Lanes added from left to right instead of in the tree. A reduction is one file.

Another order and so another sum, but the same on any number of ranks.
"""

import functools
import operator
from typing import Any

from mlm_mpi.comm.buckets import Reduction, Setup
from mlm_mpi.comm.reductions.naive import Naive


def build(setup: Setup) -> Reduction:
    return Left(setup)


class Left(Naive):
    """((lane 0 + lane 1) + lane 2) + …, of the gradients that `Naive` has gathered."""

    def joined(self, lanes: list[Any]) -> Any:
        """The sum of all lanes, each a flat buffer, in their order whichever rank they come from."""
        return functools.reduce(operator.add, lanes)
