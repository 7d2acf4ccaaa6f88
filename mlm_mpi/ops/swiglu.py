"""The gated product of a SwiGLU feed-forward: y = silu(a)·b, with silu(a) = a / (1 + exp(−a)).

Only a and b are kept for backward, as in `ops/gelu.py`. Source: Shazeer, "GLU Variants Improve Transformer",
arXiv:2002.05202.
"""

from typing import Any

from mlm_mpi.backend.arrays import module_of, row_blocks, wide
from mlm_mpi.backend.registry import served


def _sigmoid(xp: Any, a: Any) -> Any:
    # ½ (1 + tanh(a/2)): nothing overflows
    s = a * 0.5
    xp.tanh(s, out=s)
    s += 1.0
    s *= 0.5
    return s


@served
def forward(x: Any) -> Any:
    """Shapes: x (N, 2, F), the gate a before b -> (N, F)."""
    xp = module_of(x)
    y = xp.empty((x.shape[0], x.shape[2]), x.dtype)
    for rows in row_blocks(x):
        a, b = wide(x[rows, 0]), wide(x[rows, 1])
        s = _sigmoid(xp, a)
        s *= a
        xp.multiply(s, b, out=y[rows], casting="unsafe")  # bfloat16 is rounded
    return y


@served
def backward(dy: Any, x: Any, out: Any = None) -> Any:
    """dx, into `out` (may be x). Shapes: dy (N, F), x and dx (N, 2, F).

    With s = 1 / (1 + exp(−a)): da = dy·b·(s + a·s·(1 − s)) and db = dy·a·s.
    """
    xp = module_of(x)
    dx = xp.empty_like(x) if out is None else out
    for rows in row_blocks(x):
        d, a, b = wide(dy[rows]), wide(x[rows, 0]), wide(x[rows, 1])
        s = _sigmoid(xp, a)
        silu = a * s
        slope = silu * (1.0 - s)
        slope += s
        slope *= b
        xp.multiply(slope, d, out=dx[rows, 0], casting="unsafe")
        xp.multiply(silu, d, out=dx[rows, 1], casting="unsafe")
    return dx
