"""Pictures of a run, drawn from its metrics file."""

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mlm_mpi.errors import MlmError
from mlm_mpi.monitor.metrics import read_metrics

_POINTS = 1 << 22  # a picture shows no more
_BINS = 1000  # of a curve with more points than a picture has columns
_LEARNED, _HELDOUT, _RATE = "#1f5fa8", "#d95f02", "#5f6b75"

Series = tuple[np.ndarray, np.ndarray]  # steps and values, (n,) each, one value a step


@dataclass(frozen=True)
class _Run:
    """What a metrics file holds to be drawn; `step_tokens`: tokens a step, 0 where it does not say; `even`: always."""

    loss: Series
    heldout: Series
    rate: Series
    step_tokens: float
    even: bool


def loss_curve(metrics_path: str | Path, png_path: str | Path, title: str = "Loss") -> None:
    """Draws losses and learning rate against steps and tokens as a PNG.

    Raises MlmError where there is nothing to draw, or no room for it.
    """
    run = _read(Path(metrics_path))
    if not len(run.loss[0]) and not len(run.heldout[0]):
        raise MlmError(f"{metrics_path} holds no losses yet: train at least one step")
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # the object API: no display, no state shared with the caller
    ratios = (5, 1) if len(run.rate[0]) else (1,)
    panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    last = max(int(steps[-1]) for steps, _ in (run.loss, run.heldout) if len(steps))
    _draw_losses(panels[0], run)
    if len(panels) > 1:
        _draw_rate(panels[1], run.rate)
    panels[-1].set_xlabel("step")
    panels[-1].set_xlim(0, last + max(1, last // 100))
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _name(panels[0], run, title, last)
    try:
        with Path(png_path).open("wb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a letter that the font lacks
            canvas.print_png(file)
    except OSError as error:
        raise MlmError(f"cannot write {png_path}: {error.strerror}: make room or give another folder") from None


def _draw_losses(axes: Axes, run: _Run) -> None:
    steps, losses = run.loss
    low, high = _span(losses, run.heldout[1])
    if len(steps):
        smooth, width = _smoothed(np.minimum(losses, high))
        raw = f"training, last {losses[-1]:.3f}"
        axes.plot(*_outlined(run.loss), color=_LEARNED, alpha=0.3, linewidth=0.7, label=raw, **_marker(steps))
        if width > 1:
            axes.plot(
                *_thinned((steps, smooth)), color=_LEARNED, linewidth=1.6,
                label=f"training, mean of {width:,} steps",
            )  # fmt: skip
    if len(run.heldout[0]):
        axes.plot(
            *_thinned(run.heldout), color=_HELDOUT, linewidth=1.2, marker="o", markersize=4, markerfacecolor="white",
            markevery=max(1, len(run.heldout[0]) // 40), label=f"held-out, last {run.heldout[1][-1]:.3f}",
        )  # fmt: skip
    axes.set_ylim(low, high)
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False, fontsize="small")


def _draw_rate(axes: Axes, rate: Series) -> None:
    axes.plot(*_thinned(rate), color=_RATE, linewidth=1.2, **_marker(rate[0]))
    axes.set_ylim(0, 1.1 * rate[1].max() or 1)
    axes.ticklabel_format(axis="y", scilimits=(0, 0), useMathText=True)
    axes.yaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
    axes.set_ylabel("learning rate", fontsize="small")


def _name(axes: Axes, run: _Run, title: str, last: int) -> None:
    """The title, and a second axis where it is known how many tokens every step reads."""
    for panel in axes.figure.axes:
        panel.grid(color="#e6e6e6", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize="small")
    tokens = run.step_tokens
    if tokens and run.even:
        there, back = partial(np.multiply, tokens), partial(np.multiply, 1 / tokens)
        top = axes.secondary_xaxis("top", functions=(there, back))
        top.set_xlabel("tokens seen", fontsize="small")
        top.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_words(value)))
        top.tick_params(labelsize="small")
        top.spines["top"].set_color("#b0b0b0")
    if tokens:
        title = f"{title}, {in_words(last * tokens)} tokens"
    axes.set_title(title if len(title) <= 90 else f"…{title[-89:]}", fontsize="medium", loc="left", parse_math=False)


def _smoothed(values: np.ndarray) -> tuple[np.ndarray, int]:
    """(mean of up to `width` values around each one, width): 4 % of them, at most 1,001, fewer at the ends.

    Near the start, where a loss falls fast, as many before as after. Shapes: (n,) -> (n,).
    """
    count = len(values)
    half = min(count // 50, 500)
    place = np.arange(count)
    back = np.minimum(half, place)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    start = place - back
    stop = np.minimum(count, place + np.where(place < half, back, half) + 1)
    return (sums[stop] - sums[start]) / (stop - start), 2 * half + 1


def _outlined(series: Series) -> Series:
    """The smallest and the largest value of each bin: what a line through all points covers."""
    steps, values = series
    if len(steps) <= 2 * _BINS:
        return series
    edges = np.linspace(0, len(steps), _BINS + 1).astype(int)[:-1]
    ends = np.stack([np.minimum.reduceat(values, edges), np.maximum.reduceat(values, edges)], 1)
    return np.repeat(steps[edges], 2), ends.ravel()


def _thinned(series: Series) -> Series:
    """About as many points as a picture has columns, first and last among them."""
    steps, values = series
    if len(steps) <= 2 * _BINS:
        return series
    kept = np.linspace(0, len(steps) - 1, 2 * _BINS).astype(int)
    return steps[kept], values[kept]


def _span(losses: np.ndarray, heldout: np.ndarray) -> tuple[float, float]:
    """From the lowest loss to one that only a step in 200 exceeds: a spike, or the very beginning, is cut off."""
    top = max(float(np.percentile(values, 99.5)) for values in (losses, heldout) if len(values))
    low = min(float(values.min()) for values in (losses, heldout) if len(values))
    margin = 0.04 * (top - low) or max(0.5, abs(low) / 10)
    return low - margin, top + margin


def _marker(steps: np.ndarray) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4} if len(steps) == 1 else {}  # a line needs two points


def in_words(count: float) -> str:
    """614400 -> "614 k", 1.2e9 -> "1.2 B"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def _read(path: Path) -> _Run:
    """One pass over the file; the last value of a step counts."""
    found: dict[str, dict[int, float]] = {"loss": {}, "heldout_loss": {}, "learning_rate": {}}
    step_tokens, even = 0.0, True
    for record in read_metrics(path):
        step = record["step"]
        for name, values in found.items():
            value: Any = record.get(name)
            if is_loss(value) and len(values) < _POINTS:
                values[step] = float(value)
        tokens: Any = record.get("tokens")
        if is_loss(tokens) and tokens >= step > 0:
            even, step_tokens = step_tokens in (0.0, tokens / step) and even, tokens / step
    loss, heldout, rate = map(_series, found.values())
    return _Run(loss, heldout, rate, step_tokens, even)


def _series(values: dict[int, float]) -> Series:
    steps = np.array(sorted(values), np.float64)
    return steps, np.array([values[int(step)] for step in steps], np.float64)


def is_loss(value: Any) -> bool:
    """Whether it can be drawn: a number that overflows no axis."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
