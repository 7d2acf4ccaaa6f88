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

    def draw(self, ctx: Context) -> dropout.Draw | None:
        """Which mask this forward and its backward use; None where dropout is off."""
        if not self.active(ctx):
            return None
        return dropout.Draw(self.rate, key_of(ctx.seed, "dropout", self.name), ctx.step, ctx.micro_batch)

    def of_rows(self, ctx: Context, shape: tuple[int, ...]) -> dropout.Draw:
        """The draw of my positions of an activation, (B, t, C) of (B, T, C)."""
        draw = self.draw(ctx)
        assert draw is not None, "dropout is off"
        if not ctx.cuts_positions:
            return draw
        batch, length, width = shape
        return draw.cut((batch, length * ctx.tp.size, width), (0, length * ctx.tp.rank, 0))

    def of_heads(self, ctx: Context, heads: int, queries: int, keys: int) -> dropout.Draw | None:
        """The draw of what this rank holds, `heads` of them, of attention's probabilities (B, H, T, S)."""
        draw, tp = self.draw(ctx), ctx.tp
        if draw is None or tp.size == 1:
            return draw
        one = queries * keys
        return draw._replace(start=tp.rank * heads * one, strides=(tp.size * heads * one, one, keys, 1))

    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        draw = self.of_rows(ctx, x.shape) if self.active(ctx) else None
        return (x if draw is None else dropout.forward(x, draw)), draw

    def backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        return dy if saved is None else dropout.forward(dy, saved)
