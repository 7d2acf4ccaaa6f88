"""Dropout keyed by (seed, name) and counted by (step, micro-batch, global element)."""

from typing import Any

from mlm_mpi.layers.base import Context
from mlm_mpi.ops import dropout
from mlm_mpi.params.store import Parameter
from mlm_mpi.rng import key_of


class Dropout:
    """Shapes: any -> the same. The identity outside training and at rate 0."""

    def __init__(self, name: str, rate: float) -> None:
        self.name, self.rate = name, rate

    def parameters(self) -> list[Parameter]:
        return []

    def active(self, ctx: Context) -> bool:
        return ctx.training and self.rate > 0

    def factors(self, shape: tuple[int, ...], start: int, dtype: Any, ctx: Context) -> Any:
        """0 or 1/(1 − rate) for the elements from number `start` of the global array."""
        key = key_of(ctx.seed, "dropout", self.name)
        return dropout.mask(shape, self.rate, key, ctx.step, ctx.micro_batch, start, dtype)

    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        if not self.active(ctx):
            return x, None
        factors = self.factors(x.shape, 0, x.dtype, ctx)
        return dropout.forward(x, factors), factors

    def backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        return dy if saved is None else dropout.forward(dy, saved)
