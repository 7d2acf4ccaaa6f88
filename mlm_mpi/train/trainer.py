"""The training loop: step, save, measure, tell, until the last step or an agreed stop.

All ranks run it. What one rank decides alone (its clock, a signal, a failed write) travels with the losses of the next
step as a note, so that all ranks act on it at the same step. Where a rank has died, `mend` makes a group of those that
live: the same step is tried again, and what follows a step is done again by all if one of them was not through with it.
"""

from collections.abc import Callable

from mlm_mpi.data.loader import Loader
from mlm_mpi.errors import CheckpointError, PeerLost, agreed
from mlm_mpi.train.engine import Engine, StepResult
from mlm_mpi.train.keeper import Keeper
from mlm_mpi.train.ledger import Ledger
from mlm_mpi.train.replicas import repaired
from mlm_mpi.train.rhythm import Place, Rhythm
from mlm_mpi.train.search import Heldout, Search
from mlm_mpi.train.stop import StopRequest

_STOP, _WRITTEN = 0, 1  # columns of a step's notes


Mend = Callable[["Trainer", PeerLost, Place], Place]  # those who live go on from the place that it returns


class Trainer:
    """The loop of one rank over its engine. `mend` may give it another loader, keeper and ledger."""

    def __init__(
        self, rhythm: Rhythm, engine: Engine, loader: Loader, keeper: Keeper, ledger: Ledger, stop: StopRequest,
        measure: Callable[[], Heldout | None], search: Search, mend: Mend | None = None,
    ) -> None:  # fmt: skip
        self.rhythm, self.engine, self.loader = rhythm, engine, loader
        self.keeper, self.ledger, self.stop = keeper, ledger, stop
        self.measure, self.search, self.mend = measure, search, mend
        self._over = False
        self._done: tuple[StepResult, float]  # of the last step, and how long it waited for the loader

    def train(self, place: Place) -> int:
        """Steps from a place on; returns how many are done, all of them saved. Collective."""
        if place.told:
            self._catch_up(place.step)
        self.loader.start(self.engine.plan(place.step, self.rhythm.steps))
        while not (place.told and (self._over or place.step >= self.rhythm.steps)):
            try:
                if place.told:
                    self._done = self._make(place.step)
                    place = Place(place.step + 1, told=False)
                self._follow(place.step, *self._done)
                place = Place(place.step)
            except PeerLost as lost:
                if self.mend is None:
                    raise
                place = self.mend(self, lost, place)
                self.loader.start(self.engine.plan(place.step, self.rhythm.steps))
        return place.step

    def _make(self, step: int) -> tuple[StepResult, float]:
        """Step number `step`."""
        waited = self.loader.waited_s
        done = self.engine.step(step, self.loader.next, self._notes(step))
        return done, self.loader.waited_s - waited

    def _follow(self, step: int, done: StepResult, waited_s: float) -> None:
        """What is due after `step` steps: testify, compare, save, measure, tell."""
        self._over = step == self.rhythm.steps or bool(done.notes[:, _STOP].any())
        self.ledger.testify(step, done)  # before all: no checkpoint stands without evidence of its steps
        for alarm in self._compare(step, self._over):
            self.ledger.alarm(alarm)
        unsaved = self._save(step, done, self._over)  # first: whoever wants the job to end does not wait for ever
        heldout = self.measure() if self.rhythm.is_time_to_measure(step) else None
        unsaved = self._heed(step, heldout) or unsaved
        self.ledger.record(step, done, waited_s, None if heldout is None else heldout.loss)
        if unsaved is not None:
            raise agreed(CheckpointError(f"the final checkpoint (step {step}) was not saved: {unsaved}"))

    def _notes(self, step: int) -> tuple[float, ...]:
        """What this rank alone knows; every rank reads it in the result of the step."""
        return float(self.stop.wanted(step)), float(self.keeper.written)

    def _save(self, step: int, done: StepResult, stopping: bool) -> str | None:
        """Tends what all have written, begins what is due; the last save is waited for. Returns what went wrong."""
        if done.notes[:, _WRITTEN].all() and self.keeper.busy:  # not where a rank has died since
            self.keeper.tend()
        if stopping:
            return self.keeper.save(step)
        if self.rhythm.is_time(self.rhythm.save_every, step):
            self._begin_save(step)
        return None

    def _begin_save(self, step: int) -> None:
        self.keeper.begin(step)
        self.engine.keep(step)

    def _compare(self, step: int, stopping: bool) -> tuple[str, ...]:
        """Mends replicas that differ, before they are saved; what is to be said of it."""
        every, saved = self.rhythm.compare_every, self.rhythm.is_time(self.rhythm.save_every, step)
        saved = saved or (self.search.misses(step) and self.rhythm.is_time_to_measure(step))  # it may be the best
        return repaired(self.engine, step) if every and (stopping or saved or self.rhythm.is_time(every, step)) else ()

    def _heed(self, step: int, heldout: Heldout | None) -> str | None:
        """Keeps the best weights so far, and ends the run where none better are expected. Returns what went wrong."""
        better = self.search.judge(step, heldout)
        if ended := self.search.is_over and not self._over:
            self._over = True
        elif better and not self._over:
            if not self.rhythm.is_time(self.rhythm.save_every, step):
                self._begin_save(step)
            self.keeper.publish()  # now: these weights are gone where a rank dies before it stands
        unsaved = self.keeper.save(step) if ended else None
        self.search.settle()
        return unsaved

    def _catch_up(self, step: int) -> None:
        """What a checkpoint was saved before: the judgement of its own step."""
        if self.search.misses(step) and self.rhythm.is_time_to_measure(step):
            self.search.judge(step, self.measure())
        self._over = self._over or self.search.is_over
        self.search.settle()
