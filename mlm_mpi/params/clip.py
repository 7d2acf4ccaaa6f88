"""The global gradient norm, the same bits on any mesh, and which parameter is not finite."""

import math
from collections.abc import Callable
from typing import Any

from mlm_mpi.backend.arrays import module_of, to_host
from mlm_mpi.backend.registry import served
from mlm_mpi.order import joined
from mlm_mpi.params.store import FlatStore

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


def share_norms(store: FlatStore, gradient: Any) -> dict[str, list[float]]:
    """name -> Σ of squares of each share that this rank holds, the shares in their order. A GPU is awaited once.

    Inside a share float64 sums of BLOCK_ELEMENTS elements, in the share's own order, are added one after another: they
    are those of a rank that holds no more than this share.
    """
    views = zip(store.spans, store.views(gradient), strict=True)
    split = {span.parameter.name: span.parameter.layout.split(view, store.grid) for span, view in views}
    partials = {name: [squares(share, BLOCK_ELEMENTS) for share in shares] for name, shares in split.items()}
    every = [partial for shares in partials.values() for partial in shares]
    numbers = iter(to_host(module_of(every[0]).concatenate(every)).tolist())
    return {
        name: [_in_order([next(numbers) for _ in range(partial.size)]) for partial in shares]
        for name, shares in partials.items()
    }


Across = Callable[[dict[str, float]], dict[str, float]]  # sums by name over what I hold -> over all of the model


def _alone(mine: dict[str, float]) -> dict[str, float]:
    return mine


def norm(store: FlatStore, gradient: Any, across: Across = _alone) -> tuple[float, str | None]:
    """(‖gradient‖₂, name of the first parameter that is not finite or None). Collective over pp and tp, by `across`.

    float64, in (name, share, block) order: blocks of a share one after another, shares in a tree, names in order. A
    rank of a tensor-parallel mesh joins the shares it holds; one number a parameter is all it has to tell the others.
    """
    mine = {name: joined(shares) for name, shares in share_norms(store, gradient).items() if name not in store.borrowed}
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
