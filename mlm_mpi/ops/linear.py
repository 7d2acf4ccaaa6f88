"""y = x W + b (+ residual), with the two halves of its backward apart (zero-bubble pipelines schedule them apart)."""

from typing import Any

from mlm_mpi.backend.arrays import deposit
from mlm_mpi.backend.kernels import served
from mlm_mpi.ops import matmul


@served
def forward(x: Any, w: Any, b: Any, residual: Any = None) -> Any:
    """Shapes: x (N, K), w (K, F), b (F,), residual (N, F) -> (N, F). Cost: 2·N·K·F flops."""
    y = x @ w
    y += b
    if residual is not None:
        y += residual
    return y


def backward_input(dy: Any, w: Any) -> Any:
    """dx = dy Wᵀ. Shapes: dy (N, F), w (K, F) -> (N, K). Cost: 2·N·K·F flops."""
    return matmul.product(dy, w.T)


def backward_weight(dy: Any, x: Any, dw: Any, db: Any, accumulate: bool) -> None:
    """dw = xᵀ dy and db = Σ dy, written or added. Shapes: as `forward`. Cost: 2·N·K·F flops."""
    matmul.add(x.T, dy, dw, accumulate)
    bias_gradient(dy, db, accumulate)


@served
def bias_gradient(dy: Any, db: Any, accumulate: bool) -> None:
    """db = Σ dy over rows, written or added. Shapes: dy (N, F), db (F,)."""
    deposit(dy.sum(axis=0), db, accumulate)
