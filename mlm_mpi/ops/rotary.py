"""Queries and keys of attention on their way to it: normalised, if asked, and turned by their positions.

In a pair (i, i + R/2) of the first R numbers of a head, the two are turned by the angle p·base^(−2i/R) at position p;
the other numbers stay. Queries and keys of a group lie side by side as *units*: g queries, then the key they share.
Sources: Su et al., "RoFormer", arXiv:2104.09864, with the halves of Llama; Henry et al., "Query-Key Normalization for
Transformers", arXiv:2010.04245, here with the root mean square; Peng et al., "YaRN", arXiv:2309.00071.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlm_mpi import exact
from mlm_mpi.backend.arrays import deposit, module_of, wide
from mlm_mpi.backend.registry import served
from mlm_mpi.order import joined

KINDS = ("none", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Scaling:
    """How positions beyond the context that a model was first trained with are squeezed into it.

    "linear": positions are divided by `factor` (Chen et al., arXiv:2306.15595). "llama3": wavelengths over
    original / `low` are stretched by `factor`, those under original / `high` stay, in between it is a ramp (Llama 3.1).
    "yarn": the same by turns in the original context, from `high` (beta_fast) to `low` (beta_slow), and cos and sin are
    multiplied by `attention`, or where that is 0 by 0.1·ln(factor) + 1. Both as Hugging Face's transformers computes.
    """

    kind: str = "none"
    factor: float = 1.0
    low: float = 1.0
    high: float = 32.0  # Llama 3.1 has 4
    original: int = 8192  # positions
    attention: float = 0.0


def tables(positions: Any, width: int, base: float, scaling: Scaling | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin) of the angles at these positions, float32, whose bits depend on no library (`exact`).

    `width`: R, even; 0 turns nothing. Shapes: positions (T,), not negative -> (T, R/2), (T, R/2).
    Raises ValueError for a kind that is none of KINDS and for an odd width.
    """
    scaling = scaling or Scaling()
    if width % 2:
        raise ValueError(f"a rotation of {width} numbers, which are no pairs")
    if scaling.kind not in KINDS:
        raise ValueError(f"a scaling {scaling.kind!r}: choose among {', '.join(KINDS)}")
    frequencies = _SCALED[scaling.kind](_frequencies(width, base), width, base, scaling)
    turns = np.asarray(positions, np.float64)[:, None] * (frequencies / _TURN)
    factor = _attention(scaling)
    cos, sin = (factor * part for part in exact.cos_sin_of_turns(turns))
    return cos.astype(np.float32), sin.astype(np.float32)


_TURN = 6.283185307179586  # 2π


def _log(x: float) -> float:
    return float(exact.log(np.array([x]))[0])


def _frequencies(width: int, base: float) -> np.ndarray:
    # base^(−2i/R), angles per position
    return exact.exp(np.arange(0, width, 2) / max(1, width) * -_log(base))


def _unscaled(frequencies: np.ndarray, width: int, base: float, scaling: Scaling) -> np.ndarray:
    return frequencies


def _linear(frequencies: np.ndarray, width: int, base: float, scaling: Scaling) -> np.ndarray:
    return frequencies / scaling.factor


def _llama3(frequencies: np.ndarray, width: int, base: float, scaling: Scaling) -> np.ndarray:
    turns = frequencies * (scaling.original / _TURN)  # in the original context
    kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return (1.0 - kept) * (frequencies / scaling.factor) + kept * frequencies


