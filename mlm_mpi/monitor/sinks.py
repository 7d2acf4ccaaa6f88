"""Where the numbers of each step go besides metrics.jsonl: TensorBoard, Weights & Biases.

A sink may fail, and need not be handled with care: whoever writes to it leaves it out from its first exception on.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, Protocol

from mlm_mpi.errors import ConfigError
from mlm_mpi.files import publish
from mlm_mpi.monitor import Log

_PIPE_BYTES = 1 << 20  # 3,000 steps, beside those that the program holds; no user is allowed more


class Sink(Protocol):
    """Takes the numbers of a step, `step` and `time` among them, by the names they have in metrics.jsonl.

    Both return what the reader of the terminal has to know, if anything; both may raise anything.
    """

    name: str

    def write(self, **values: Any) -> str | None: ...

    def close(self) -> str | None: ...


def check(log: Log) -> None:
    """Raises ConfigError where a package is missing that [log] asks for."""
    for package in ("tensorboard", "wandb"):
        if getattr(log, package):
            found = importlib.util.find_spec(package)
            if found is None or found.origin is None:  # a folder of that name is no package
                raise ConfigError(
                    f"log.{package} needs the package {package}, which is not installed here: "
                    f"pip install {package}, or leave log.{package} out"
                )


def opened(log: Log, folder: Path, config: dict[str, Any], patience_s: float) -> list[Sink]:
    """The sinks that [log] asks for, of the run in `folder`; the others as in `Wandb`."""
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
        self._file = RecordWriter((self.folder / name).open("xb"))

    def _put(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._file.write(Event(**fields).SerializeToString())
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


class Wandb:
    """Hands numbers to a program that sends them to a project at Weights & Biases (wandb_sender.py).

    Where that cannot send (no API key, no network) it keeps them in `folder`/wandb, for `wandb sync`. The run's id
    stands in `folder`/wandb/run-id, so that another start goes on with its curves.
    """

    name = "log.wandb"

    def __init__(self, project: str, folder: Path, config: dict[str, Any], patience_s: float) -> None:
        """`config`: what the service shows of the run. `close` waits at most `patience_s`."""
        self._about = {"project": project, "name": folder.absolute().name, "config": config}
        self._folder, self._patience_s = folder.absolute(), patience_s
        self._sender: subprocess.Popen[bytes] | None = None

    def write(self, **values: Any) -> str | None:
        """Never waits. Raises what went wrong with the program, or where it does not keep up."""
        sender = self._sender or self._start()
        try:
            self._send(sender, values)
        except BlockingIOError:
            sender.kill()
            raise TimeoutError("it takes no more numbers") from None
        except BrokenPipeError:
            return self._last_words(sender)
        return self._news(sender)

    def close(self) -> str | None:
        """Waits for the program to send what it has. Raises what went wrong there, or TimeoutError."""
        if self._sender is None:
            return None
        with contextlib.suppress(OSError):  # its end is awaited all the same
            self._send(self._sender, None)
        _input(self._sender).close()
        try:
            self._sender.wait(self._patience_s)
        except subprocess.TimeoutExpired:
            self._sender.kill()
            late = f"not all was sent within {self._patience_s:g} s: wandb sync {self._folder}/wandb/*run-*"
            raise TimeoutError(late) from None
        return self._last_words(self._sender)

    def _start(self) -> "subprocess.Popen[bytes]":
        sender = self._sender = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("wandb_sender.py"))], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, pipesize=_PIPE_BYTES,
        )  # fmt: skip
        about = self._about | {"id": self._id()}
        self._send(sender, {"folder": str(self._folder), "patience_s": self._patience_s, "about": about})
        os.set_blocking(_input(sender).fileno(), False)
        os.set_blocking(_output(sender).fileno(), False)
        return sender

    def _send(self, sender: "subprocess.Popen[bytes]", values: dict[str, Any] | None) -> None:
        os.write(_input(sender).fileno(), json.dumps(values, default=float).encode() + b"\n")  # short: all or nothing

    def _news(self, sender: "subprocess.Popen[bytes]") -> str | None:
        """What the program has said since. Raises RuntimeError where it has failed."""
        said = (_output(sender).read() or b"").decode(errors="replace")
        for line in said.splitlines():
            kind, _, text = line.partition(" ")
            if kind == "failed":
                raise RuntimeError(text)
            return f"note: {self.name}: {text}"
        return None

    def _last_words(self, sender: "subprocess.Popen[bytes]") -> str | None:
        """The same of a program that is ending. Raises RuntimeError also where it ends badly without a word."""
        said = self._news(sender)
        if code := sender.wait():
            raise RuntimeError(f"its program ended with exit code {code}")
        return said

    def _id(self) -> str:
        path = self._folder / "wandb" / "run-id"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            publish(path, secrets.token_hex(8).encode())
        return path.read_text()


def _input(process: "subprocess.Popen[bytes]") -> IO[bytes]:
    assert process.stdin is not None
    return process.stdin


def _output(process: "subprocess.Popen[bytes]") -> IO[bytes]:
    assert process.stdout is not None
    return process.stdout
