"""Trials: a real training, something goes wrong in it, and its end is compared with that of an undisturbed one.

A trial has passed when its run has come to the end that its fault allows, with the hash and the losses of the
undisturbed run, every step written down once, no process of it left and no half save in its folder.
"""

import contextlib
import shutil
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from mlm_mpi.chaos.faults import FAULTS, Plan
from mlm_mpi.chaos.job import STRUCK, Job
from mlm_mpi.errors import MlmError
from mlm_mpi.monitor.metrics import read_metrics

_PATIENCE = 10.0  # times an undisturbed run, and a minute: a trial that lasts longer hangs
_ORPHANS_S = 5.0
_GRACE_S = 70.0  # more than `mlm-mpi run` takes to end a job


@dataclass
class Outcome:
    """What came of a trial: what is wrong with it, and how long the others needed to go on."""

    plan: Plan
    wrong: str = ""
    again: bool = False  # the run ended, and had to be started again
    went_on_s: list[float] = field(default_factory=list)


class Trials:
    """Of one configuration (`config`, `overrides`), in a folder of their own."""

    def __init__(self, config: str, overrides: Sequence[str], ranks: int, steps: int, folder: Path) -> None:
        self.config, self.overrides = config, list(overrides)
        self.ranks, self.steps, self.folder = ranks, steps, folder
        self.took_s = self.step_s = 0.0
        self.weights, self.losses = "", list[float]()
        self.job: Job | None = None

    def stop(self) -> None:
        """Lets a job that was interrupted too save and leave."""
        if self.job is not None and self.job.process.poll() is None:
            self.job.process.send_signal(signal.SIGTERM)
            self.job.wait(_GRACE_S)

    def undisturbed(self) -> None:
        """The run that all others are compared with. Raises MlmError."""
        began, job = time.monotonic(), self._start("undisturbed", self.ranks)
        job.process.wait()
        job.wait(_ORPHANS_S)
        self.took_s = time.monotonic() - began
        self.weights = job.weights
        if job.process.returncode or not self.weights:
            word = job.said[-1][1].removeprefix("mlm-mpi: ") if job.said else "without a word"
            raise MlmError(f"the undisturbed run failed: {word}")
        lines = _lines(self.folder / "undisturbed")
        self.losses = [line["loss"] for line in lines]
        self.step_s = statistics.median(line["step_s"] for line in lines)

    @property
    def limit_s(self) -> float:
        """What lasts longer hangs."""
        return 60.0 + _PATIENCE * self.took_s

    def _start(self, name: str, ranks: int, inside: Plan | None = None, more: Sequence[str] = ()) -> Job:
        overrides = [word for text in (*self.overrides, *more) for word in ("--set", text)]
        words = ["train", self.config, "--run", str(self.folder / name), *overrides, "--quiet"]
        self.job = Job(ranks, words, None if inside is None else asdict(inside))
        return self.job

    def trial(self, plan: Plan) -> Outcome:
        """Runs a training into a fault, and what follows from it to the end."""
        fault, outcome = FAULTS[plan.fault], Outcome(plan)
        name = f"{plan.fault}-{plan.step}-{plan.delay:.4f}"
        spares = (f"comm.spares={fault.spares}",) if fault.spares else ()
        inside = plan if fault.act is None else None
        job = self._start(name, self.ranks + fault.spares, inside, (*fault.settings, *spares))
        at = self._strike(job, plan, self.folder / name)
        ended = job.wait(self.limit_s)
        struck = job.when(STRUCK)
        at = struck[0] if struck else at
        outcome.went_on_s = [then - at for then in job.when("ALARM lost ") if then > at]
        if not ended:
            outcome.wrong = f"it hung; it said last: {job.said[-1][1] if job.said else 'nothing'}"
        elif plan.victims and not job.hit and not struck:
            outcome.wrong = "the run was over before the fault: give it more steps (train.steps)"
        elif left := self._left(self.folder / name):
            outcome.wrong = f"processes {left} were left"
        else:
            self._come_to_its_end(job, name, outcome)
        if not outcome.wrong:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        else:
            (self.folder / f"{name}.log").write_text(job.text + "\n")
        return outcome

    def _strike(self, job: Job, plan: Plan, run: Path) -> float:
        """Does from outside what is done from there, when it is time; returns when."""
        act = FAULTS[plan.fault].act
        if act is not None:
            end = time.monotonic() + self.limit_s
            while job.process.poll() is None and time.monotonic() < end and len(_lines(run)) < plan.step:
                time.sleep(0.002)
            time.sleep(plan.delay * self.step_s)
        at = time.monotonic()
        if act is not None:
            act(job, plan)
        return at

    def _come_to_its_end(self, job: Job, name: str, outcome: Outcome) -> None:
        """What a person would do next, and whether it comes to what it must come to."""
        fault = FAULTS[outcome.plan.fault]
        if fault.said not in job.text or (fault.end == "refused" and not job.process.returncode):
            outcome.wrong = f"exit code {job.process.returncode}, {fault.said!r} was not said: {job.text[-300:]}"
        if outcome.wrong or fault.end == "refused":
            return
        if fault.end == "again" or not job.weights:
            outcome.again = True
            job = self._start(name, 1 + int(1000 * outcome.plan.delay) % self.ranks, more=fault.settings)
            if not job.wait(self.limit_s):
                outcome.wrong = "the next start hung"
                return
        outcome.wrong = self._wrong(job, self.folder / name, *self._expected(outcome.plan))

    def _expected(self, plan: Plan) -> tuple[str, list[float]]:
        """(hash, losses) that the run must have."""
        if FAULTS[plan.fault].end != "without":
            return self.weights, self.losses
        name = f"without-{plan.step}-{plan.delay:.4f}"
        other = self._start(name, 1, replace(plan, fault="left-out", victims=(0,)))
        other.wait(self.limit_s)
        losses = [line["loss"] for line in _lines(self.folder / name)]
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return other.weights or "none", losses

    def _left(self, run: Path) -> list[int]:
        """Processes of a run that are still there some seconds after its end."""
        end = time.monotonic() + _ORPHANS_S
        while True:
            found = []
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if str(run) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process.pid)
            if not found or time.monotonic() > end:
                return found
            time.sleep(0.05)

    def _wrong(self, job: Job, run: Path, weights: str, losses: Sequence[float]) -> str:
        if job.weights != weights:
            return f"exit code {job.process.returncode}, {job.weights or 'no hash'}: {job.text[-300:]}"
        lines = _lines(run)
        if [line["step"] for line in lines] != list(range(1, self.steps + 1)):
            return f"metrics.jsonl has steps {[line['step'] for line in lines]}"
        if [line["loss"] for line in lines] != list(losses):
            return "losses differ"
        if half := list((run / "checkpoints").glob(".*")):
            return f"{half[0].name} was left"
        return unproven(run)


def unproven(run: Path) -> str:
    """Why the run's ledger does not prove that each sample was used exactly once; "": it does."""
    from mlm_mpi.train import proof  # here, not above: --help needs no NumPy

    try:
        found = proof.prove(run)
    except MlmError as error:
        return f"verify: {error}"
    return "" if found.holds else f"verify: {[*found.wrong, found.unproven][0]}"


def _lines(run: Path) -> list[dict[str, Any]]:
    try:
        return list(read_metrics(run / "metrics.jsonl"))
    except MlmError:  # not there yet
        return []
