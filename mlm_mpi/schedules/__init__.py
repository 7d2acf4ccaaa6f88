"""In which order a stage of a pipeline runs the forwards and backwards of its micro-batches: `train.schedule`.

A file has `instructions(stage, stages, micros)`: a pure generator without MPI. Whatever the order, forwards and
backwards must each come in the order of micro-batches, for that alone keeps the sum of gradients the same.
"""

from collections.abc import Iterable
from typing import NamedTuple

from mlm_mpi.errors import ConfigError, agreed


class Forward(NamedTuple):
    """Run the forward of micro-batch `micro`, counted from 0 among those of this stage and step."""

    micro: int


class Backward(NamedTuple):
    """Run the backward of micro-batch `micro`, whose forward has run."""

    micro: int


Instruction = Forward | Backward


def check(order: Iterable[Instruction], micros: int, kind: str) -> None:
    """Raises ConfigError unless each of `micros` micro-batches runs forward, then back, both in their order."""
    forwards = backwards = 0
    for what in order:
        due = forwards if isinstance(what, Forward) else backwards
        if what.micro != due or due >= micros or (isinstance(what, Backward) and due >= forwards):
            raise agreed(ConfigError(f"train.schedule = {kind!r}: {what} comes out of turn: mend it, or give another"))
        forwards, backwards = forwards + isinstance(what, Forward), backwards + isinstance(what, Backward)
    if forwards != micros or backwards != micros:
        raise agreed(
            ConfigError(
                f"train.schedule = {kind!r} runs {forwards} forwards and {backwards} backwards of {micros} "
                "micro-batches: mend it, or give another"
            )
        )
