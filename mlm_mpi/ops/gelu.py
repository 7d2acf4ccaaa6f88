"""GELU in its tanh form: y = ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))).

Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415; the form GPT-2 uses.
"""

import math
from typing import Any

from mlm_mpi.backend.arrays import module_of, row_blocks

_ROOT = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


def forward(x: Any) -> tuple[Any, Any]:
    """Shapes: x (N, F) -> y (N, F), t (N, F): the tanh, kept because it costs more than to store it."""
    xp = module_of(x)
    y, t = xp.empty_like(x), xp.empty_like(x)
    for rows in row_blocks(x):
        a, u, v = x[rows], t[rows], y[rows]
        xp.multiply(a, a, out=u)
        u *= _ROOT * _CUBIC
        u += _ROOT
        u *= a
        xp.tanh(u, out=u)
        xp.add(u, 1.0, out=v)
        v *= a
        v *= 0.5
    return y, t


def backward(dy: Any, x: Any, t: Any) -> Any:
    """dx = dy · ½ (1 + t + x (1 − t²) √(2/π) (1 + 3·0.044715 x²)). Shapes: all (N, F)."""
    xp = module_of(x)
    dx = xp.empty_like(x)
    for rows in row_blocks(x):
        a, u, d = x[rows], t[rows], dx[rows]
        xp.multiply(a, a, out=d)
        d *= 3.0 * _ROOT * _CUBIC
        d += _ROOT
        d *= a
        slope = u * u
        xp.subtract(1.0, slope, out=slope)
        d *= slope
        d += u
        d += 1.0
        d *= 0.5
        d *= dy[rows]
    return dx
