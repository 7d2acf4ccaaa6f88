"""The training loop: step, save, measure, tell, until the last step or an agreed stop.

All ranks run it. What one rank decides alone (its clock, a signal, a failed write) travels with the losses of the next
step as a note, so that all ranks act on it at the same step.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mlm_mpi.data.loader import Loader
from mlm_mpi.errors import CheckpointError, agreed
from mlm_mpi.train.engine import Engine, StepResult
from mlm_mpi.train.keeper import Keeper
from mlm_mpi.train.ledger import Ledger
from mlm_mpi.train.stop import StopRequest

_STOP, _WRITTEN = 0, 1  # columns of a step's notes


@dataclass(frozen=True)
class Rhythm:
    """How many steps a run has, and after how many it measures and saves (0: only at the end)."""

    steps: int
    measure_every: int = 0
    save_every: int = 0

    def is_time(self, every: int, step: int) -> bool:
        """Whether something that happens every so many steps happens after `step` of them."""
        return every > 0 and step % every == 0


class Trainer:
    """The loop of one rank over its engine."""

    def __init__(
        self, rhythm: Rhythm, engine: Engine, loader: Loader, keeper: Keeper, ledger: Ledger, stop: StopRequest,
        measure: Callable[[], float | None],
    ) -> None:  # fmt: skip
        self.rhythm, self.engine, self.loader = rhythm, engine, loader
        self.keeper, self.ledger, self.stop, self.measure = keeper, ledger, stop, measure

    def train(self, step: int) -> int:
        """Steps from number `step` on; returns how many are done, all of them saved. Collective."""
        self.loader.start(self.engine.plan(step, self.rhythm.steps))
        while step < self.rhythm.steps:
            waited = self.loader.waited_s
            done = self.engine.step(step, self.loader.next, self._notes())
            step += 1
            stopping = self._is_over(step, done)
            unsaved = self._save(step, done, stopping)  # first: whoever wants the job to end does not wait for ever
            heldout = self._measure(step)
            self.ledger.record(step, done, self.loader.waited_s - waited, heldout)
            if unsaved is not None:
                raise agreed(CheckpointError(f"the final checkpoint (step {step}) was not saved: {unsaved}"))
            if stopping:
                break
        return step

    def _notes(self) -> tuple[float, ...]:
        """What this rank alone knows; every rank reads it in the result of the step."""
        return float(self.stop.wanted()), float(self.keeper.written)

    def _is_over(self, step: int, done: StepResult) -> bool:
        return step == self.rhythm.steps or bool(done.notes[:, _STOP].any())

    def _save(self, step: int, done: StepResult, stopping: bool) -> str | None:
        """Tends what all have written, begins what is due; the last save is waited for. Returns what went wrong."""
        if done.notes[:, _WRITTEN].all():
            self.keeper.tend()
        if stopping:
            return self.keeper.save(step)
        if self.rhythm.is_time(self.rhythm.save_every, step):
            self.keeper.begin(step)
        return None

    def _measure(self, step: int) -> float | None:
        last = step == self.rhythm.steps
        return self.measure() if last or self.rhythm.is_time(self.rhythm.measure_every, step) else None
