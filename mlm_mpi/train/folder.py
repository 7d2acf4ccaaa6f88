"""The run folder: who owns it, and what it holds besides checkpoints.

config.toml       the effective configuration      metrics.jsonl   one line per step
environment.json  versions, fingerprint, command   loss.png        the curve, at the end
checkpoints/      step-00000100/ …                 DONE            written last: the run is complete
"""

import fcntl
import json
import os
import platform
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec

from mlm_mpi import config as configuration
from mlm_mpi.config import Config
from mlm_mpi.errors import ConfigError
from mlm_mpi.files import publish


class RunFolder:
    """A folder held by one live run: the lock ends with the process that holds it, however it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.curve = path / "loss.png"
        self.done = path / "DONE"
        self._lock: int | None = None

    def acquire(self) -> None:
        """Makes the folder and takes its lock. Raises ConfigError naming the live run that holds it."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"cannot use {self.path} as run folder: {error.strerror}: give another --run") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 200).decode(errors="replace").strip() or "another process"
            os.close(lock)
            raise ConfigError(
                f"{self.path} is in use by a live run ({holder}): wait for it, stop it, or give another --run"
            ) from None
        except OSError as error:
            os.close(lock)
            raise ConfigError(
                f"cannot lock {self.path}: {error.strerror}: put --run on a file system with locks (flock)"
            ) from None
        os.ftruncate(lock, 0)
        os.write(lock, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        self._lock = lock

    def describe(self, config: Config, facts: dict[str, Any], ranks: int) -> None:
        """Writes the effective configuration and what it runs on."""
        environment = {
            "command": sys.argv, "ranks": ranks, "host": socket.gethostname(), "platform": platform.platform(),
            "python": platform.python_version(), "fingerprint": facts,
        }  # fmt: skip
        findable = msgspec.structs.replace(config.data, dir=str(Path(config.data.dir).absolute()))
        config = msgspec.structs.replace(config, data=findable)
        publish(self.path / "config.toml", configuration.to_toml(config).encode())
        publish(self.path / "environment.json", (json.dumps(environment, indent=1) + "\n").encode())
        self.done.unlink(missing_ok=True)

    def finish(self, step: int, weights: str) -> None:
        """Writes DONE: the only evidence that a run is complete (exit codes of launchers are none)."""
        publish(self.done, (json.dumps({"step": step, "weights_sha256": weights}) + "\n").encode())


def open_run(path: Path) -> tuple[RunFolder, Config]:
    """A run folder and its configuration, for reading. Raises ConfigError if there is none."""
    folder = RunFolder(path)
    if not (path / "config.toml").is_file():
        raise ConfigError(f"{path} is no run folder (it has no config.toml): give the --run folder of a training run")
    return folder, configuration.load(path / "config.toml")
