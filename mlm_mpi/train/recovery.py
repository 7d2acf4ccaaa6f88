"""A run goes on without ranks that have died: the same step again, on fewer ranks, to the same bits.

Weights are never of two steps, because every attempt at a step passes one agreement before its update (`Engine.step`).
So all that live stand after the same step; some may not be through with what follows it, which then all do again.
"""

import time
from typing import Protocol

from mlm_mpi.comm.group import Group
from mlm_mpi.comm.recovery import survivors
from mlm_mpi.config import Config
from mlm_mpi.errors import MlmError, PeerLost, agreed
from mlm_mpi.train import checkpoint
from mlm_mpi.train.engine import Engine
from mlm_mpi.train.folder import RunFolder
from mlm_mpi.train.keeper import Keeper
from mlm_mpi.train.ledger import Ledger
from mlm_mpi.train.trainer import Place, Trainer


class Regrouped(Protocol):
    """What hangs on a group of ranks, and can be had again for another one."""

    group: Group
    config: Config
    engine: Engine
    folder: RunFolder
    ledger: Ledger

    def regroup(self, group: Group) -> None: ...
    def keeper(self) -> Keeper: ...
    def new_ledger(self, step: int, first: int) -> Ledger: ...
    def quarantines(self, step: int, index: int, text: str) -> bool: ...


class Recovery:
    """`first`: the step that this start began with; `writes`: whether this rank writes down what steps did."""

    def __init__(self, run: Regrouped, first: int, writes: bool) -> None:
        self.run, self.first, self.writes = run, first, writes
        self.told = 0  # so many lost ranks have been named

    def mend(self, trainer: Trainer, lost: PeerLost, place: Place) -> Place:
        """Where the ranks that live go on, with all that hangs on a group made anew. Collective over them."""
        began = time.perf_counter()
        while True:
            try:
                self.run.group = survivors(self.run.group, lost)
                trainer.keeper.abandon()  # first: what ends the run below must not wait for a save of the dead
                place = self._together(place)  # which holds also where one more dies below
                self._refuse_again()
                self._make_anew(trainer, place)
            except PeerLost as again:
                lost = again
            else:
                self._name(place.step, time.perf_counter() - began)
                return place

    def _make_anew(self, trainer: Trainer, place: Place) -> None:
        run = self.run
        run.regroup(run.group)
        run.group.barrier("all to be through with the save under way")
        with run.group.together("taking the run folder over"):
            if run.group.rank == 0:
                run.folder.take_over()
                checkpoint.remove_unfinished(run.folder.checkpoints)
        if run.group.rank == 0 and not self.writes:
            run.ledger, self.writes = run.new_ledger(place.step - (not place.told), self.first), True
        trainer.ledger, trainer.keeper = run.ledger, run.keeper()

    def _together(self, place: Place) -> Place:
        """The place of all: what follows the last step is done again where one was not through with it."""
        places = self.run.group.allgather([place.step, place.told, self.writes], "where everybody is")
        if len({step for step, _, _ in places}) > 1:
            raise agreed(MlmError(f"ranks that live have made different steps: {places}: report this as a bug"))
        written = places[0][2] or place.step == self.first  # else the rank has died that would have written it down
        return Place(place.step, written and all(told for _, told, _ in places))

    def _refuse_again(self) -> None:
        """Ends the run where a second rank has failed at the same work, unless the run does without that work: it would
        kill one rank after another."""
        mine = self.run.folder.failures() if self.run.group.rank == 0 else None
        seen: set[tuple[int, int]] = set()
        for step, index, text in self.run.group.broadcast(mine, "what ranks have said"):
            if (step, index) in seen and not self.run.quarantines(step, index, text):
                raise agreed(MlmError(f"step {step + 1}, micro-batch {index} has failed on two ranks: {text}"))
            seen.add((step, index))

    def _name(self, step: int, took_s: float) -> None:
        assert self.run.group.company is not None
        lost, alive = self.run.group.company.lost, self.run.group.size
        named, self.told = lost[self.told :], len(lost)
        goes = "goes" if alive == 1 else "go"
        left = f"{alive} of {len(lost) + alive} ranks {goes} on after step {step} ({took_s:.2f} s)"
        left += f", {self.run.engine.machine.assignment.ranks} of them at work" if self.run.config.comm.spares else ""
        self.run.ledger.alarm(f"ALARM lost {', '.join(named)}: {left}")
