"""When a run leaves before its last step: signals and limits, acted on by all ranks together."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlm_mpi import signs


class StopRequest:
    """SIGUSR1, SIGTERM or SIGINT, or a limit of this start: a wish to stop, of this rank alone."""

    def __init__(self, max_time_s: float | None, max_steps: int | None) -> None:
        self.reason: str | None = None
        self._deadline = None if max_time_s is None else time.monotonic() + max_time_s
        self._max_steps = max_steps
        self._last: int | None = None  # the step after which --max-steps are made

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handles the signals while the block runs."""
        before = {s: signal.signal(s, self._note) for s in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.reason == _name(number):  # asked twice: now
            signal.default_int_handler(number, frame)
        # `mlm-mpi run` asks by SIGUSR1, whatever asked it, and has said what
        self.reason = "as asked" if number == signal.SIGUSR1 and signs.is_heard() else _name(number)

    def wanted(self, step: int) -> bool:
        """Whether this rank wants to stop after step number `step`; asked first about the first of this start."""
        if self._max_steps is not None:
            self._last = step + self._max_steps - 1 if self._last is None else self._last
            if step >= self._last:
                self.reason = self.reason or "--max-steps"
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = self.reason or "--max-time"
        return self.reason is not None


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
