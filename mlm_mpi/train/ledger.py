"""What a run writes down of every step: numbers into sinks, progress on the terminal, evidence of what was done.

On rank 0; others keep silent.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

from mlm_mpi.monitor.progress import Done, Reporter
from mlm_mpi.monitor.sinks import Sink
from mlm_mpi.train.engine import StepResult
from mlm_mpi.train.evidence import Evidence


class Ledger:
    """Sinks of numbers, progress and evidence. `tokens`: what the first so many steps read."""

    def __init__(
        self, sinks: Sequence[Sink], show: Reporter, tokens: Callable[[int], int] = lambda steps: 0,
        evidence: Evidence | None = None,
    ) -> None:  # fmt: skip
        self.sinks, self.show, self.tokens, self.evidence = list(sinks), show, tokens, evidence
        self.last = self.last_made = 0  # steps recorded, steps testified

    def testify(self, step: int, done: StepResult) -> None:
        """All have made step number `step`, counted from 1: who did what of it is evidence from now on."""
        if self.evidence is not None and step > self.last_made:
            self.last_made = step
            self.evidence.write(step, done)

    def record(self, step: int, done: StepResult, waited_s: float, heldout: float | None) -> None:
        """Step number `step`, counted from 1, is done. What is recorded stays as it is."""
        if step <= self.last:
            return
        self.last = step
        for text in done.verdict.said:
            self.alarm(text)
        self.show.update(
            Done(step, done.loss, done.targets, done.step_s, done.exposed_s, waited_s, done.learning_rate), heldout
        )
        if not self.sinks:
            return
        values = {
            "step": step, "tokens": self.tokens(step), "loss": done.loss, "learning_rate": done.learning_rate,
            "gradient_norm": done.gradient_norm, "tokens_per_s": done.targets / done.step_s, "step_s": done.step_s,
            "comm_s": done.exposed_s, "wait_s": waited_s, "time": time.time(),
        }  # fmt: skip
        if heldout is not None:
            values["heldout_loss"] = heldout
        for sink in list(self.sinks):
            self._guarded(sink, partial(sink.write, **values))

    def _guarded(self, sink: Sink, act: Callable[[], str | None]) -> None:
        """A sink that fails is left out from then on: it is not worth a run."""
        try:
            said = act()
        except Exception as problem:
            self.sinks.remove(sink)
            reason = " ".join(str(problem).split()) or type(problem).__name__
            said = f"ALARM {sink.name}: {reason}: the run goes on without it"
        if said is not None:
            self.alarm(said)

    def say(self, text: str) -> None:
        """A line between those of progress."""
        self.show.message(text)

    def alarm(self, text: str) -> None:
        """Says what is wrong, between the lines of progress."""
        self.show.message(text, important=True)

    def close(self) -> None:
        """Ends the display; sinks stay open for the last words."""
        self.show.close()

    def finish(self) -> None:
        """Closes the sinks; one that does not come to its end in time is left behind."""
        for sink in list(self.sinks):
            self._guarded(sink, sink.close)
        if self.evidence is not None:
            self.evidence.close()
