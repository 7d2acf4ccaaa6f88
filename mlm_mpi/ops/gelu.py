"""GELU in its tanh form: y = ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))).

Only x is kept for backward: the tanh is computed again, which costs less than to store and load it.
Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415; the form GPT-2 uses.
"""

import math
from typing import Any

from mlm_mpi.backend.arrays import module_of, row_blocks, wide
from mlm_mpi.backend.registry import served

_ROOT = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


def _tanh(xp: Any, x: Any, out: Any) -> None:
    xp.multiply(x, x, out=out)
    out *= _ROOT * _CUBIC
    out += _ROOT
    out *= x
    xp.tanh(out, out=out)


@served
def forward(x: Any) -> Any:
    """Shapes: (N, F) -> (N, F)."""
    xp = module_of(x)
    y = xp.empty_like(x)
    for rows in row_blocks(x):
        a = wide(x[rows])
        v = y[rows] if a.dtype == x.dtype else xp.empty_like(a)
        _tanh(xp, a, v)
        v += 1.0
        v *= a
        v *= 0.5
        if a.dtype != x.dtype:
            y[rows] = v
    return y


@served
def backward(dy: Any, x: Any, out: Any = None) -> Any:
    """dx = dy · ½ (1 + t + x (1 − t²) √(2/π) (1 + 3·0.044715 x²)), into `out` (may be dy). Shapes: all (N, F)."""
    xp = module_of(x)
    dx = xp.empty_like(x) if out is None else out
    for rows in row_blocks(x):
        a = wide(x[rows])
        t, d = xp.empty_like(a), a * a
        _tanh(xp, a, t)
        d *= 3.0 * _ROOT * _CUBIC
        d += _ROOT
        d *= a
        d *= 1.0 - t * t
        d += t
        d += 1.0
        d *= 0.5
        xp.multiply(d, wide(dy[rows]), out=dx[rows], casting="unsafe")  # bfloat16 is rounded
    return dx
