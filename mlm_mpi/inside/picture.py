"""An explanation as one picture: what the answer rests on, what each layer would say, the heads of a layer."""

import io
import math
import warnings

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure

from mlm_mpi.inside import colours
from mlm_mpi.inside.explanation import Explanation
from mlm_mpi.layers.base import Map

_NAMED = 64  # tokens: with more of them names would not be read
_WRITTEN = 24  # places of the lens whose words are written into it
_HEADS, _IN_ROW = 16, 4


def picture(told: Explanation, layer: int) -> bytes:
    """A PNG; `layer` (from 0): whose heads it shows."""
    shown = [*told.maps.values()][layer] if told.maps else Map(np.zeros((0, 1, 1)))
    maps = shown.probabilities[:_HEADS]
    rows = math.ceil(len(maps) / _IN_ROW)
    width = min(18.0, max(9.0, 2.0 + 0.42 * max(len(told.tokens), len(told.source))))
    side = 0.24 * width + 0.3
    heights = [2.4, 1.0 + 0.3 * len(told.lens), *([side] * rows)]
    figure = Figure(figsize=(width, sum(heights) + 1.2), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 + rows, _IN_ROW, height_ratios=heights)
    _attribution(figure.add_subplot(grid[0, :]), told)
    _lens(figure, figure.add_subplot(grid[1, :]), told)
    panels = [figure.add_subplot(grid[2 + head // _IN_ROW, head % _IN_ROW]) for head in range(len(maps))]
    for head, (axes, p) in enumerate(zip(panels, maps, strict=True), 1):
        drawn = axes.imshow(
            p, cmap=_scale("amount"), norm=PowerNorm(0.5, 0, 1), interpolation="nearest",
            aspect="auto" if told.source else "equal",
        )  # fmt: skip
        axes.set_title(f"{told.layers()[layer]}, head {head}", fontsize="small", loc="left")
        axes.set_xticks([])
        axes.set_yticks([])
        if told.source:
            _two_sides(axes, told, shown)
    if panels:
        figure.colorbar(drawn, ax=panels, label="attention: rows look at columns", shrink=0.8)
    title = f"Inside {told.model}: {told.question}"
    figure.suptitle(title if len(title) <= 110 else title[:109] + "…", fontsize="medium", parse_math=False)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font lacks
        canvas.print_png(out)
    return out.getvalue()


def _scale(kind: str) -> ListedColormap:
    return ListedColormap(colours.scale(kind, "light") / 255.0)


def _named(axes: Axes, names: list[str]) -> None:
    """The names of positions below, where they can be read."""
    if len(names) <= _NAMED:
        axes.set_xticks(range(len(names)), map(_short, names), rotation=90, fontsize=8, parse_math=False)


def _two_sides(axes: Axes, told: Explanation, shown: Map) -> None:
    """Which tokens look, and at which, where they can be read."""
    sides = {"batch": told.tokens, "source": told.source}
    rows, columns = sides[shown.rows], sides[shown.columns]
    if max(len(rows), len(columns)) <= _WRITTEN:
        axes.set_xticks(range(len(columns)), map(_short, columns), rotation=90, fontsize=6, parse_math=False)
        axes.set_yticks(range(len(rows)), map(_short, rows), fontsize=6, parse_math=False)


def _short(token: str) -> str:
    token = "".join(sign if sign.isprintable() else "↵" if sign == "\n" else "·" for sign in token)
    return token if len(token) <= 14 else f"{token[:13]}…"


def _attribution(axes: Axes, told: Explanation) -> None:
    a = told.attribution
    most = max(float(np.abs(a.values).max()), 1e-12)
    shades = _scale("sign")(0.5 + 0.5 * a.values / most)
    axes.bar(range(len(a.values)), a.values, color=shades, edgecolor="#606060", linewidth=0.5)
    axes.axhline(0, color="#606060", linewidth=0.8)
    axes.margins(x=0.01)
    _named(axes, told.explained)
    axes.set_ylabel(f"adds to the {a.score}", fontsize="small")
    said = f"“{_short(a.output)}”, {a.probability:.1%}: {a.value:.3f}, {a.baseline_value:.3f} of {a.baseline}"
    axes.set_title(f"{said}; sum {a.total:.3f}", fontsize="small", loc="left", parse_math=False)


def _lens(figure: Figure, axes: Axes, told: Explanation) -> None:
    best = np.array([[some[0][1] for some in row.top] for row in told.lens])
    drawn = axes.imshow(best, cmap=_scale("amount"), norm=PowerNorm(0.5, 0, 1), aspect="auto", origin="lower",
                        interpolation="nearest")  # fmt: skip
    figure.colorbar(drawn, ax=axes, label="probability")
    axes.set_yticks(range(len(told.lens)), [row.name for row in told.lens], fontsize=8)
    _named(axes, told.places)
    axes.set_title("the likeliest by each layer", fontsize="small", loc="left")
    if len(told.places) <= _WRITTEN:
        for level, row in enumerate(told.lens):
            for place, some in enumerate(row.top):
                ink = "white" if best[level, place] > 0.3 else "black"
                axes.text(place, level, _short(some[0][0])[:9], ha="center", va="center", fontsize=7, color=ink,
                          parse_math=False)  # fmt: skip
