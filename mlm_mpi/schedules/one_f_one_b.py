"""One forward, one backward, as soon as a stage can: at most as many micro-batches of activations as stages follow.

Source: Narayanan et al., PipeDream-Flush, arXiv:2006.09503; called 1F1B in arXiv:2104.04473. As GPipe the pipeline
stands still for (stages − 1) forwards and backwards a step, and holds min(stages − stage, micros) instead of micros.
"""

from collections.abc import Iterator

from mlm_mpi.schedules import Backward, Forward, Instruction


def instructions(stage: int, stages: int, micros: int) -> Iterator[Instruction]:
    """Of stage 1 of 3: F0 F1 B0 F2 B1 … B."""
    warm = min(stages - stage - 1, micros)
    yield from map(Forward, range(warm))
    for micro in range(micros - warm):
        yield Forward(warm + micro)
        yield Backward(micro)
    yield from map(Backward, range(micros - warm, micros))
