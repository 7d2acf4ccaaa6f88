"""1F1B whose backwards are cut in two: an earlier stage waits for the gradient of what flowed in, nobody for those of
weights, which fill the time in which 1F1B stands still.

Source: Qi et al., "Zero Bubble Pipeline Parallelism" (ZB-H1), arXiv:2401.10241: the pipeline stands still for
(stages − 1)·(F + B − W) instead of (stages − 1)·(F + B + W), with no more memory than the first stage of 1F1B. Weight
halves of stage s come s micro-batches later, so every stage holds at most min(stages, micros) micro-batches: between
forward and input half min(stages − stage, micros) with all their activations, others with what the weight half needs.
"""

from collections.abc import Iterator

from mlm_mpi.schedules import Backward, Instruction, one_f_one_b


def instructions(stage: int, stages: int, micros: int) -> Iterator[Instruction]:
    """Of stage 1 of 3, input and weight halves as I and W: F0 F1 I0 F2 I1 W0 F3 I2 W1 … W."""
    for what in one_f_one_b.instructions(stage, stages, micros):
        if not isinstance(what, Backward):
            yield what
            continue
        yield what._replace(half="input")
        if what.micro >= stage:
            yield Backward(what.micro - stage, half="weight")
    for micro in range(max(micros - stage, 0), micros):
        yield Backward(micro, half="weight")
