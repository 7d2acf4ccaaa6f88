"""What a person sees of a run: a table at the start, a bar or plain lines while it runs."""

import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlm_mpi.monitor.live import Live, Plain, live, on_terminal
from mlm_mpi.monitor.metrics import read_metrics


def console(terminal: bool | None = None) -> Console:
    """A rich console on stdout; without a terminal it writes plain text, never ANSI."""
    fancy = on_terminal() if terminal is None else terminal
    told = os.environ.get("COLUMNS", "")
    width = max(40, int(told)) if told.isdecimal() else None if fancy else 120
    return Console(
        file=sys.stdout, force_terminal=fancy, width=width, no_color=None if fancy else True, highlight=False,
        legacy_windows=False, color_system="standard" if fancy else None,
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


_MOST = 1000  # steps of a mean


@dataclass(frozen=True)
class Done:
    """One finished step. `step` counts from 1; times in seconds: of the step, of its waits for MPI and for data."""

    step: int
    loss: float
    tokens: int
    step_s: float
    comm_s: float
    wait_s: float
    learning_rate: float


def done_before(path: Path, first: int, most: int) -> list[Done]:
    """The last steps in a run's metrics.jsonl, at most so many, of those after step `first`."""
    lines = deque((line for line in read_metrics(path) if line["step"] > first), maxlen=most)
    return [
        Done(
            step=line["step"],
            loss=line["loss"],
            tokens=round(line["tokens_per_s"] * line["step_s"]),
            step_s=line["step_s"],
            comm_s=line["comm_s"],
            wait_s=line["wait_s"],
            learning_rate=line["learning_rate"],
        )
        for line in lines
    ]


class Reporter(Protocol):
    """What the training loop tells about itself; `Progress` shows it, `Silent` does not."""

    def update(self, done: Done, heldout: float | None = None) -> None: ...

    def message(self, text: str, important: bool = False) -> None: ...

    def close(self) -> None: ...


class Silent:
    """The reporter of every rank but 0: says nothing."""

    def update(self, done: Done, heldout: float | None = None) -> None:
        """Nothing."""

    def message(self, text: str, important: bool = False) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Progress:
    """Shows a run: lines that stay, and on a terminal a bar below them.

    A line comes with every held-out loss and with the last step; without a terminal also every `every` steps. Loss and
    speed are the means of the last `every` steps, whatever is shown.
    `quiet` leaves important messages and the last line. `before`: the last steps of this start, which another rank has
    shown. `unit`: what the targets of a step are.
    """

    def __init__(
        self, total_steps: int, start_step: int = 0, every: int = 10, quiet: bool = False,
        terminal: bool | None = None, before: Sequence[Done] = (), unit: str = "tokens",
    ) -> None:  # fmt: skip
        self.total_steps, self.start_step, self.every, self.quiet = total_steps, start_step, every, quiet
        self.unit, self._start = unit, time.monotonic()
        self._lately: deque[Done] = deque(before, maxlen=min(every, _MOST))
        self._heldout: float | None = None
        self._shown = start_step  # by the last line
        self._live: Live = Plain() if quiet else live("step", terminal)
        self._live.update(start_step, total_steps, self._bar_text())

    def update(self, done: Done, heldout: float | None = None) -> None:
        """One finished step."""
        self._lately.append(done)
        self._heldout = self._heldout if heldout is None else heldout
        due = done.step % self.every == 0 and not self._live.drawn
        if not self.quiet and (due or heldout is not None or done.step == self.total_steps):
            self._show_line(heldout)
        self._live.update(done.step, self.total_steps, self._bar_text())

    def message(self, text: str, important: bool = False) -> None:
        """A line between the others; `quiet` shows only important ones."""
        if important or not self.quiet:
            self._live.line(text)

    def close(self) -> None:
        """Ends the bar and says where the run stands, unless the last line already did."""
        self._live.close()
        if self._lately and self._lately[-1].step != self._shown:
            self._show_line(None)  # the held-out loss on the bar may be of an earlier step

    def _show_line(self, heldout: float | None) -> None:
        last, mean = self._lately[-1], _Mean.of(self._lately)
        width = len(str(self.total_steps))
        line = f"step {last.step:>{width}}/{self.total_steps}  loss {mean.loss:.4f}"
        if heldout is not None:
            line += f"  held-out {heldout:.4f}"
        line += f"  lr {last.learning_rate:.2e}  {mean.tokens_per_s:,.0f} {self.unit}/s"
        line += f"  comm {mean.comm:.0%}  wait {mean.wait:.0%}"
        remaining = self._remaining_s(last.step)
        self._live.line(line + (f"  left {duration(remaining)}" if remaining >= 1 else ""))
        self._shown = last.step

    def _bar_text(self) -> str:
        if not self._lately:
            return f"{self.start_step}/{self.total_steps} · the first step is under way"
        step, mean = self._lately[-1].step, _Mean.of(self._lately)
        heldout = f" · held-out {self._heldout:.3f}" if self._heldout is not None else ""
        remaining = self._remaining_s(step)
        left = f" · left {duration(remaining)}" if remaining else ""  # unknown before the first step shown here
        return (
            f"{step}/{self.total_steps} · loss {mean.loss:.3f}{heldout}{left}"
            f" · {mean.tokens_per_s:,.0f} {self.unit}/s · comm {mean.comm:.0%} · wait {mean.wait:.0%}"
        )

    def _remaining_s(self, step: int) -> float:
        done = step - self.start_step
        return (time.monotonic() - self._start) / done * (self.total_steps - step) if done > 0 else 0.0


@dataclass(frozen=True)
class _Mean:
    """Of some steps; shares are fractions of their time."""

    loss: float
    tokens_per_s: float
    comm: float
    wait: float

    @classmethod
    def of(cls, steps: Sequence[Done]) -> "_Mean":
        seconds = sum(done.step_s for done in steps)
        return cls(
            sum(done.loss for done in steps) / len(steps), sum(done.tokens for done in steps) / seconds,
            sum(done.comm_s for done in steps) / seconds, sum(done.wait_s for done in steps) / seconds,
        )  # fmt: skip


def duration(seconds: float) -> str:
    """3725 -> "1:02:05", 65 -> "1:05"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
