"""One forward ahead of the backward: two micro-batches of activations. A schedule is one file."""

from collections.abc import Iterator

from mlm_mpi.schedules import Backward, Forward, Instruction


def instructions(stage: int, stages: int, micros: int) -> Iterator[Instruction]:
    """F0 F1 B0 F2 B1 … for the `micros` micro-batches of a rank, of which there is at least one."""
    yield Forward(0)
    for micro in range(1, micros):
        yield Forward(micro)
        yield Backward(micro - 1)
    yield Backward(micros - 1)
