"""The run's numbers as JSON lines, one object per step, readable by anything. Steps count from 1."""

import filecmp
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from mlm_mpi.errors import MlmError
from mlm_mpi.files import open_regular

_LINE_BYTES = 1 << 16  # a line of ours has 300
_FILE_BYTES = 1 << 32
_STEPS = 1 << 53  # a plot's numbers are float64
_decoder = msgspec.json.Decoder()  # 7 times as fast as json: 10^6 lines in 4 s


class MetricsLog:
    """Appends one JSON line per call, flushed at once.

    A full disk does not end a run: the first I/O error is one alarm line on stderr, lines are lost until
    writing works again, and training goes on. A number that is not finite is written as null.
    """

    name = "metrics.jsonl"
    line_bytes = _LINE_BYTES  # a longer one is junk

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._alarmed = False
        self._torn = False  # the last write may have left half a line
        self._descriptor: int | None = None
        try:
            self._descriptor = os.open(
                self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o644
            )
            self._torn = not _ends_a_line(self.path)
        except OSError as error:
            self._alarm(error)

    @classmethod
    def open(cls, path: str | Path, done: int) -> "MetricsLog":
        """The log of a run that goes on after `done` steps: lines of later ones, made again, are dropped.

        The file is replaced atomically. 0 starts a new log.
        """
        path = Path(path)
        log = None
        try:
            if path.exists():
                part = path.with_name(path.name + ".part")
                part.unlink(missing_ok=True)  # what is left there may lead elsewhere
                with open(part, "xb") as file:
                    file.writelines(line for step, line in _counted_from_one(path, cls.line_bytes) if step <= done)
                if filecmp.cmp(part, path, shallow=False):  # nothing to drop: its time says when a step was made
                    part.unlink()
                else:
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


def read_metrics(path: str | Path, line_bytes: int = _LINE_BYTES) -> Iterator[dict[str, Any]]:
    """All lines of a step, in order; one that a crash or a full disk tore, and any other junk, is left out.

    Raises MlmError where the file cannot be read.
    """
    return (record for record, _ in _lines(Path(path), line_bytes))


def _lines(path: Path, line_bytes: int) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each record with the line it was read from."""
    try:
        with open(open_regular(path), "rb", buffering=_LINE_BYTES) as file:
            if os.fstat(file.fileno()).st_size > _FILE_BYTES:
                raise MlmError(f"{path} has more than {_FILE_BYTES:,} bytes: move it away")
            whole = True
            while line := file.readline(line_bytes):
                begins, whole = whole, line.endswith(b"\n") or len(line) < line_bytes
                record = _record(line) if begins and whole else None
                if record is not None:
                    yield record, line.rstrip(b"\n") + b"\n"
    except OSError as error:
        raise MlmError(f"cannot read {path}: {error.strerror}: give the folder of a run that has started") from None


def _counted_from_one(path: Path, line_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(step, line) of each record. A file that begins with step 0 is an earlier version's, which counted from 0."""
    shift = None
    for record, line in _lines(path, line_bytes):
        shift = record["step"] == 0 if shift is None else shift
        step = record["step"] + shift
        yield step, _line(record | {"step": step}).encode() if shift else line


def _record(line: bytes) -> dict[str, Any] | None:
    """An object with a step that a run can have reached."""
    try:
        record = _decoder.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step < _STEPS else None


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
