"""ledger.jsonl: what was done in each step, and by whom. One line a step, written when all have made it.

    {"step": 12, "samples": [2816, 3072], "ranks": [[0, 8], [2, 8]], "windows": "8f0e…", "skipped": {"3": "why"}}

Steps count from 1. `samples`: those of the run that are the step's own, [first, stop). `ranks`: the name that a rank
had when the job began and how many micro-batches it ran, in the order of micro-batches. `windows`: 8 hex digits for
each micro-batch, the digest (data/sampler.py) of what its loader delivered to the rank that ran it. `skipped`:
micro-batches that are in no sum. `undone`: [first, last] of the steps that a roll-back has undone. A ledger that begins
in the middle of a run says so in its first line.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec

from mlm_mpi.monitor.metrics import MetricsLog, read_metrics
from mlm_mpi.train.engine import StepResult

_LINE_BYTES = 1 << 20  # 130,000 micro-batches
_REASON = 500  # characters

_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
_Rank = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]  # who reads a ledger counts what each has done


class Line(msgspec.Struct):
    """A step."""

    step: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
    samples: tuple[_Count, _Count]
    ranks: list[tuple[_Rank, _Count]]
    windows: str
    skipped: dict[str, str] = {}
    undone: tuple[_Count, _Count] | None = None


class Begin(msgspec.Struct):
    """The first line of a ledger whose run had made `step` steps before."""

    step: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
    begins: str


class _Log(MetricsLog):
    name = "ledger.jsonl"
    line_bytes = _LINE_BYTES


class Evidence:
    """Writes the ledger of a run that goes on after `done` steps. `samples`: those of the first so many steps."""

    def __init__(self, path: Path, done: int, samples: Callable[[int], int]) -> None:
        self.samples = samples
        self._log = _Log.open(path, done)
        if done and path.is_file() and not path.stat().st_size:
            self._log.write(step=done, begins="this run had no ledger before")

    def write(self, step: int, done: StepResult) -> None:
        """Step number `step` was made by all. A disk that does not take it is an alarm."""
        skipped = {str(index): reason[:_REASON] for index, reason in done.verdict.skipped.items()}
        undone = [done.verdict.undone, step] if done.verdict.undone else []
        rare = {name: value for name, value in (("skipped", skipped), ("undone", undone)) if value}
        self._log.write(
            step=step, samples=[self.samples(step - 1), self.samples(step)], ranks=done.ranks,
            windows="".join(f"{digest:08x}" for digest in done.windows), **rare,
        )  # fmt: skip

    def close(self) -> None:
        """Closes the file."""
        self._log.close()


def read(path: Path) -> Iterator[tuple[int, Line | Begin | None]]:
    """(step, its line) in the order of the file; None where it is not as a ledger's. Torn lines are left out.

    Raises MlmError where the file cannot be read.
    """
    for record in read_metrics(path, _LINE_BYTES):
        yield record["step"], _converted(record)


def _converted(record: dict[str, Any]) -> Line | Begin | None:
    try:
        return msgspec.convert(record, Begin) if "begins" in record else msgspec.convert(record, Line)
    except msgspec.ValidationError:
        return None
