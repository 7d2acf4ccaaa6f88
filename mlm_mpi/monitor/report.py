"""Pictures of a run, drawn from its metrics file."""

import itertools
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlm_mpi.errors import MlmError
from mlm_mpi.monitor.metrics import read_metrics

_POINTS = 1 << 22  # a picture shows no more


def loss_curve(metrics_path: str | Path, png_path: str | Path) -> None:
    """Draws training and held-out loss against steps as a PNG. Raises MlmError where there is nothing to draw."""
    training, heldout = _series(metrics_path, "loss"), _series(metrics_path, "heldout_loss")
    if not training[0] and not heldout[0]:
        raise MlmError(f"{metrics_path} holds no losses yet: train at least one step")
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # the object API: no display, no state shared with the caller
    axes = figure.add_subplot()
    axes.plot(*training, color="tab:blue", linewidth=1, label="training")
    if heldout[0]:
        axes.plot(*heldout, color="tab:orange", marker="o", linewidth=1.5, label="held-out")
        axes.annotate(
            f"{heldout[1][-1]:.3f}", (heldout[0][-1], heldout[1][-1]), xytext=(-4, 8), textcoords="offset points",
            ha="right", color="tab:orange",
        )  # fmt: skip
    axes.set_xlabel("step (optimiser updates)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        with Path(png_path).open("wb") as file:
            canvas.print_png(file)
    except OSError as error:
        raise MlmError(f"cannot write {png_path}: {error.strerror}: make room or give another folder") from None


def _series(metrics_path: str | Path, key: str) -> tuple[list[float], list[float]]:
    losses = (record for record in read_metrics(metrics_path) if is_loss(record.get(key)))
    points = [(record["step"], record[key]) for record in itertools.islice(losses, _POINTS)]
    return [step for step, _ in points], [value for _, value in points]


def is_loss(value: object) -> bool:
    """Whether it can be drawn: a number that overflows no axis."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
