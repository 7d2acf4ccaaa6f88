"""The run's numbers as JSON lines, one object per step, readable by anything."""

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from mlm_mpi.errors import MlmError


class MetricsLog:
    """Appends one JSON line per call, flushed at once.

    A full disk does not end a run: the first I/O error is one alarm line on stderr, lines are lost until
    writing works again, and training goes on. A number that is not finite is written as null.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._alarmed = False
        self._torn = False  # the last write may have left half a line
        self._descriptor: int | None = None
        try:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._torn = not _ends_a_line(self.path)
        except OSError as error:
            self._alarm(error)

    @classmethod
    def open(cls, path: str | Path, resume_step: int) -> "MetricsLog":
        """The log of a run that goes on at `resume_step`: later lines of an interrupted run are dropped.

        The file is replaced atomically. 0 starts a new log.
        """
        path = Path(path)
        log = None
        try:
            if path.exists():
                kept = [record for record in read_metrics(path) if record.get("step", 0) < resume_step]
                part = path.with_name(path.name + ".part")
                part.write_text("".join(_line(record) for record in kept), encoding="utf-8")
                part.replace(path)
        except (OSError, MlmError) as error:
            log = cls(path)
            log._alarm(error)
        return log or cls(path)

    def write(self, **values: Any) -> None:
        """Appends one line."""
        if self._descriptor is None:
            return
        data = (b"\n" if self._torn else b"") + _line(values).encode()
        self._torn = True
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            self._alarm(error)
            return
        self._torn = False

    def close(self) -> None:
        """Closes the file; later lines are lost."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _alarm(self, error: Exception) -> None:
        if not self._alarmed:
            self._alarmed = True
            reason = error.strerror if isinstance(error, OSError) else error
            sys.stderr.write(
                f"mlm-mpi: ALARM cannot write {self.path}: {reason}: the run goes on without its lines; "
                "make room or mend the folder\n"
            )
            sys.stderr.flush()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All complete lines, in order; a line that a crash or a full disk tore is left out.

    Raises MlmError where the file cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise MlmError(f"cannot read {path}: {error.strerror}: give the folder of a run that has started") from None
    records = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def _line(values: dict[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
    return json.dumps(finite, default=float) + "\n"  # default: NumPy scalars


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
