"""In which order a stage of a pipeline runs the forwards and backwards of its micro-batches: `train.schedule`.

A file has `instructions(stage, stages, micros)`: a pure generator without MPI. Whatever the order, forwards and
backwards must each come in the order of micro-batches, for that alone keeps the sum of gradients the same.
"""

from typing import NamedTuple


class Forward(NamedTuple):
    """Run the forward of micro-batch `micro`, counted from 0 among those of this stage and step."""

    micro: int


class Backward(NamedTuple):
    """Run the backward of micro-batch `micro`, whose forward has run."""

    micro: int


Instruction = Forward | Backward
