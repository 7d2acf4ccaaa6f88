"""Logarithm, exponential, sine, cosine, powers of stated bits, so that no libm, SIMD level or compiler decides them.

Every step is one IEEE 754 operation on float64 (+ − × ÷), rounded once, or one on integers. Such an operation has one
result: Python's floats, NumPy's arrays at any SIMD level, and C without contraction agree. Errors, against exact
values: at most 1.1 units in the last place (tests/serial/test_exact.py).
"""

import math
from typing import Any

import numpy as np

_LN2 = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # ln 2 in two parts: the first times 2¹¹ is exact
_ROOT_HALF = 0x3FE6A09E667F3BCD  # √½ as the bits of a float64
# atanh(s)·2 = 2s + s·Σ 2/(2k+1)·s²ᵏ; |s| < 0.172, and what is left out is less than 2⁻⁶⁰ of it
_ATANH = tuple(2.0 / (2 * k + 1) for k in range(1, 11))
# sin(x·π/4)/x and cos(x·π/4) as series in x² for |x| ≤ 1: ± (π/4)ⁿ/n!, rounded once
_EIGHTH = 0.7853981633974483, 3.061616997868383e-17  # π/4 in two parts
_SINE = (
    -0.08074551218828079, 0.0024903945701927202, -3.657620418217725e-05, 3.1336168903781217e-07, -1.757247673443401e-09,
    6.948453273886629e-12, -2.0410263396641442e-14, 4.628704628834683e-17,
)  # fmt: skip
_EXPONENTIAL = tuple(1.0 / math.factorial(n) for n in range(2, 15))  # exp(r) = 1 + r + r²·Σ rᵏ/(k+2)!, |r| < 0.347
_COSINE = (
    -0.30842513753404244, 0.015854344243815502, -0.00032599188692739, 3.59086044859151e-06, -2.4611369504942e-08,
    1.1501159127974052e-10, -3.8980731712596753e-13, 1.001886461636272e-15,
)  # fmt: skip


def _series(terms: tuple[float, ...], z: Any) -> Any:
    """terms[0] + terms[1]·z + terms[2]·z² + …, a float or a new array."""
    total = z * terms[-1]
    for term in terms[-2:0:-1]:
        total += term
        total *= z
    total += terms[0]
    return total


def _sine(x: Any, z: Any) -> Any:
    # sin(x·π/4) for |x| ≤ 1, z = x²
    total = _series(_SINE, z)
    total *= z
    total += _EIGHTH[1]
    total += _EIGHTH[0]
    total *= x
    return total


def _cosine(z: Any) -> Any:
    # cos(x·π/4) for z = x² ≤ 1
    total = _series(_COSINE, z)
    total *= z
    total += 1.0
    return total


def log(x: np.ndarray) -> np.ndarray:
    """Natural logarithms. Shapes: (n,) float64, positive, normal and finite -> (n,).

    x = 2ᵏ·m with m in [√½, √2) by its bits; ln m = f − (f²/2 − s·(f²/2 + R)) with f = m − 1, s = f/(2 + f).
    Source: fdlibm's e_log.c (Sun Microsystems, 1993), here with the terms of the series itself.
    """
    bits = np.ascontiguousarray(x).view(np.int64)
    exponent = bits - _ROOT_HALF
    exponent >>= 52
    f: Any = (bits - (exponent << 52)).view(np.float64)
    f -= 1.0
    s = f + 2.0
    np.divide(f, s, out=s)
    z = s * s
    total = _series(_ATANH, z)
    total *= z
    half = f * f
    half *= 0.5
    total += half
    total *= s
    k = exponent.astype(np.float64)
    total += k * _LN2[1]
    half -= total
    half -= f
    k *= _LN2[0]
    k -= half
    return k


def exp(x: np.ndarray) -> np.ndarray:
    """Exponentials. Shapes: (n,) float64 in [-708, 709] -> (n,).

    x = k·ln 2 + r with |r| ≤ ½ ln 2, the series of r itself, times 2ᵏ.
    """
    k = np.floor(x * 1.4426950408889634 + 0.5)
    r = x - k * _LN2[0]
    r -= k * _LN2[1]
    total = _series(_EXPONENTIAL, r)
    total *= r * r
    total += r
    total += 1.0
    bits = k.astype(np.int64)
    bits += 1022  # half of it: 2¹⁰²⁴ is no float64
    bits <<= 52
    total *= bits.view(np.float64)
    total *= 2.0
    return total


def circle(turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin) of the angle 2π·w/2³² for words w. Shapes: (n,) uint32 -> (n,), (n,) float64.

    The word says exactly which quarter turn the angle is nearest to and how far it is from there.
    """
    shifted = turns + np.uint32(1 << 29)  # modulo 2³²
    quarter = (shifted >> np.uint32(30)).astype(np.uint64)
    x = (shifted & np.uint32((1 << 30) - 1)).astype(np.float64)
    x -= 2.0**29
    x *= 2.0**-29  # [-1, 1) eighths of a turn
    return _around(quarter, x)


def cos_sin_of_turns(turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin) of the angles 2π·t. Shapes: float64 in [0, 2⁵⁰), any -> alike."""
    quarter = np.floor(4.0 * turns + 0.5)
    x = 4.0 * turns - quarter  # exact
    x *= 2.0
    return _around(quarter.astype(np.uint64), x)


def _around(quarter: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin) at x·π/4 from so many quarter turns, |x| ≤ 1; `quarter`, uint64, is overwritten."""
    z = x * x
    sine, cosine = _sine(x, z).view(np.uint64), _cosine(z).view(np.uint64)
    odd = quarter & np.uint64(1)
    np.negative(odd, out=odd)  # all bits, where a quarter or three are left out: sine and cosine change places
    odd &= sine ^ cosine
    sine ^= odd
    cosine ^= odd
    quarter <<= np.uint64(62)
    sine ^= quarter & np.uint64(1 << 63)  # − from half a turn on
    quarter += np.uint64(1 << 62)
    cosine ^= quarter & np.uint64(1 << 63)  # − from one quarter to three
    return cosine.view(np.float64), sine.view(np.float64)


def cos_of_half_turns(x: float) -> float:
    """cos(π·x) for x in [0, 1]."""
    if x > 0.75:
        return -_cosine_of_eighths(4.0 * (1.0 - x))  # 1 − x and ½ − x are exact there
    if x > 0.25:
        eighths = 4.0 * (0.5 - x)
        return float(_sine(eighths, eighths * eighths))
    return _cosine_of_eighths(4.0 * x)


def _cosine_of_eighths(x: float) -> float:
    return float(_cosine(x * x))


def power(x: float, n: int) -> float:
    """xⁿ for n ≥ 0 by squaring: the factors x^(2ⁱ) of n's binary digits, the lowest first.

    Its relative error is less than n·2⁻⁵³ where nothing underflows. Raises ValueError for n < 0.
    """
    if n < 0:
        raise ValueError(f"a power of {n}")
    result = 1.0
    while n:
        if n & 1:
            result *= x
        x *= x
        n >>= 1
    return result
