"""The search for the best weights of a run: which measurement was the best, and when there have been enough.

All ranks judge alike, since all have rank 0's figure. What was judged is saved with every checkpoint, so that a run
that was killed goes on with the same decisions; best.json names the best checkpoint for whoever comes later.
"""

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from mlm_mpi.errors import ConfigError
from mlm_mpi.files import publish, read_whole
from mlm_mpi.train import Eval
from mlm_mpi.train.folder import RunFolder, checkpoints_of
from mlm_mpi.train.manifest import FOLDER, PREFIX, step_of

BEST = "best.json"
_BYTES = 1 << 16


class Heldout(NamedTuple):
    """What was measured: the mean loss in nats per target, and the figure that a search goes by."""

    loss: float
    figure: float


class Search:
    """`higher`: whether more of the figure is better; `names`: whether this rank writes best.json."""

    def __init__(self, wanted: Eval, higher: bool, folder: RunFolder, names: bool) -> None:
        self.wanted, self.higher, self.folder, self.names = wanted, higher, folder, names
        self.best, self.value = 0, math.nan  # step and figure of the best measurement; 0: there is none
        self.worse, self.at = 0, 0  # measurements since then, and the step of the last one
        self.named = 0  # the step that best.json names

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on with the judgements that a checkpoint knows, where they were made by the same figure."""
        if state.get("figure") == self.wanted.figure:
            self.best, self.value = int(state["best"]), float(state["value"])
            self.worse, self.at = int(state["worse"]), int(state["at"])
        found = _read(self.folder.path)
        self.named = 0 if found is None else step_of(found)

    def state(self) -> dict[str, Any]:
        """For a manifest; nothing before the first judgement."""
        if not self.best:
            return {}
        return {
            "figure": self.wanted.figure, "best": self.best, "value": self.value, "worse": self.worse, "at": self.at,
        }  # fmt: skip

    def judge(self, step: int, heldout: Heldout | None) -> bool:
        """Takes a measurement in; whether it is the best so far. One of a step that was judged changes nothing."""
        if heldout is None or not self.wanted.searches:
            return False
        if step > self.at:
            self.at = step
            gain = heldout.figure - self.value if self.higher else self.value - heldout.figure
            if math.isfinite(heldout.figure) and (not self.best or gain > 0):
                self.best, self.value, self.worse = step, heldout.figure, 0
            else:
                self.worse += 1
        return self.wanted.best and self.best == step

    def misses(self, step: int) -> bool:
        """Whether a measurement after so many steps would be news."""
        return self.wanted.searches and step > self.at

    @property
    def is_over(self) -> bool:
        """Whether patience has come to its end."""
        return 0 < self.wanted.patience <= self.worse

    def spared(self) -> Collection[int]:
        """Steps whose checkpoints stay, however old."""
        return {self.named, self.best} if self.wanted.best else ()

    def settle(self) -> None:
        """Names the best checkpoint where it has come to stand, which may be steps after it was judged."""
        path = self.folder.checkpoints / f"{PREFIX}{self.best:08}"
        if self.names and self.wanted.best and self.best not in (0, self.named) and path.is_dir():
            found = {"checkpoint": path.name, "figure": self.wanted.figure, "value": self.value}
            publish(self.folder.path / BEST, (json.dumps(found) + "\n").encode())
            self.named = self.best

    def in_words(self) -> str:
        """The best so far, and how it went on."""
        many = f"{self.worse} evaluation{'s' * (self.worse != 1)}"
        return f"{many} without a better {self.wanted.figure} than {self.value:.4f} of step {self.best}"


def best_of(run: str | Path) -> Path:
    """The checkpoint that best.json of a run folder names. Raises ConfigError where there is none."""
    folder = Path(run)
    checkpoints_of(folder)
    found = _read(folder)
    if found is None or not found.is_dir():
        raise ConfigError(
            f"{folder} has no {BEST} that names one of its checkpoints: train with eval.best = true, or "
            "leave --best out"
        )
    return found


def _read(run: Path) -> Path | None:
    try:
        found = json.loads(read_whole(run / BEST, _BYTES, run))
        name = found["checkpoint"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return run / "checkpoints" / name if isinstance(name, str) and FOLDER.fullmatch(name) else None
