"""A terminal for tests: a real pty with a program in it, and what a person would see on its screen (pyte)."""

import fcntl
import os
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pyte

COLUMNS, LINES = 110, 40


class Screen:
    """What a terminal shows after the bytes that it was fed; `lines` with what has left it at the top."""

    def __init__(self) -> None:
        self.raw = b""
        self._screen = pyte.HistoryScreen(COLUMNS, LINES, history=5000)
        self._stream = pyte.ByteStream(self._screen)

    def feed(self, data: bytes) -> None:
        self.raw += data
        self._stream.feed(data)

    @property
    def lines(self) -> list[str]:
        gone = ["".join(line[at].data for at in range(COLUMNS)).rstrip() for line in self._screen.history.top]
        return [line for line in [*gone, *(line.rstrip() for line in self._screen.display)] if line]


class Terminal(Screen):
    """A program whose stdin, stdout and stderr are a terminal, the controlling one of its session."""

    def __init__(self, command: Sequence[str], folder: Path, **environment: str) -> None:
        super().__init__()
        self._near, far = os.openpty()
        fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        plain = {name: text for name, text in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            command, cwd=folder, env=plain | {"TERM": "xterm"} | environment, stdin=far, stdout=far, stderr=far,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(far)

    def until(self, seen: Callable[[list[str]], bool], within_s: float) -> None:
        """Reads until the screen is as wanted; a program that does not come to it, or ends, fails the test."""
        end = time.monotonic() + within_s
        while not seen(self.lines):
            if not self._read(end):
                self.end(1)
                raise AssertionError("ended, or took too long:\n" + "\n".join(self.lines))

    def type(self, keys: bytes) -> None:
        """What a person presses: b"\\x03" is Ctrl-C."""
        os.write(self._near, keys)

    def end(self, within_s: float) -> int:
        """Reads until the program has left the terminal; returns its exit code. One that does not is killed."""
        end = time.monotonic() + within_s
        while self._read(end):
            pass
        try:
            return self.process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            for member in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                member.kill()
            raise AssertionError("did not end:\n" + "\n".join(self.lines)) from None

    def _read(self, end: float) -> bool:
        if not select.select([self._near], [], [], max(0.0, end - time.monotonic()))[0]:
            return False
        try:
            data = os.read(self._near, 65536)
        except OSError:  # EIO: nobody has it open any more
            return False
        self.feed(data)
        return bool(data)
