"""The run folder: who owns it, and what it holds besides checkpoints.

config.toml       the effective configuration      metrics.jsonl   one line per step
environment.json  versions, fingerprint, command   ledger.jsonl    who did what in each step (evidence.py)
checkpoints/      step-00000100/ …                 loss.png        the curve, at the end
run.lock          who holds it                     DONE            written last: the run is complete
tensorboard/ wandb/   where [log] asks for them    failures.jsonl, stacks/  of ranks that failed, or stalled
best.json         names the best checkpoint, where eval.best asks for it (search.py)
reference.json    what the initial weights say of the samples, for a task that compares with it (reference.py)
"""

import contextlib
import json
import os
import platform
import re
import shlex
import socket
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mlm_mpi import config as configuration
from mlm_mpi.comm.neighbours import Records
from mlm_mpi.config import Config
from mlm_mpi.errors import ConfigError
from mlm_mpi.files import HeldError, Lock, publish, read_whole

_DONE_BYTES = 1 << 16
_TAKE_OVER_S = 10.0
_NOBODYS = re.compile(r"\..*|.+\.(log|out|err)", re.DOTALL)  # hidden, or of a job, which begins before its run


class RunFolder:
    """A folder held by one live run: the lock ends with the process that holds it, however it ends."""

    def __init__(self, path: Path, named_by: str = "--run") -> None:
        """`named_by`: the option that gave the folder."""
        self.path, self.named_by = path, named_by
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.ledger = path / "ledger.jsonl"
        self.curve = path / "loss.png"
        self.done = path / "DONE"
        self.reference = path / "reference.json"
        self.records = Records(path / "stacks", path / "failures.jsonl")
        self._lock: Lock | None = None

    def acquire(self) -> None:
        """Makes the folder and takes its lock. A folder that cannot be used is left as it was.

        Raises ConfigError: a live run holds it, it holds files that no run wrote, or it cannot be made.
        """
        made: list[Path] = []
        try:
            made = [path for path in (self.checkpoints, self.path, *self.path.parents) if not path.exists()]
            self._refuse_foreign()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.path / "run.lock")  # first: whatever kills this start, the folder is a run's
            self.checkpoints.mkdir(exist_ok=True)
        except HeldError as holder:
            raise ConfigError(
                f"{self.path} is in use by a live run ({holder}): wait for it, stop it, or give another {self.named_by}"
            ) from None
        except OSError as error:
            self._remove(made)
            raise ConfigError(
                f"cannot use {self.path} as run folder: {error.strerror}: "
                f"give another {self.named_by}, on a file system with space and locks (flock)"
            ) from None

    def take_over(self) -> None:
        """Takes the lock of a rank that has died: the kernel frees it when that process is gone. Raises ConfigError."""
        end = time.monotonic() + _TAKE_OVER_S
        while self._lock is None:
            try:
                self._lock = Lock(self.path / "run.lock")
            except HeldError as holder:
                if time.monotonic() > end:
                    raise ConfigError(f"{self.path} is still held ({holder}): start again when it is free") from None
                time.sleep(0.01)

    def _refuse_foreign(self) -> None:
        """A new run begins in an empty folder, but for logs of jobs and what is hidden; its lock is its first file."""
        if (self.path / "run.lock").exists() or not self.path.exists():
            return
        found = sorted(path.name for path in self.path.iterdir() if not _NOBODYS.fullmatch(path.name))
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ConfigError(
                f"{self.path} holds {', '.join(found[:3])}{more}, which no run of mlm-mpi wrote: "
                f"give another {self.named_by}, or move them"
            )

    def _remove(self, made: list[Path]) -> None:
        with contextlib.suppress(OSError):  # what the first error says is what counts
            if self.path in made:
                (self.path / "run.lock").unlink(missing_ok=True)
            for path in made:
                if path.exists():
                    path.rmdir()

    def describe(self, config: Config, facts: dict[str, Any], ranks: int) -> None:
        """Writes the effective configuration and what it runs on."""
        environment = {
            "command": _command(), "started": _now(), "ranks": ranks, "host": socket.gethostname(),
            "platform": platform.platform(), "python": platform.python_version(), "fingerprint": facts,
        }  # fmt: skip
        publish(self.path / "config.toml", configuration.to_toml(config).encode())
        publish(self.path / "environment.json", (json.dumps(environment, indent=1) + "\n").encode())
        self.done.unlink(missing_ok=True)
        self.records.failures.unlink(missing_ok=True)

    def failures(self) -> list[tuple[int, int, str]]:
        """(step, micro-batch, what was said) of each rank that failed since this start."""
        try:
            lines = read_whole(self.records.failures, _DONE_BYTES).splitlines()
            return [(int(step), int(index), str(text)) for step, index, text in map(json.loads, lines)]
        except (OSError, ValueError):
            return []

    def finish(self, step: int, weights: str, patience: int = 0) -> None:
        """Writes DONE: the only evidence that a run is complete (exit codes of launchers are none).

        `patience`: of a run that has ended before its last step for want of better figures.
        """
        found = {"step": step, "weights_sha256": weights, "time": _now()} | ({"patience": patience} if patience else {})
        publish(self.done, (json.dumps(found) + "\n").encode())

    def completion(self) -> tuple[int, str, int] | None:
        """(steps, when they were made, if that is known, the patience that ended them, 0 if none did) as DONE says;
        None where there is none that can be read."""
        try:
            found = json.loads(read_whole(self.done, _DONE_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or type(found.get("step")) is not int:
            return None
        patience = found.get("patience")
        return found["step"], str(found.get("time", "")), patience if type(patience) is int else 0

    def confirm(self) -> None:
        """Gives DONE a new time and changes nothing in it: a job script sees that this start found the run complete."""
        with contextlib.suppress(OSError):  # the file of somebody else
            os.utime(self.done)


def _now() -> str:
    return datetime.now().astimezone().isoformat(" ", "seconds")


def _command() -> str:
    """What was typed on each rank, as one line for a shell."""
    program, *words = sys.argv
    own = Path(program).name in ("mlm-mpi", "__main__.py")
    return shlex.join(["mlm-mpi" if own else program, *words])


def findable(config: Config) -> Config:
    """The same with names of corpora, checkpoint and vectors that hold from any working directory, to be written down.

    Raises ConfigError.
    """
    data = config.data
    mixture = tuple(_absolute(folder, "data.mixture") for folder in data.mixture)
    start = config.start
    if start.checkpoint:
        start = replace(start, checkpoint=_absolute(start.checkpoint, "start.checkpoint"))
    if start.vectors:
        start = replace(start, vectors=_absolute(start.vectors, "start.vectors"))
    return replace(config, data=replace(data, dir=_absolute(data.dir, "data.dir"), mixture=mixture), start=start)


def _absolute(folder: str, key: str) -> str:
    path = str(Path(folder).absolute())
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{key} = {path!r} is no UTF-8, which files of a run are written in: rename it") from None
    return path


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is itself a checkpoint, wherever it was copied to."""
    return os.access(path / "manifest.json", os.R_OK)


def checkpoints_of(run: Path) -> Path:
    """The checkpoints of a run folder, for reading. Raises ConfigError if it has none or they may not be read."""
    folder = run / "checkpoints"
    try:
        os.scandir(f"{folder}/.").close()  # the dot: a folder that may be listed but not searched is refused too
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{run} is no run folder (it has no checkpoints/): "
            "give the --run folder of a training run, or one of its checkpoints"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read {folder}: {error.strerror}: give a run folder that you may read") from None
    return folder
