"""What a person sees of a run: a table at the start, a bar or plain lines while it runs."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

_LAUNCHERS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")


def on_terminal() -> bool:
    """Whether stdout reaches a terminal.

    Open MPI gives ranks a pseudo-terminal whatever mpiexec writes to, so under a launcher only what
    `mlm-mpi run` found out (MLM_MPI_TERMINAL) counts.
    """
    told = os.environ.get("MLM_MPI_TERMINAL")
    if told is not None:
        return told == "1"
    if any(name in os.environ for name in _LAUNCHERS):
        return False
    return sys.stdout.isatty()


def console(terminal: bool | None = None) -> Console:
    """A rich console on stdout; without a terminal it writes plain text, never ANSI."""
    fancy = on_terminal() if terminal is None else terminal
    told = os.environ.get("COLUMNS", "")
    width = max(40, int(told)) if told.isdecimal() else None if fancy else 120
    return Console(
        file=sys.stdout, force_terminal=fancy, width=width, no_color=not fancy, highlight=False, legacy_windows=False,
        color_system="standard" if fancy else None,
    )  # fmt: skip


def show_plan(title: str, rows: Sequence[tuple[str, str]], terminal: bool | None = None) -> None:
    """Prints a titled table of names and values."""
    fancy = on_terminal() if terminal is None else terminal
    if not fancy:
        width = max((len(name) for name, _ in rows), default=0)
        print(title, *(f"  {name:<{width}}  {value}" for name, value in rows), sep="\n", flush=True)
        return
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    console(fancy).print(table)


class Reporter(Protocol):
    """What the training loop tells about itself; `Progress` shows it, `Silent` does not."""

    def update(
        self, step: int, loss: float, tokens_per_s: float, comm_share: float, wait_share: float,
        learning_rate: float, heldout: float | None = None,
    ) -> None: ...  # fmt: skip

    def message(self, text: str, important: bool = False) -> None: ...

    def close(self) -> None: ...


class Silent:
    """The reporter of every rank but 0: says nothing."""

    def update(
        self, step: int, loss: float, tokens_per_s: float, comm_share: float, wait_share: float,
        learning_rate: float, heldout: float | None = None,
    ) -> None:  # fmt: skip
        """Nothing."""

    def message(self, text: str, important: bool = False) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


@dataclass(frozen=True)
class _Latest:
    step: int
    loss: float
    tokens_per_s: float
    comm_share: float
    wait_share: float
    learning_rate: float


class Progress:
    """Shows a run: a live bar on a terminal, else one plain line every `every` steps.

    `step` counts finished steps: the first update of a new run has step 1, the last `total_steps`.
    `quiet` leaves important messages and the last line.
    """

    def __init__(
        self, total_steps: int, start_step: int = 0, every: int = 10, quiet: bool = False, terminal: bool | None = None
    ) -> None:
        self.total_steps = total_steps
        self.start_step = start_step
        self.every = every
        self.quiet = quiet
        self._start = time.monotonic()
        self._latest: _Latest | None = None
        self._heldout: float | None = None
        self._shown_step = start_step
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        if (on_terminal() if terminal is None else terminal) and not quiet:
            self._bar = RichProgress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TextColumn("{task.description}"),
                console=console(True), refresh_per_second=4, auto_refresh=False, expand=True,
            )  # fmt: skip
            self._task = self._bar.add_task("starting", total=total_steps, completed=start_step)
            self._bar.start()

    def update(
        self, step: int, loss: float, tokens_per_s: float, comm_share: float, wait_share: float,
        learning_rate: float, heldout: float | None = None,
    ) -> None:  # fmt: skip
        """One finished step; shares are fractions of the step's time."""
        self._latest = _Latest(step, loss, tokens_per_s, comm_share, wait_share, learning_rate)
        self._heldout = self._heldout if heldout is None else heldout
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self._bar_text(self._latest), refresh=True)
        elif not self.quiet and (step % self.every == 0 or heldout is not None or step == self.total_steps):
            self._show_line(self._latest, heldout)

    def message(self, text: str, important: bool = False) -> None:
        """A line between the others; `quiet` shows only important ones."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        elif important or not self.quiet:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the bar and says where the run stands, unless the last line already did."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._latest is not None and self._latest.step != self._shown_step:
            self._show_line(self._latest, None)  # the held-out loss on the bar may be of an earlier step

    def _show_line(self, latest: _Latest, heldout: float | None) -> None:
        width = len(str(self.total_steps))
        line = f"step {latest.step:>{width}}/{self.total_steps}  loss {latest.loss:.4f}"
        if heldout is not None:
            line += f"  held-out {heldout:.4f}"
        line += f"  lr {latest.learning_rate:.2e}  {latest.tokens_per_s:,.0f} tokens/s"
        line += f"  comm {latest.comm_share:.0%}  wait {latest.wait_share:.0%}"
        remaining = self._remaining_s(latest)
        print(line + (f"  left {duration(remaining)}" if remaining >= 1 else ""), flush=True)
        self._shown_step = latest.step

    def _bar_text(self, latest: _Latest) -> str:
        heldout = f" · held-out {self._heldout:.3f}" if self._heldout is not None else ""
        return (
            f"loss {latest.loss:.3f}{heldout} · left {duration(self._remaining_s(latest))}"
            f" · {latest.tokens_per_s:,.0f} tokens/s · comm {latest.comm_share:.0%} · wait {latest.wait_share:.0%}"
        )

    def _remaining_s(self, latest: _Latest) -> float:
        done = latest.step - self.start_step
        return (time.monotonic() - self._start) / done * (self.total_steps - latest.step) if done > 0 else 0.0


def duration(seconds: float) -> str:
    """3725 -> "1:02:05", 65 -> "1:05"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
