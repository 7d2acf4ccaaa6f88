"""y = x W + b, with the two halves of its backward apart (zero-bubble pipelines schedule them apart)."""

from typing import Any

from mlm_mpi.backend.arrays import add_product, deposit


def forward(x: Any, w: Any, b: Any) -> Any:
    """Shapes: x (N, K), w (K, F), b (F,) -> (N, F). Cost: 2·N·K·F flops."""
    y = x @ w  # (N, F)
    y += b
    return y


def backward_input(dy: Any, w: Any) -> Any:
    """dx = dy Wᵀ. Shapes: dy (N, F), w (K, F) -> (N, K). Cost: 2·N·K·F flops."""
    return dy @ w.T


def backward_weight(dy: Any, x: Any, dw: Any, db: Any, accumulate: bool) -> None:
    """dw = xᵀ dy and db = Σ dy, written or added. Shapes: as `forward`. Cost: 2·N·K·F flops."""
    add_product(x.T, dy, dw, accumulate)
    deposit(dy.sum(axis=0), db, accumulate)
