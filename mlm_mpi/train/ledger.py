"""What a run writes down of every step: a line of metrics, progress on the terminal. On rank 0; others keep silent."""

import time

from mlm_mpi.monitor.metrics import MetricsLog
from mlm_mpi.monitor.progress import Done, Reporter
from mlm_mpi.train.engine import StepResult


class Ledger:
    """Metrics (None: not on this rank) and progress."""

    def __init__(self, metrics: MetricsLog | None, show: Reporter) -> None:
        self.metrics, self.show = metrics, show

    def record(self, step: int, done: StepResult, waited_s: float, heldout: float | None) -> None:
        """Step number `step`, counted from 1, is done."""
        self.show.update(
            Done(step, done.loss, done.targets, done.step_s, done.exposed_s, waited_s, done.learning_rate), heldout
        )
        if self.metrics is not None:
            extra = {} if heldout is None else {"heldout_loss": heldout}
            self.metrics.write(
                step=step - 1, loss=done.loss, learning_rate=done.learning_rate, gradient_norm=done.gradient_norm,
                tokens_per_s=done.targets / done.step_s, step_s=done.step_s, comm_s=done.exposed_s, wait_s=waited_s,
                time=time.time(), **extra,
            )  # fmt: skip

    def alarm(self, text: str) -> None:
        """Says what is wrong, between the lines of progress."""
        self.show.message(text, important=True)

    def close(self) -> None:
        """Ends the display; metrics stay open for the last words."""
        self.show.close()
