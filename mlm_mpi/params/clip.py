"""The global gradient norm, the same bits on any mesh, and which parameter is not finite."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mlm_mpi.backend.arrays import module_of, to_host
from mlm_mpi.backend.registry import served
from mlm_mpi.order import joined
from mlm_mpi.params.layout import Grid
from mlm_mpi.params.store import FlatStore, Span

BLOCK_ELEMENTS = 65_536
LANES = 16  # of kernels/cpu/common.h


@served
def squares(x: Any, block: int) -> Any:
    """Sum of squares, float64, of each `block` elements of x in the order of its rows: LANES partial sums and a tree.

    Shapes: (n,), or (rows, columns) whose rows are contiguous -> (⌈elements / block⌉,).
    """
    xp, flat = module_of(x), x.reshape(-1)
    out = xp.empty(-(-flat.size // block))
    for number in range(out.size):
        part = flat[number * block : (number + 1) * block].astype("f8")
        lanes = xp.zeros(-(-part.size // LANES) * LANES)
        xp.multiply(part, part, out=lanes[: part.size])
        lanes = lanes.reshape(-1, LANES).sum(axis=0)
        while lanes.size > 1:
            lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
        out[number] = lanes[0]
    return out


def norms_of(stack: Any) -> list[float]:
    """‖x‖₂ of each x of a contiguous stack (n, …), float64, in the order of `squares`. A GPU is awaited once.

    Blocks of BLOCK_ELEMENTS one after another where they fill an x, else one block, so that none lies in two.
    """
    size = stack[0].size
    block = size if size % BLOCK_ELEMENTS else BLOCK_ELEMENTS
    sums, each = to_host(squares(stack.reshape(-1), block)).tolist(), size // block
    return [math.sqrt(_in_order(sums[n * each : (n + 1) * each])) for n in range(len(stack))]


class Held(NamedTuple):
    """What a rank holds of a share of a parameter: whole blocks, or all to the end of it."""

    name: str
    share: int
    values: Any  # (rows, columns), a view whose rows are contiguous

    @property
    def blocks(self) -> int:
        return -(-int(self.values.size) // BLOCK_ELEMENTS)


def shares_in(store: FlatStore, gradient: Any, start: int, stop: int) -> list[Held]:
    """Shares in [start, stop) of a flat buffer, whose ends lie between rows, in their order."""
    found = []
    for span, view in zip(store.spans, store.views(gradient), strict=True):
        if span.start == span.stop:
            continue
        row = (span.stop - span.start) // span.shape[0]
        first, last = (min(max((edge - span.start) // row, 0), span.shape[0]) for edge in (start, stop))
        if first < last:
            held = span.parameter.layout.split_rows(view, store.grid, first, last)
            found += [Held(span.parameter.name, number, values) for number, values in held]
    return found


def whole_block_rows(span: Span, grid: Grid) -> list[int]:
    """Rows of a parameter at which a rank's range may begin: each share has whole blocks before them, or all."""
    rows, layout = span.shape[0], span.parameter.layout
    row, each, columns = (span.stop - span.start) // max(1, rows), rows, 1
    if "tp" in layout.axes:
        shares = layout.shares // grid.size("tp")
        each, columns = (rows // shares, 1) if layout.axes[0] == "tp" else (rows, shares)
    return [number for number in range(rows) if number % each * (row // columns) % BLOCK_ELEMENTS == 0]


@dataclass(frozen=True)
class Owners:
    """Ranks that have the sum of their own range of a gradient only: [start, stop) of each, which is mine, and what
    brings together an array of which each holds so many numbers."""

    every: Sequence[tuple[int, int]]
    rank: int
    gather: Callable[[np.ndarray, Sequence[int]], None]


def share_norms(store: FlatStore, gradient: Any, owners: Owners | None = None) -> dict[str, list[float]]:
    """name -> Σ of squares of each share that this rank holds, the shares in their order. A GPU is awaited once.

    Inside a share float64 sums of BLOCK_ELEMENTS elements, in the share's own order, are added one after another: they
    are those of a rank that holds no more than this share. Collective over `owners`, who have whole blocks each.
    """
    every, me = ([(0, store.size)], 0) if owners is None else (owners.every, owners.rank)
    held = [shares_in(store, gradient, *one) for one in every]
    counts = [sum(one.blocks for one in some) for some in held]
    numbers = np.zeros(sum(counts))
    if mine := [squares(one.values, BLOCK_ELEMENTS) for one in held[me]]:
        numbers[sum(counts[:me]) : sum(counts[: me + 1])] = to_host(module_of(mine[0]).concatenate(mine))
    if owners is not None:
        owners.gather(numbers, counts)
    rest, sums = iter(numbers.tolist()), dict[str, dict[int, float]]()
    for one in itertools.chain.from_iterable(held):
        shares = sums.setdefault(one.name, {})
        for _ in range(one.blocks):
            shares[one.share] = shares.get(one.share, 0.0) + next(rest)
    return {name: [shares[number] for number in sorted(shares)] for name, shares in sums.items()}


Across = Callable[[dict[str, float]], dict[str, float]]  # sums by name over what I hold -> over all of the model


def _alone(mine: dict[str, float]) -> dict[str, float]:
    return mine


def norm(
    store: FlatStore, gradient: Any, across: Across = _alone, owners: Owners | None = None
) -> tuple[float, str | None]:  # fmt: skip
    """(‖gradient‖₂, name of the first parameter that is not finite or None). Collective over pp and tp, by `across`,
    and over `owners`.

    float64, in (name, share, block) order: blocks of a share one after another, shares in a tree, names in order. A
    rank of a tensor-parallel mesh joins the shares it holds; one number a parameter is all it has to tell the others.
    """
    held = share_norms(store, gradient, owners)
    mine = {name: joined(shares) for name, shares in held.items() if name not in store.borrowed}
    sums = dict(sorted(across(mine).items()))
    broken = next((name for name, value in sums.items() if not math.isfinite(value)), None)
    return math.sqrt(_in_order(list(sums.values()))), broken


def _in_order(numbers: list[float]) -> float:
    total = 0.0  # not sum(), which adds floats in another way since Python 3.12
    for number in numbers:
        total += number
    return total


def clip_factor(limit: float, value: float) -> float:
    """What the gradient is multiplied by so that its norm is at most `limit` (0: no limit).

    Source: Pascanu, Mikolov, Bengio, arXiv:1211.5063.
    """
    return limit / value if limit and value > limit else 1.0
