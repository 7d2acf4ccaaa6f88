"""What run folders say of themselves, for whoever compares runs. Reads what rank 0 wrote; needs no MPI, no NumPy."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_mpi.errors import ConfigError
from mlm_mpi.files import read_whole
from mlm_mpi.monitor.metrics import read_metrics

_DONE_BYTES = 1 << 16
LAST = 20  # steps whose mean loss is told: one step's is noise


@dataclass(frozen=True)
class Told:
    """A run so far. Losses in nats per target, by the step after which they were measured, counted from 1."""

    steps: int
    seconds: float  # in steps, without evaluation and saving
    tokens: int  # that all steps read
    loss: float  # mean of the last LAST steps
    heldout: dict[int, float]
    weights: str  # their hash; "" unless the run is complete

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def told(run: Path) -> Told:
    """Raises MlmError where a folder holds no metrics of a run."""
    if not run.is_dir():
        raise ConfigError(f"{run} is no run folder: give the --run folder of a training")
    steps, tokens, seconds, losses, heldout = 0, 0, 0.0, [], {}
    for record in read_metrics(run / "metrics.jsonl"):
        steps = record["step"]
        tokens, seconds = int(_number(record, "tokens", tokens)), seconds + _number(record, "step_s", 0.0)
        losses.append(_number(record, "loss", math.nan))
        if "heldout_loss" in record:
            heldout[steps] = _number(record, "heldout_loss", math.inf)
    last = losses[-LAST:]
    return Told(
        steps, seconds, tokens, math.fsum(last) / len(last) if last else math.nan, heldout, _weights(run, steps)
    )


def _number(record: dict[str, Any], name: str, otherwise: float) -> float:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else otherwise


def _weights(run: Path, steps: int) -> str:
    try:
        found = json.loads(read_whole(run / "DONE", _DONE_BYTES))
        return str(found["weights_sha256"]) if found["step"] == steps else ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""  # not complete, or not ours


def columns(rows: list[list[str]]) -> list[str]:
    """Rows of a table, aligned: the first column to the left, the others to the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width) for at, (cell, width) in enumerate(pairs)
        ).rstrip()
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
