"""Matrices made orthogonal: x = U S Vᵀ becomes U p(S) Vᵀ with p near 1, polynomials a s + b s³ + c s⁵ in turn.

A product of x with a polynomial of x xᵀ is all it needs, so it runs on the Gram matrix of x's smaller side and returns
to x once, at its end: Q x, or x Q. Everything in between is symmetric and of that side: of such a product only the
elements up to the diagonal are computed, the others are their mirror. In float32 the result is within 0.2 % of that of
the iteration on x itself; bf16 would not do, so these products are never rounded to it.

Source: Higham, "Functions of Matrices", 2008, ch. 8; the Gram matrix: Zhang et al., "Gram Newton-Schulz", 2026.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import module_of
from mlm_mpi.backend.registry import served
from mlm_mpi.ops import matmul

Polynomials = Sequence[tuple[float, float, float]]

_BLOCK_ROWS = 96  # of a symmetric product of the reference: BAND of kernels/cpu/product.h
_GPU_BLOCK_ROWS = 1024  # a launch costs more than the half that it saves


def flops(rows: int, columns: int) -> int:
    """Multiply-adds of one matrix, of symmetric products one half."""
    small, large = sorted((rows, columns))
    return small * small * (3 * large + 17 * small) // 2


@served
def iterate(x: Any, polynomials: Polynomials) -> None:
    """x[n] = p(x[n]), in place. Shapes: (matrices, rows, columns), C-contiguous; singular values at most about 1."""
    side = min(x.shape[1:])
    squares = module_of(x).empty((4, side, side), x.dtype)
    for matrix in x:
        _one(matrix, squares, polynomials)


def _one(matrix: Any, squares: Any, polynomials: Polynomials) -> None:
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    gram, square, p, q = squares
    _symmetric(x, x.T, gram)
    for number, (a, b, c) in enumerate(polynomials):
        _symmetric(gram, gram, square)
        _polynomial(gram, square, a, b, c, p)
        if number == 0:
            q[...] = p
        else:
            _symmetric(p, q, square)
            q, square = square, q
        if number + 1 < len(polynomials):
            _symmetric(gram, p, square)
            _symmetric(square, p, gram)
    given = matrix.copy()
    matmul.add(*((given, q) if tall else (q, given)), matrix, False)


def _polynomial(gram: Any, square: Any, a: float, b: float, c: float, out: Any) -> None:
    """out = a I + b G + c G²; `square` holds G² and is changed."""
    xp = module_of(out)
    xp.multiply(square, c, out=out)
    xp.multiply(gram, b, out=square)
    out += square
    out.reshape(-1)[:: len(out) + 1] += a


def _symmetric(a: Any, b: Any, out: Any) -> None:
    """out = a b, known to be symmetric."""
    size, xp = len(out), module_of(out)
    count = -(-size // (_BLOCK_ROWS if isinstance(out, np.ndarray) else _GPU_BLOCK_ROWS))
    edges = [size * block // count for block in range(count + 1)]  # at least two rows: NumPy would compute a single one
    for start, stop in itertools.pairwise(edges):
        rows = out[start:stop, :stop]
        matmul.add(a[start:stop], b[:, :stop], rows, False)
        last = rows[:, start:]
        last[...] = xp.tril(last) + xp.tril(last, -1).T
        out[:start, start:stop] = out[start:stop, :start].T
