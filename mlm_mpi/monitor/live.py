"""One line at the foot of the terminal that is drawn again and again: how far something is.

A process alone draws it. A rank cannot: Open MPI holds back what does not end in a newline; so it gives signs to
`mlm-mpi run`, which draws (`screen.py`). Without a terminal nothing is drawn, and lasting lines are plain.
"""

import contextlib
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from io import StringIO
from typing import IO, TYPE_CHECKING, Protocol

from mlm_mpi import signs

if TYPE_CHECKING:  # 0.15 s to import, which a launcher without a terminal does not spend
    from rich.console import Console
    from rich.progress import Progress, TaskID

WORD = "show"  # of the signs
TERMINAL = "MLM_MPI_TERMINAL"  # set by `mlm-mpi run`: whether it writes to a terminal
_LAUNCHERS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
_PAUSE_S = 0.1  # between two pictures: more would cost time, and nobody reads so fast
_BAR = 20  # columns
_LONGEST = 1000  # characters of a text; a sign stays below what a pipe writes in one piece


def can_draw() -> bool:
    """Whether stdout is a terminal that can be drawn on."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def on_terminal() -> bool:
    """Whether what is drawn reaches a terminal.

    Open MPI gives ranks a pseudo-terminal whatever mpiexec writes to, so under a launcher only what
    `mlm-mpi run` found out counts.
    """
    told = os.environ.get(TERMINAL)
    if told is not None:
        return told == "1"
    if any(name in os.environ for name in _LAUNCHERS):
        return False
    return can_draw()


@dataclass(frozen=True)
class Shown:
    """A picture: `what` before a bar of `done` out of `total`, and `text` behind it."""

    what: str
    done: float
    total: float
    text: str

    def encode(self) -> str:
        """One line that `decode` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, line: str) -> "Shown | None":
        """What `encode` made; None for anything else, which may be another program's."""
        try:
            picture = cls(**json.loads(line))
            numbers = all(type(n) in (int, float) and math.isfinite(n) for n in (picture.done, picture.total))
        except (ValueError, TypeError, RecursionError, OverflowError):  # the last: a whole number beyond all floats
            return None
        texts = isinstance(picture.what, str) and isinstance(picture.text, str)
        return picture if numbers and texts else None

    def draw(self, width: int) -> str:
        """One line of at most `width` columns, with the codes for colours."""
        console = _console(StringIO(), width)
        progress = _bar(console)
        _draw_on(progress, progress.add_task("", what=self.what), self)
        with console.capture() as drawn:
            console.print(progress.get_renderable(), no_wrap=True, crop=True, end="")
        return drawn.get().partition("\n")[0]


class Live(Protocol):
    """How far something is. `drawn`: somebody sees it; else what lasts is all there is."""

    drawn: bool

    def update(self, done: float, total: float, text: str) -> None: ...

    def line(self, text: str) -> None: ...

    def close(self) -> None: ...


def live(what: str, terminal: bool | None = None) -> Live:
    """The line of this process, `what` before its bar; `terminal` overrules what was found out."""
    if not (on_terminal() if terminal is None else terminal):
        return Plain()
    return Sent(what) if signs.is_heard() else Drawn(what)


class Plain:
    """No terminal: only what lasts."""

    drawn = False

    def update(self, done: float, total: float, text: str) -> None:
        """Nothing."""

    def line(self, text: str) -> None:
        """A line of stdout."""
        print(text, flush=True)

    def close(self) -> None:
        """Nothing."""


class Sent:
    """A rank's: `mlm-mpi run` draws it, and puts above it what this rank prints."""

    drawn = True

    def __init__(self, what: str) -> None:
        self.what = what
        self._pace = _Pace()

    def update(self, done: float, total: float, text: str) -> None:
        """Shows how far it is, a few times a second at most."""
        if self._pace.is_time(done >= total):
            _send(Shown(self.what, done, total, text[:_LONGEST]).encode())

    def line(self, text: str) -> None:
        """A line of stdout."""
        print(text, flush=True)

    def close(self) -> None:
        """Takes the bar away."""
        _send("")


def _send(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody is there to look at it
        os.write(2, signs.sign(WORD, text))


class Drawn:
    """A bar that this process draws, above which stdout and stderr of Python go on."""

    drawn = True

    def __init__(self, what: str) -> None:
        self.what = what
        self._pace = _Pace()
        width = os.environ.get("COLUMNS", "")
        self._bar = _bar(_console(sys.stdout, max(40, int(width)) if width.isdecimal() else None))
        self._task = self._bar.add_task("", total=None, what=what)
        self._bar.start()

    def update(self, done: float, total: float, text: str) -> None:
        """Shows how far it is, a few times a second at most."""
        if self._pace.is_time(done >= total):
            _draw_on(self._bar, self._task, Shown(self.what, done, total, text))
            self._bar.refresh()

    def line(self, text: str) -> None:
        """A lasting line above the bar."""
        self._bar.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.stop()


def _console(file: IO[str], width: int | None) -> "Console":
    from rich.console import Console

    return Console(
        file=file, force_terminal=True, width=width, highlight=False, legacy_windows=False, color_system="standard"
    )


def _bar(console: "Console") -> "Progress":
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.fields[what]}", markup=False), BarColumn(bar_width=_BAR),
        TextColumn("{task.description}", markup=False), console=console, auto_refresh=False, transient=True,
    )  # fmt: skip


def _draw_on(bar: "Progress", task: "TaskID", picture: Shown) -> None:
    from rich.cells import cell_len, set_cell_size

    room = bar.console.width - cell_len(picture.what) - _BAR - 2  # else the bar would make room for the text
    text = "".join(c if c.isprintable() else "?" for c in picture.text)
    text = text if cell_len(text) <= room else set_cell_size(text, max(0, room - 1)) + "…"
    bar.update(task, completed=picture.done, total=picture.total, description=text, what=picture.what)


class _Pace:
    """Says when the next picture is due."""

    def __init__(self) -> None:
        self._next = 0.0

    def is_time(self, last: bool) -> bool:
        now = time.monotonic()
        if now < self._next and not last:
            return False
        self._next = now + _PAUSE_S
        return True
