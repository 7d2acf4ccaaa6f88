"""Each micro-batch forward and back before the next: one micro-batch of activations, for a pipeline of one stage."""

from collections.abc import Iterator

from mlm_mpi.schedules import Backward, Forward, Instruction


def instructions(stage: int, stages: int, micros: int) -> Iterator[Instruction]:
    """F0 B0 F1 B1 …"""
    for micro in range(micros):
        yield Forward(micro)
        yield Backward(micro)
