"""1F1B over several chunks of the model a stage: the pipeline stands still for a chunk's time where 1F1B does for a
stage's, at the price of as many times the messages.

Chunk c of stage s is slice c·stages + s of the model. Micro-batches go through in groups of as many as there are
stages: a group through chunk 0, then through chunk 1, … Where the last group lacks some, their turns pass: what others
need of each other is as before, so nothing waits for them. Source: Narayanan et al., arXiv:2104.04473, section 2.2; how
many forwards come first is Megatron-LM's. A stage holds at most 2(stages − stage − 1) + (chunks − 1)·stages + 1
micro-batches of a chunk each.
"""

from collections.abc import Iterator

from mlm_mpi.schedules import Backward, Forward, Instruction, one_f_one_b

HEEDS = ("mesh.chunks",)


def instructions(stage: int, stages: int, micros: int, chunks: int = 1) -> Iterator[Instruction]:
    """Of stage 1 of 2 with 2 chunks, chunks as letters: Fa0 Fa1 Fb0 Bb0 Fb1 Bb1 Fa2 Ba0 …"""
    if chunks == 1:  # nothing to interleave, and no groups
        yield from one_f_one_b.instructions(stage, stages, micros)
        return
    yield from (what for what in _of_whole_groups(stage, stages, micros, chunks) if what.micro < micros)


def _of_whole_groups(stage: int, stages: int, micros: int, chunks: int) -> Iterator[Instruction]:
    """Of as many micro-batches as fill the last group."""
    total = -(-micros // stages) * stages * chunks
    warm = min(2 * (stages - stage - 1) + (chunks - 1) * stages, total)
    for number in range(total + warm):
        if number < total:
            micro, chunk = _turn(number, stages, chunks)
            yield Forward(micro, chunk)
        if number >= warm:
            micro, chunk = _turn(number - warm, stages, chunks)
            yield Backward(micro, chunks - 1 - chunk)


def _turn(number: int, stages: int, chunks: int) -> tuple[int, int]:
    """(micro-batch, chunk) of a stage's forward of that number."""
    group, within = divmod(number, stages * chunks)
    chunk, member = divmod(within, stages)
    return group * stages + member, chunk
