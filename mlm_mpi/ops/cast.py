"""An array in another element type."""

from typing import Any

from mlm_mpi.backend.registry import served


@served
def to(x: Any, out: Any) -> None:
    """out = x, rounded to nearest even where out is narrower. Shapes: alike."""
    out[...] = x
