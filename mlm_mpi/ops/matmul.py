"""The matrix product deposited where it belongs: out = a b, or out += a b."""

from typing import Any

from mlm_mpi.backend.arrays import module_of, wide
from mlm_mpi.backend.registry import served


@served
def add(a: Any, b: Any, out: Any, accumulate: bool) -> None:
    """Shapes: a (M, K), b (K, N), out (M, N). Cost: 2·M·N·K flops."""
    if accumulate:
        out += wide(a) @ wide(b)
    elif out.dtype == a.dtype == wide(a).dtype:
        module_of(out).matmul(a, b, out=out)
    else:
        out[...] = wide(a) @ wide(b)


def product(a: Any, b: Any) -> Any:
    """a b. Shapes: (M, K), (K, N) -> (M, N)."""
    out = module_of(a).empty((a.shape[0], b.shape[1]), a.dtype)
    add(a, b, out, accumulate=False)
    return out
