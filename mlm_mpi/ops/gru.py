"""The gated recurrent unit through time, with the reset gate behind the product, as PyTorch has it.

    r = σ(pre_r + h' u_r),  z = σ(pre_z + h' u_z),  m = h' u_n + bias,  n = tanh(pre_n + r m)
    h = n + z (h' − n)       with h' the state before, pre = x W + b

Gates lie in the order r, z, n (PyTorch's). Products, shares, states before position 0 and before a document's first
token: as in `ops/lstm.py`.
Sources: Cho et al., arXiv:1406.1078; the reset gate behind the product: Chung et al., arXiv:1412.3555, cuDNN.
"""

from typing import Any

from mlm_mpi.backend.arrays import module_of, wide
from mlm_mpi.backend.registry import served
from mlm_mpi.ops import matmul
from mlm_mpi.ops.recurrence import before, carried


def _sigmoid(xp: Any, a: Any) -> Any:
    return 0.5 + 0.5 * xp.tanh(0.5 * a)  # nothing overflows


@served
def forward(pre: Any, u: Any, bias: Any, starts: Any = None, h0: Any = None) -> tuple[Any, Any]:
    """(h, m) of every position; `pre` becomes the gates r, z, n, which backward needs.

    Shapes: pre (B, T, 3, C), u (C, 3, C), bias (C,), starts (B, T) int32, the first position of each one's document, or
    None; h0 (B, C), the state before position 0, or None -> (B, T, C) twice. Cost: 6·B·T·C² flops.
    """
    xp, (batch, length, _, width) = module_of(pre), pre.shape
    h, m = (xp.empty((batch, length, width), pre.dtype) for _ in range(2))
    matrix, dtype = wide(u).reshape(width, -1), wide(pre[:0]).dtype
    state = xp.zeros((batch, width), dtype) if h0 is None else wide(h0)
    for t in range(length):
        state = carried(state, starts, t)
        products = (state @ matrix).reshape(batch, 3, width)
        gates, state, product = _opened(wide(pre[:, t]), products, wide(bias), state)
        h[:, t], m[:, t], pre[:, t] = state, product, gates
    return h, m


def _opened(p: Any, products: Any, bias: Any, state: Any) -> tuple[Any, Any, Any]:
    """(gates (B, 3, C), h, m) from what gates are given, h' u and h'."""
    xp = module_of(p)
    r, z = (_sigmoid(xp, p[:, gate] + products[:, gate]) for gate in (0, 1))
    m = products[:, 2] + bias
    n = xp.tanh(p[:, 2] + r * m)
    return xp.stack([r, z, n], axis=1), n + z * (state - n), m


@served
def step(pre: Any, products: Any, bias: Any, h0: Any) -> tuple[Any, Any]:
    """(h, m) of one position, of units whose `products`, h' u, are there; `pre` becomes the gates.

    With the bits of `forward` for those units. Float32 at least. Shapes: pre and products (B, 3, C), bias (C,), h0
    (B, C) -> (B, C) twice.
    """
    pre[...], h, m = _opened(pre, products, bias, h0)
    return h, m


@served
def backward(dy: Any, gates: Any, h: Any, m: Any, u: Any, starts: Any = None, shares: int = 1) -> None:
    """`gates`, as forward from a state of zeros left them, become the gradient of pre, and m that of m.

    With dh = dy + the next step's (dh z + (dr, dz, dm) uᵀ): dn = dh (1 − z) (1 − n²), dm = dn r,
    dr = dn m r (1 − r), dz = dh (h' − n) z (1 − z). The gradient of u is that of h' u, (dr, dz, dm).

    Shapes: dy, h and m (B, T, C), gates (B, T, 3, C), u (C, 3, C). `shares`: of the sum over units. Cost: 6·B·T·C²
    flops. ValueError where `shares` does not divide C.
    """
    xp, (batch, length, width) = module_of(dy), h.shape
    turned = wide(u).reshape(width, -1).T
    dh = xp.zeros((batch, width), wide(dy[:0]).dtype)
    for t in range(length - 1, -1, -1):
        opened = wide(gates[:, t]).copy()
        gates[:, t], given, past = _closed(wide(dy[:, t]) + dh, before(h, starts, t), opened, wide(m[:, t]))
        m[:, t] = given[:, 2]
        dh = carried(past + matmul.summed(given.reshape(batch, -1), turned, shares, 3), starts, t)


def _closed(dh: Any, h0: Any, gates: Any, m: Any) -> tuple[Any, Any, Any]:
    """(gradient of pre (B, 3, C), that of h' u (B, 3, C), that of h' that goes past the product)."""
    xp = module_of(dh)
    r, z, n = (gates[:, gate] for gate in range(3))
    dn = dh * (1.0 - z) * (1.0 - n * n)
    dr = dn * m * (r * (1.0 - r))
    dz = dh * (h0 - n) * (z * (1.0 - z))
    return xp.stack([dr, dz, dn], axis=1), xp.stack([dr, dz, dn * r], axis=1), dh * z


@served
def step_backward(dy: Any, h0: Any, gates: Any, m: Any, carry: Any) -> Any:
    """`gates` and m, as `step` left them, become the gradients of pre and of m; returns that of h' u.

    `carry`: the gradient of h that comes from later steps, which becomes that of h0, without what comes through h' u.
    Shapes: gates (B, 3, C), the others (B, C) -> (B, 3, C).
    """
    gates[...], given, carry[...] = _closed(dy + carry, h0, gates, m)
    m[...] = given[:, 2]
    return given
