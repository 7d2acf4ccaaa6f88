"""Where the numbers of each step go besides metrics.jsonl: TensorBoard, Weights & Biases.

A sink may fail, and need not be handled with care: whoever writes to it leaves it out from its first exception on.
"""

import importlib
import queue
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from mlm_mpi.errors import ConfigError
from mlm_mpi.files import publish
from mlm_mpi.monitor import Log

_MODULES = {"tensorboard": "tensorboard.summary.writer.record_writer", "wandb": "wandb"}  # key of [log] -> what it needs
_BEHIND = 10_000  # steps that may wait for wandb


class Sink(Protocol):
    """Takes the numbers of a step, `step` and `time` among them, by the names they have in metrics.jsonl.

    Both return what the reader of the terminal has to know, if anything; both may raise anything.
    """

    name: str

    def write(self, **values: Any) -> str | None: ...

    def close(self) -> str | None: ...


def check(log: Log) -> None:
    """Raises ConfigError where a package is missing, or broken, that [log] asks for."""
    for key, module in _MODULES.items():
        if getattr(log, key):
            try:
                importlib.import_module(module)
            except Exception as problem:  # a package may fail to load for any reason
                raise ConfigError(
                    f"log.{key} needs a package that does not load here ({problem}): "
                    f"pip install 'mlm-mpi[{key}]', or leave log.{key} out"
                ) from None


def opened(log: Log, folder: Path, config: dict[str, Any], patience_s: float) -> list[Sink]:
    """The sinks that [log] asks for, for the run in `folder`; the others as in `Wandb`."""
    board: list[Sink] = [TensorBoard(folder / "tensorboard")] if log.tensorboard else []
    return board + ([Wandb(log.wandb, folder, config, patience_s)] if log.wandb else [])


class TensorBoard:
    """Writes an event file per start into a folder, at once and in this thread; `tensorboard --logdir` shows them.

    The package's own writer has a thread, and loads TensorFlow where that is installed.
    """

    name = "log.tensorboard"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: Any = None

    def write(self, **values: Any) -> None:
        """One event with all numbers. At the first step, what an interrupted start wrote of later ones is hidden."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        step, at = values.pop("step"), values.pop("time")
        if self._file is None:
            self._open()
            self._put(wall_time=at, file_version="brain.Event:2")
            self._put(wall_time=at, step=step, session_log=SessionLog(status=SessionLog.START))
        numbers = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self._put(wall_time=at, step=step, summary=Summary(value=numbers))

    def _open(self) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"  # TensorBoard reads in the order of names
        self._file = RecordWriter(open(self.folder / name, "xb"))

    def _put(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._file.write(Event(**fields).SerializeToString())
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


class Wandb:
    """Sends numbers to a project at Weights & Biases, in a thread of its own, so that no service holds up a step.

    Where it cannot send (no API key, no network) it keeps them in `folder`/wandb, for `wandb sync`. The run's id stands
    in `folder`/wandb/run-id, so that another start goes on with its curves.
    """

    name = "log.wandb"

    def __init__(self, project: str, folder: Path, config: dict[str, Any], patience_s: float) -> None:
        """`config`: what the service shows of the run. `close` waits at most `patience_s`."""
        self._folder, self._patience_s = folder, patience_s
        self._about = {"project": project, "name": folder.absolute().name, "dir": str(folder), "config": config}
        self._steps: queue.Queue[dict[str, Any] | None] = queue.Queue(_BEHIND)
        self._said: str | None = None
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self._thread.start()

    def write(self, **values: Any) -> str | None:
        """Hands the numbers to the thread. Raises what went wrong there, or queue.Full where it does not keep up."""
        self._steps.put_nowait(values)
        return self._news()

    def close(self) -> str | None:
        """Waits for the thread to send what it has. Raises what went wrong there, or TimeoutError."""
        self._steps.put(None, timeout=self._patience_s)
        self._thread.join(self._patience_s)
        if self._thread.is_alive():
            raise TimeoutError(f"not all was sent within {self._patience_s:g} s: wandb sync {self._folder}/wandb/run-*")
        return self._news()

    def _news(self) -> str | None:
        if self._problem is not None:
            raise self._problem
        said, self._said = self._said, None
        return said

    def _serve(self) -> None:
        try:
            run = self._start()
            while (values := self._steps.get()) is not None:
                run.log({name: value for name, value in values.items() if name != "time"}, step=values["step"])
            run.finish()
        except Exception as problem:  # told by the thread that writes
            self._problem = problem

    def _start(self) -> Any:
        import wandb

        settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, init_timeout=30)
        mode = wandb.setup(settings).settings.mode
        about = self._about | {"id": self._id(), "resume": "allow", "settings": settings}
        reason = "no API key, which `wandb login` or WANDB_API_KEY gives"
        try:
            if mode != "online" or wandb.login(prompt=False, verify=False):
                return wandb.init(**about)
        except wandb.Error as error:
            reason = str(error).partition("\n")[0]
        run = wandb.init(**about, mode="offline")
        self._said = f"note: log.wandb: {reason}: kept on disk, send it by wandb sync {self._folder}/wandb/offline-run-*"
        return run

    def _id(self) -> str:
        path = self._folder / "wandb" / "run-id"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            publish(path, secrets.token_hex(8).encode())
        return path.read_text()
