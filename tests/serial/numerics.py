"""How the tests judge mathematics: central differences in float64, poisoned buffers, strided copies."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlm_mpi.comm import tree


def directional(f: Callable[[], float], x: np.ndarray, gradient: np.ndarray, seed: int = 0, tol: float = 1e-7) -> None:
    """Asserts (f(x + εd) − f(x − εd)) / 2ε = Σ gradient·d for one random unit direction d.

    `f` must read `x`, which is changed in place and put back. One direction over all elements sees every
    wrong element with probability one.
    """
    assert np.isfinite(gradient).all(), "a gradient element was not written"
    assert gradient.shape == x.shape
    d = np.random.default_rng(seed).standard_normal(x.shape)
    d /= np.linalg.norm(d)
    kept, epsilon = x.copy(), 1e-5
    x[...] = kept + epsilon * d
    above = f()
    x[...] = kept - epsilon * d
    below = f()
    x[...] = kept
    measured, claimed = (above - below) / (2 * epsilon), float((gradient * d).sum())
    scale = max(1.0, abs(measured), float(np.linalg.norm(gradient)))
    assert abs(measured - claimed) <= tol * scale, f"measured {measured!r}, claimed {claimed!r}"


def poisoned(*shape: int, dtype: Any = "f8") -> np.ndarray:
    """An output buffer full of NaN: what is not written shows."""
    return np.full(shape, np.nan, dtype)


def strided(x: np.ndarray) -> np.ndarray:
    """The same values in memory that is contiguous along no dim."""
    wide = np.full(tuple(2 * n for n in x.shape), np.nan if x.dtype.kind == "f" else 1, x.dtype)
    view = wide[tuple(slice(0, 2 * n, 2) for n in x.shape)]
    view[...] = x
    return view


def in_a_tree(parts: Sequence[Any]) -> Any:
    """The sum of parts in the order of `comm/tree.py`."""
    if len(parts) == 1:
        return parts[0]
    centre = tree.middle(0, len(parts))
    return in_a_tree(parts[:centre]) + in_a_tree(parts[centre:])


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal shape, dtype and bytes (NaN equals itself, 0 differs from −0)."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
