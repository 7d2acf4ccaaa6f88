"""Pictures of figures."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlm_mpi.errors import MlmError

_NUMBERED = 30  # labels: with more of them numbers would not be read
_NAMED = 100


def confusion(path: Path, table: Sequence[Sequence[int]], labels: Sequence[str]) -> None:
    """Which labels (rows) are taken for which (columns), as a PNG: shares of a row, and the texts in numbers.

    Shapes: (L, L). Raises MlmError where it cannot be written.
    """
    counts = np.array(table)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(16.0, 3.0 + 0.4 * len(labels))
    figure = Figure(figsize=(size, size), dpi=120, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(labels) <= _NUMBERED:
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.5 else "#303030"
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=7, color=color)
    if len(labels) <= _NAMED:
        names = [label if len(label) <= 20 else f"{label[:19]}…" for label in labels]
        axes.set_xticks(range(len(labels)), names, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(len(labels)), names, fontsize=8, parse_math=False)
    axes.set_xlabel("label that was found")
    axes.set_ylabel("label of the text")
    right, total = int(np.trace(counts)), int(counts.sum())
    axes.set_title(f"{right:,} of {total:,} right ({right / max(1, total):.1%})", fontsize="medium", loc="left")
    try:
        with path.open("wb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a letter that the font lacks
            canvas.print_png(file)
    except OSError as error:
        raise MlmError(f"cannot write {path}: {error.strerror}: make room or give another --confusion") from None
