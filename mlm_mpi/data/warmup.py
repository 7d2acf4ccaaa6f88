"""Micro-batches that grow in the first steps: in rows, in the length of their windows.

Sources: Devarakonda, Naumov, Garland, "AdaBatch", arXiv:1712.02029; Li, Zhang, He, "The stability-efficiency dilemma:
sequence length warmup", arXiv:2108.06084. Lanes, micro-batches and the order of samples stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mlm_mpi.data.batch import Batch
from mlm_mpi.data.objectives import Samples


@dataclass(frozen=True)
class Ramp:
    """A number that doubles from `first` to `last` in stages as long as each other, over `steps` steps; 0: at once."""

    last: int
    first: int = 0
    steps: int = 0

    @property
    def doublings(self) -> int:
        """Stages before `last` is reached; it may be less than twice the number before."""
        return ((self.last - 1) // self.first).bit_length() if self.steps else 0

    def stages(self) -> list[tuple[int, int]]:
        """(first step, number) of each stage, ascending; steps count from 0."""
        count = self.doublings
        growing = [(stage * self.steps // count, self.first << stage) for stage in range(count)]
        return [*growing, (self.steps if growing else 0, self.last)]

    def at(self, step: int) -> int:
        """The number in a step."""
        count = self.doublings
        if step >= self.steps or not count:
            return self.last
        return self.first << ((step + 1) * count - 1) // self.steps

    def before(self, step: int) -> int:
        """The sum over all earlier steps."""
        stages = self.stages()
        ends = [*(begin for begin, _ in stages[1:]), step]
        return sum(max(0, min(end, step) - begin) * number for (begin, number), end in zip(stages, ends, strict=True))


class Pieces:
    """Samples whose rows of T tokens are cut into k shorter ones, of as many tokens as `context` says of the step.

    Shapes: every array (B, T) becomes (B·k, T/k); no token and no target is lost, so counts stay.
    """

    def __init__(self, samples: Samples, context: Ramp) -> None:
        self._samples, self._context = samples, context

    def __len__(self) -> int:
        return len(self._samples)

    def batch(self, numbers: Sequence[int], step: int, index: int, rows: int | None = None) -> Batch:
        length = self._context.at(step)
        return self._samples.batch(numbers, step, index, rows).map(lambda array: array.reshape(-1, length))
