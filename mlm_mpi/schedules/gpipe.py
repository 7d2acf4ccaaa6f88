"""All forwards, then all backwards: a step's activations at once. Source: Huang et al., GPipe, arXiv:1811.06965.

Backwards come in micro-batch order, not the reverse of the paper: the sum of gradients has one order.
"""

from collections.abc import Iterator

from mlm_mpi.schedules import Backward, Forward, Instruction


def instructions(stage: int, stages: int, micros: int) -> Iterator[Instruction]:
    """F0 F1 … B0 B1 …"""
    yield from map(Forward, range(micros))
    yield from map(Backward, range(micros))
