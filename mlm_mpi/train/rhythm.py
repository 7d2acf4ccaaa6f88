"""Where a run is, and what is due after how many steps."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rhythm:
    """How many steps a run has, and after how many it measures and saves (0: only at the end), and compares what its
    ranks hold (0: never)."""

    steps: int
    measure_every: int = 0
    save_every: int = 0
    compare_every: int = 0

    def is_time(self, every: int, step: int) -> bool:
        """Whether something that happens every so many steps happens after `step` of them."""
        return every > 0 and step % every == 0

    def is_time_to_measure(self, step: int) -> bool:
        """Also after the last."""
        return step == self.steps or self.is_time(self.measure_every, step)


@dataclass(frozen=True)
class Place:
    """Where a rank is: steps made, and whether it is through with what follows the last of them."""

    step: int
    told: bool = True
