"""One forward ahead of the backward: two micro-batches of activations. A schedule is one file."""

from mlm_mpi.schedules import Backward, Forward


def instructions(stage, stages, micros):
    yield Forward(0)
    for micro in range(1, micros):
        yield Forward(micro)
        yield Backward(micro - 1)
    yield Backward(micros - 1)