def _yarn(frequencies: np.ndarray, width: int, base: float, scaling: Scaling) -> np.ndarray:
    def pair(turns: float) -> float:  # that makes so many turns in the original context
        return width * _log(scaling.original / (turns * _TURN)) / (2.0 * _log(base))

    first, last = max(math.floor(pair(scaling.high)), 0), min(math.ceil(pair(scaling.low)), width - 1)
    pairs = np.arange(width // 2)
    ramp = np.clip((pairs - first) / (last - first if last != first else 0.001), 0.0, 1.0)
    return ramp * (frequencies / scaling.factor) + (1.0 - ramp) * frequencies


_SCALED = {"none": _unscaled, "linear": _linear, "llama3": _llama3, "yarn": _yarn}


def _attention(scaling: Scaling) -> float:
    if scaling.kind != "yarn":
        return 1.0
    return scaling.attention or (0.1 * _log(scaling.factor) + 1.0 if scaling.factor > 1.0 else 1.0)


def _turned(x: Any, cos: Any, sin: Any) -> None:
    # in place; x (B, T, G, U, D), tables (T, R/2)
    half = cos.shape[1]
    cos, sin = cos[:, None, None], sin[:, None, None]
    a, b = x[..., :half], x[..., half : 2 * half]
    first = a * cos - b * sin
    b[...] = b * cos + a * sin
    a[...] = first


def _copied(x: Any) -> Any:
    # dense, at least float32
    copy = module_of(x).empty(x.shape, wide(x[:0]).dtype)
    copy[...] = x
    return copy


def _of_units(gain: Any, units: int) -> Any:
    # (U, D): the queries' for all units but the last, the key's
    return module_of(gain).concatenate([gain[:1]] * (units - 1) + [gain[1:]])


@served
def forward(x: Any, cos: Any, sin: Any, gain: Any = None, epsilon: float = 0.0) -> tuple[Any, Any]:
    """(y, inverse): with `gain`, x / sqrt(mean(x²) + ε) · gain, [0] for queries, [1] for keys; then turned.

    Shapes: x (B, T, G, U, D), a view; cos, sin (T, R/2) of `tables`; gain (2, D) or None -> y (B, T, G, U, D), dense;
    inverse (B, T, G, U): 1 / sqrt(mean(x²) + ε), None without gain. y has the dtype of x; `inverse` is float32 where
    that is bfloat16.
    """
    xp, dtype, inverse = module_of(x), x.dtype, None
    y = _copied(x)
    if gain is not None:
        inverse = 1.0 / xp.sqrt(xp.einsum("btgud,btgud->btgu", y, y) / x.shape[4] + epsilon)
        inverse = inverse.astype(y.dtype, copy=False)
        y *= inverse[..., None]
        y *= _of_units(wide(gain), x.shape[3])
    _turned(y, cos, sin)
    return y.astype(dtype, copy=False), inverse


@served
def backward(
    dy: Any, x: Any, cos: Any, sin: Any, gain: Any = None, inverse: Any = None, dgain: Any = None,
    accumulate: bool = False, pieces: int = 1, shares: int = 1, out: Any = None,
) -> Any:  # fmt: skip
    """dx, into `out` (a view, may be dy); writes or adds dgain. Without gain, x is not needed (None).

    dgain (2, D), for every of `shares` equal ranges of groups and every of `pieces` equal ranges of the B·T rows: one
    sum for the queries and one for the keys over rows, groups and units in ascending order. Pieces are joined by the
    tree, then shares are: whoever holds some of the groups has their shares' sums to the last bit.
    Shapes: dy, x and dx (B, T, G, U, D), views; the rest as in `forward`. ValueError where ranges are not equal.
    """
    g = _copied(dy)
    _turned(g, cos, -sin)
    if gain is not None:
        g = _normalised_backward(g, wide(x), wide(gain), inverse, dgain, accumulate, pieces, shares)
    if out is None:
        return g.astype(dy.dtype, copy=False)
    out[...] = g
    return out


def _normalised_backward(
    g: Any, x: Any, gain: Any, inverse: Any, dgain: Any, accumulate: bool, pieces: int, shares: int
) -> Any:
    batch, length, groups, units, width = g.shape
    if batch * length % pieces or groups % shares:
        raise ValueError(f"{batch * length} rows in {pieces} pieces, {groups} groups in {shares} shares")
    normal = x * inverse[..., None]
    terms = (g * normal).reshape(pieces, -1, shares, groups // shares, units, width)
    queries, keys = terms[..., :-1, :].sum(axis=(1, 3, 4)), terms[..., -1, :].sum(axis=(1, 3))
    whole = module_of(g).stack([queries, keys], axis=2)  # (pieces, shares, 2, D)
    deposit(joined(joined(whole)), dgain, accumulate)
    g *= _of_units(gain, units)
    normal *= (module_of(g).einsum("btgud,btgud->btgu", g, normal) / width)[..., None]
    g -= normal
    g *= inverse[..., None]
    return g
