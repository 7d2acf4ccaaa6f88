"""The global gradient norm, the same bits on any number of ranks, and which parameter is not finite."""

import itertools
import math
from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import module_of, to_host
from mlm_mpi.backend.registry import served
from mlm_mpi.params.store import FlatStore

BLOCK_ELEMENTS = 65_536


@served
def squares(x: Any, block: int) -> Any:
    """Sum of squares of each block of x, float64. Shapes: (n,) -> (⌈n / block⌉,)."""
    wide = (x[start : start + block].astype("f8") for start in range(0, x.size, block))
    return np.array([float(part @ part) for part in wide])


def norm(store: FlatStore, gradient: Any) -> tuple[float, str | None]:
    """(‖gradient‖₂, name of the first parameter that is not finite or None).

    float64 partial sums per fixed block of each parameter, combined in (name, block) order.
    """
    spans = sorted(store.spans, key=lambda span: span.parameter.name)
    partials = [squares(gradient[span.start : span.stop], BLOCK_ELEMENTS) for span in spans]
    joined = iter(to_host(module_of(partials[0]).concatenate(partials)).tolist())  # a GPU is awaited once
    total, broken = 0.0, None
    for span, some in zip(spans, partials, strict=True):
        for partial in itertools.islice(joined, some.size):
            if broken is None and not math.isfinite(partial):
                broken = span.parameter.name
            total += partial
    return math.sqrt(total), broken


def clip_factor(limit: float, value: float) -> float:
    """What the gradient is multiplied by so that its norm is at most `limit` (0: no limit).

    Source: Pascanu, Mikolov, Bengio, arXiv:1211.5063.
    """
    return limit / value if limit and value > limit else 1.0
