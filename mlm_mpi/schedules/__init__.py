"""In which order a stage of a pipeline runs the forwards and backwards of its micro-batches: `train.schedule`.

A file has `instructions(stage, stages, micros)`, and `chunks=1` as the last, with `mesh.chunks` in HEEDS, where it can
cut a stage's share of the model into several: a pure generator without MPI. Whatever the order, the forwards, input
halves and weight halves of a chunk must each come in the order of micro-batches, for that alone keeps the sum of
gradients the same. Messages follow from instructions (`messages`), so no schedule can forget one.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

from mlm_mpi.errors import ConfigError, agreed


class Forward(NamedTuple):
    """Run the forward of micro-batch `micro`, counted from 0 among those of this stage and step, through a chunk."""

    micro: int
    chunk: int = 0


class Backward(NamedTuple):
    """Run the backward of micro-batch `micro`, whose forward has run: both halves, or one, "input" before "weight".

    The input half gives the gradient of what flowed into the chunk, which an earlier stage waits for; the weight half
    those of weights, which nobody waits for. Source: Qi et al., arXiv:2401.10241.
    """

    micro: int
    chunk: int = 0
    half: Literal["both", "input", "weight"] = "both"


Instruction = Forward | Backward


class Message(NamedTuple):
    """What leaves a slice of the model for the next one, or the gradient of that on its way back.

    Chunk c of stage s is slice c·stages + s: a message is between stages `source % stages` and `dest % stages`, which
    are one where there is one stage.
    """

    micro: int
    source: int  # slices
    dest: int


class Messages(NamedTuple):
    """What an instruction needs before it runs, and what it gives."""

    needs: Message | None
    gives: Message | None


def messages(what: Instruction, stage: int, stages: int, chunks: int = 1) -> Messages:
    """The same two messages on both sides: the result of a forward goes on, of a backward's input half back."""
    if isinstance(what, Backward) and what.half == "weight":
        return Messages(None, None)
    here, slices = what.chunk * stages + stage, range(stages * chunks)
    step = 1 if isinstance(what, Forward) else -1
    before, after = here - step, here + step
    return Messages(
        Message(what.micro, before, here) if before in slices else None,
        Message(what.micro, here, after) if after in slices else None,
    )


_WORK = {"both": ("input", "weight"), "input": ("input",), "weight": ("weight",)}  # of a backward, by its half
_AFTER = {"input": "forward", "weight": "input"}


def check(order: Iterable[Instruction], micros: int, kind: str, chunks: int = 1) -> None:
    """Raises ConfigError unless each of `micros` micro-batches runs forward, then back, both in their order.

    Through each chunk; a backward runs both halves at once or one after the other, and each kind of half in order.
    """
    run: Counter[tuple[str, int]] = Counter()  # (work, chunk) -> how often, so the micro-batch that is due
    for what in order:
        works = ("forward",) if isinstance(what, Forward) else _WORK.get(what.half, ())
        right = bool(works) and what.chunk in range(chunks)
        for work in works:
            due = run[work, what.chunk]
            right &= what.micro == due < (run[_AFTER[work], what.chunk] if work in _AFTER else micros)
            run[work, what.chunk] += 1
        if not right:
            raise agreed(ConfigError(f"train.schedule = {kind!r}: {what} comes out of turn: mend it, or give another"))
    for chunk in range(chunks):
        forwards, inputs, weights = (run[work, chunk] for work in ("forward", "input", "weight"))
        if not forwards == inputs == weights == micros:
            raise agreed(
                ConfigError(
                    f"train.schedule = {kind!r} runs {forwards} forwards, {inputs} input halves and {weights} weight "
                    f"halves of {micros} micro-batches through chunk {chunk}: mend it, or give another"
                )
            )
