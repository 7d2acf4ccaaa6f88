"""Training: who runs which micro-batch, one step, checkpoints, the loop."""

from dataclasses import dataclass, replace
from typing import Literal

from mlm_mpi.config.keys import key
from mlm_mpi.errors import ConfigError

_LANES = 8  # the most by default: a rank alone holds 1 + log2 8 buffers of gradients


@dataclass(frozen=True)
class Train:
    """The work of a step: M micro-batches of B rows, summed in J lanes (DESIGN.md)."""

    steps: int = key(
        100,
        says="The whole run makes this many updates of the weights.",
        unit="steps",
        least=1,
        most=1 << 32,  # a word of Philox's counter
        remedy="random numbers count steps in 32 bits",
    )
    micro_batches: int = key(
        8, says="A step is made of this many micro-batches, which the ranks share.", unit="micro-batches", least=1
    )
    rows: int = key(
        8,
        says="A micro-batch holds this many windows of text, which a rank computes at once.",
        unit="windows",
        least=1,
    )
    lanes: int = key(
        0,
        says="The gradients of a step are summed in this many lanes: they decide the bits, divide the micro-batches, "
        "and are the most ranks that can take part; 0 means the largest divisor of the micro-batches up to 8.",
        unit="lanes",
        least=0,
    )
    seed: int = key(0, says="Initial weights, the order of the data and dropout are drawn from this seed.", least=0)
    dtype: Literal["float32", "float64"] = key(
        "float32",
        says="Weights, gradients and moments are of this type; float64 is slow and there to examine numerics.",
    )
    recompute: bool = key(
        False,
        says="If true, blocks keep only their inputs and run their forward twice, for less memory, more time and the "
        "same bits.",
    )
    schedule: str = key(
        "single",
        says="The forwards and backwards of a step run in this order; single runs one micro-batch after another.",
        room="schedules",
    )

    def resolved(self) -> "Train":
        """The same with its number of lanes. Raises ConfigError where the lanes do not divide the micro-batches."""
        m, j = self.micro_batches, self.lanes
        if j == 0:
            return replace(self, lanes=max(lanes for lanes in range(1, _LANES + 1) if m % lanes == 0))
        if m % j != 0:
            raise ConfigError(
                f"train.micro_batches = {m} is not a multiple of train.lanes = {j}: "
                f"set train.micro_batches = {-(-m // j) * j}"
            )
        return self


@dataclass(frozen=True)
class Eval:
    """How often and on how much of the held-out text the loss is measured."""

    every: int = key(
        0,
        says="The held-out loss is measured every so many steps, and at the end; 0 means at the end only.",
        unit="steps",
        least=0,
    )
    windows: int = key(
        0, says="At most this many windows of the held-out text are used; 0 means all of them.", unit="windows", least=0
    )
    rows: int = key(8, says="A rank evaluates this many windows at once.", unit="windows", least=1)


@dataclass(frozen=True)
class Checkpoint:
    """When a run is saved, and how much of what was saved is kept."""

    every: int = key(
        0,
        says="A checkpoint is saved every so many steps, and at the end; 0 means at the end only.",
        unit="steps",
        least=0,
    )
    keep: int = key(
        2, says="This many of the newest checkpoints stay, and older ones are removed.", unit="checkpoints", least=1
    )
    background: bool = key(True, says="If true, a thread writes the files of a checkpoint while training goes on.")
