"""The terminal of `mlm-mpi run`: what ranks and launcher say runs above the line that rank 0 has drawn at its foot."""

import contextlib
import os
import select
import threading

from mlm_mpi.monitor.live import Shown

_ERASE = b"\r\x1b[K"
_ROOM = 3  # columns left free for the cursor and a ^C: what goes on in another row would not be erased


class Screen:
    """Writes bytes to stdout and stderr; if stdout is `drawn` on, keeps a line at its foot.

    While a line of text is not ended, the foot is away: what stands there belongs together.
    """

    def __init__(self, drawn: bool) -> None:
        self.drawn = drawn
        self._drawn_on = {1, 2} if drawn and os.isatty(2) else {1} if drawn else set()
        self._picture: Shown | None = None
        self._is_drawn = False
        self._inside_line = False
        self._lock = threading.RLock()  # a signal handler may speak while its own thread speaks

    def write(self, descriptor: int, data: bytes) -> None:
        """Passes bytes on. A full disk or a reader that has left does not end the ranks."""
        if not data:
            return
        with self._lock:
            if descriptor in self._drawn_on:
                if self._is_drawn:  # in one piece with what follows: a ^C typed between the two would stay
                    self._is_drawn, data = False, _ERASE + data
                self._inside_line = not data.endswith(b"\n")
            with contextlib.suppress(OSError):
                _write(descriptor, data)
            if not self._is_drawn:
                self._draw()

    def draw(self, picture: Shown | None) -> None:
        """Puts a picture at the foot; None takes it away."""
        with self._lock:
            if picture == self._picture:
                return
            self._picture = picture
            if picture is None:
                self._erase()
            else:
                self._draw()

    def show(self, text: str) -> None:
        """Draws what a sign of `monitor.live` tells; an empty one takes the foot away."""
        self.draw(Shown.decode(text))

    def say(self, text: str) -> None:
        """A line of the launcher's own, never behind half a line of a rank."""
        with self._lock:
            begin = b"\n" if 2 in self._drawn_on and self._inside_line else b""
            self.write(2, begin + f"mlm-mpi run: {text}\n".encode())

    def close(self) -> None:
        """Takes the foot away for good."""
        self.draw(None)

    def _draw(self) -> None:
        if self._picture is not None and self.drawn and not self._inside_line:
            with contextlib.suppress(OSError):
                width = os.get_terminal_size(1).columns
                # in one piece with what it replaces, which would flicker else
                _write(1, _ERASE + self._picture.draw(max(20, width - _ROOM)).encode())
                self._is_drawn = True

    def _erase(self) -> None:
        if self._is_drawn:
            self._is_drawn = False
            with contextlib.suppress(OSError):
                _write(1, _ERASE)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # another program on this terminal has asked for that
            select.select([], [descriptor], [])
