"""Long short-term memory through time, without peepholes.

    i = σ(p_i),  f = σ(p_f),  g = tanh(p_g),  o = σ(p_o)   with p_t = pre_t + h_{t−1} u,  pre_t = x_t W + b
    c_t = f c_{t−1} + i g,    h_t = o tanh(c_t)

Gates lie in the order i, f, g, o (PyTorch's). What a layer is given at all positions is one product before the loop
over time; the gradients of W and u are one product each behind it. Before position 0, and before the first token of a
document (`starts`), h and c are zero, and no gradient goes back beyond it.
Sums: h u is over units, all of which a rank has that holds the columns of some (tp); dp uᵀ is over gates and units, in
shares of the units (order.py), joined by the tree, and then added to dy. Products are of float32 at least.
Sources: Hochreiter, Schmidhuber, "Long Short-Term Memory", 1997; Gers et al., "Learning to Forget", 2000.
"""

from typing import Any

from mlm_mpi.backend.arrays import module_of, wide
from mlm_mpi.backend.registry import served
from mlm_mpi.ops import matmul
from mlm_mpi.ops.recurrence import before, carried


def _sigmoid(xp: Any, a: Any) -> Any:
    return 0.5 + 0.5 * xp.tanh(0.5 * a)  # nothing overflows


@served
def forward(pre: Any, u: Any, starts: Any = None, h0: Any = None, c0: Any = None) -> tuple[Any, Any]:
    """(h, c) of every position; `pre` becomes the gates i, f, g, o, which backward needs.

    Shapes: pre (B, T, 4, C), u (C, 4, C), starts (B, T) int32, the first position of each one's document, or None; h0
    and c0 (B, C), the state before position 0, or None -> (B, T, C) twice. Cost: 8·B·T·C² flops.
    """
    xp, (batch, length, _, width) = module_of(pre), pre.shape
    h, c = (xp.empty((batch, length, width), pre.dtype) for _ in range(2))
    matrix, dtype = wide(u).reshape(width, -1), wide(pre[:0]).dtype
    state, cell = (xp.zeros((batch, width), dtype) if x is None else wide(x) for x in (h0, c0))
    for t in range(length):
        state, cell = (carried(x, starts, t) for x in (state, cell))
        gates, state, cell = _opened(wide(pre[:, t]) + (state @ matrix).reshape(batch, 4, width), cell)
        h[:, t], c[:, t], pre[:, t] = state, cell, gates
    return h, c


def _opened(p: Any, cell: Any) -> tuple[Any, Any, Any]:
    """(gates (B, 4, C), h, c) from what gates are given and the c before."""
    xp = module_of(p)
    i, f, o = (_sigmoid(xp, p[:, gate]) for gate in (0, 1, 3))
    g = xp.tanh(p[:, 2])
    cell = f * cell + i * g
    return xp.stack([i, f, g, o], axis=1), o * xp.tanh(cell), cell


@served
def step(pre: Any, products: Any, c0: Any) -> tuple[Any, Any]:
    """(h, c) of one position, of units whose `products`, h u, are there; `pre` becomes the gates.

    With the bits of `forward` for those units: what ranks do that have some each. Float32 at least. Shapes: pre and
    products (B, 4, C), c0 (B, C) -> (B, C) twice.
    """
    pre[...], h, c = _opened(pre + products, c0)
    return h, c


@served
def backward(dy: Any, gates: Any, c: Any, u: Any, starts: Any = None, shares: int = 1) -> None:
    """`gates`, as forward from a state of zeros left them, become the gradient of what was given to them.

    With dh = dy + the next step's dp uᵀ and dc = dh o (1 − tanh²c) + the next step's dc f:
    dp_i = dc g i (1 − i),  dp_f = dc c' f (1 − f),  dp_g = dc i (1 − g²),  dp_o = dh tanh(c) o (1 − o).

    Shapes: dy and c (B, T, C), gates (B, T, 4, C), u (C, 4, C). `shares`: of the sum over units. Cost: 8·B·T·C² flops.
    ValueError where `shares` does not divide C.
    """
    xp, (batch, length, width) = module_of(dy), c.shape
    turned = wide(u).reshape(width, -1).T
    dh, dc = (xp.zeros((batch, width), wide(dy[:0]).dtype) for _ in range(2))
    for t in range(length - 1, -1, -1):
        opened = wide(gates[:, t]).copy()
        dp, dc = _closed(wide(dy[:, t]) + dh, before(c, starts, t), wide(c[:, t]), opened, dc)
        gates[:, t] = dp
        dh = carried(matmul.summed(dp.reshape(batch, -1), turned, shares, 4), starts, t)
        dc = carried(dc, starts, t)


def _closed(dh: Any, c0: Any, c: Any, gates: Any, dc: Any) -> tuple[Any, Any]:
    """(gradient of what the gates were given (B, 4, C), dc of the step before); c0 is the c before."""
    xp = module_of(dh)
    i, f, g, o = (gates[:, gate] for gate in range(4))
    squashed = xp.tanh(c)
    dc = dh * o * (1.0 - squashed * squashed) + dc
    dp = [dc * g * (i * (1.0 - i)), dc * c0 * (f * (1.0 - f)), dc * i * (1.0 - g * g), dh * squashed * (o * (1.0 - o))]
    return xp.stack(dp, axis=1), dc * f


@served
def step_backward(dy: Any, sums: Any, c0: Any, c: Any, gates: Any, dc: Any) -> None:
    """`gates`, as `step` left them, become the gradient of what was given to them, and dc that of c0.

    `sums`: these units' part of the next step's dp uᵀ. Shapes: gates (B, 4, C), the others (B, C).
    """
    gates[...], dc[...] = _closed(dy + sums, c0, c, gates, dc)
