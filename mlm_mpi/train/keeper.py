"""When checkpoints are begun and made visible, and what is said of one that fails."""

from collections.abc import Callable
from typing import Any

from mlm_mpi.train.checkpoint import Saver


class Keeper:
    """The saves of a run. `check(step)` raises where weights may not be saved; `about()` is for the manifest,
    as a save begins."""

    def __init__(
        self, saver: Saver, check: Callable[[int], None], about: Callable[[], dict[str, Any]],
        alarm: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.saver, self.check, self.about, self.alarm = saver, check, about, alarm
        self._noted: dict[str, Any] = {}
        self._failed = 0  # saves in a row

    @property
    def busy(self) -> bool:
        """A save is under way. The same on all ranks."""
        return self.saver.busy

    @property
    def written(self) -> bool:
        """What the save under way needs of me now is done, or has failed."""
        return self.saver.written

    def begin(self, step: int) -> None:
        """Starts to save in the background; an earlier save that is still under way is waited for. Collective."""
        self.publish()
        self.check(step)
        self._noted = self.about()
        self.saver.begin(step)

    def tend(self) -> None:
        """Goes on with a save of which all have `written` what it needs of them; no disk is waited for. Collective."""
        self._tell(self.saver.tend(self._noted))

    def publish(self) -> None:
        """Publishes the save under way, if any; a failure is an alarm, and training goes on. Collective."""
        if self.saver.busy:
            self._tell(self.saver.publish(self._noted))

    def _tell(self, problem: str | None) -> None:
        """The first failure of several in a row, the second, the fourth and so on."""
        self._failed = 0 if problem is None else self._failed + 1
        if problem is not None and self._failed & (self._failed - 1) == 0:
            again = f", the {self._failed}th time in a row" if self._failed > 2 else ""
            self.alarm(f"ALARM checkpoint not saved{again}, training goes on: {problem}")

    def save(self, step: int) -> str | None:
        """The last checkpoint, which must succeed; returns what went wrong. Collective."""
        self.begin(step)
        return self.saver.publish(self._noted)

    def abandon(self) -> None:
        """Lets go of a save under way, which will not be published: a rank that had a part of it has died."""
        self.saver.abandon()
