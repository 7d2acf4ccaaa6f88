"""y = x W + b (+ residual), with the two halves of its backward apart (zero-bubble pipelines schedule them apart)."""

from typing import Any

from mlm_mpi.backend.arrays import deposit, wide
from mlm_mpi.backend.registry import served
from mlm_mpi.ops import gelu, matmul, relu2, swiglu
from mlm_mpi.order import joined


@served
def forward(x: Any, w: Any, b: Any = None, residual: Any = None, shares: int = 1) -> Any:
    """Bias and residual join the sum over K, which has so many shares (`ops.matmul`), when it is whole.

    Shapes: x (N, K), w (K, F), b (F,) or None, residual (N, F) or None -> (N, F). Cost: 2·N·K·F flops.
    """
    return completed(matmul.summed(x, w, shares), b, residual).astype(x.dtype, copy=False)


def completed(y: Any, b: Any = None, residual: Any = None) -> Any:
    """y, a whole sum over K, + (b + residual), over y: what joins it, in the order of the kernels. Shapes: `forward`'s.

    Where ranks have parts of the sum, each does this once they are joined.
    """
    added = [wide(array) for array in (b, residual) if array is not None]
    if added:
        y += added[0] if len(added) == 1 else added[0] + added[1]
    return y


@served
def forward_gelu(x: Any, w: Any, b: Any = None) -> tuple[Any, Any]:
    """(gelu(pre), pre) with pre = x w + b, which backward needs. Shapes: as `forward`, both results (N, F)."""
    pre = forward(x, w, b)
    return gelu.forward(pre), pre


@served
def forward_relu2(x: Any, w: Any) -> tuple[Any, Any]:
    """(relu2(pre), pre) with pre = x w, which `relu2.backward` needs. Shapes: as `forward`, both results (N, F)."""
    pre = forward(x, w)
    return relu2.forward(pre), pre


def forward_swiglu(x: Any, w: Any) -> tuple[Any, Any]:
    """(swiglu(pre), pre) with pre = x w, which `swiglu.backward` needs.

    Shapes: x (N, K), w (K, 2·F), gates before what they open -> (N, F), pre (N, 2, F). Cost: 4·N·K·F flops.
    """
    pre = forward(x, w).reshape(x.shape[0], 2, -1)
    return swiglu.forward(pre), pre


@served
def backward_input(dy: Any, w: Any, pre: Any = None, shares: int = 1, segments: int = 1) -> Any:
    """dx = dy Wᵀ, times gelu'(pre) where x was gelu(pre). Shapes: dy (N, F), w (K, F), pre (N, K) -> (N, K).

    `shares`, `segments`: of the sum over F, as in `ops.matmul`. Cost: 2·N·K·F flops.
    """
    dx = matmul.product(dy, w.T, shares, segments)
    return dx if pre is None else gelu.backward(dx, pre, out=dx)


def backward_weight(dy: Any, x: Any, dw: Any, db: Any, accumulate: bool, pieces: int = 1) -> None:
    """dw = xᵀ dy and db = Σ dy, unless that is None, written or added. Shapes: as `forward`. Cost: 2·N·K·F flops."""
    matmul.add(x.T, dy, dw, accumulate)
    if db is not None:
        bias_gradient(dy, db, accumulate, pieces)


@served
def bias_gradient(dy: Any, db: Any, accumulate: bool, pieces: int = 1) -> None:
    """db = Σ dy over rows, written or added; db may be wider than dy. Shapes: dy (N, F), db (F,).

    `pieces` equal groups of rows are summed, each by itself, and joined by the tree; then the sum is added to db.
    """
    groups = wide(dy).reshape(pieces, -1, *dy.shape[1:])
    deposit(joined([group.sum(axis=0) for group in groups]), db, accumulate)
