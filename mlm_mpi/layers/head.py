"""The head of a language model: final norm, output projection by a table of tokens, cross-entropy."""

from typing import Any

from mlm_mpi.layers.base import Array, Context, Flow, Trunk
from mlm_mpi.layers.linear import flat
from mlm_mpi.ops import crossentropy, matmul
from mlm_mpi.params.store import Parameter


class TokenHead:
    """Shapes: (B, T, C) -> the tally's "loss", summed over targets, in nats.

    A tied table is the embedding's parameter; this head's gradient comes first and the embedding adds to it.
    """

    def __init__(self, trunk: Trunk) -> None:
        self.norm, self.table, self.cap = trunk.norm, trunk.table, trunk.cap

    def parameters(self) -> list[Parameter]:
        """Its own: a tied table belongs to the embedding."""
        return [*self.norm.parameters(), *([] if self.table.tied else [self.table])]

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, Any]:
        (hidden,) = x
        if not ctx.training:
            n, _ = self.norm.forward(hidden, ctx)
            ctx.tally["loss"] = crossentropy.loss(
                flat(n), self.table.data, *self._wanted(ctx), self.table.layout.shares, ctx.pieces(hidden), self.cap
            )
        return (), hidden

    def backward(self, dy: Flow, saved: Any, ctx: Context) -> Flow:
        n, s_norm = self.norm.forward(saved, ctx)
        ctx.tally["loss"], dn = crossentropy.loss_and_grad(
            flat(n), self.table.data, *self._wanted(ctx), ctx.grad(self.table), ctx.accumulate,
            self.table.layout.shares, ctx.pieces(saved), self.cap,
        )  # fmt: skip
        return (self.norm.backward(dn.reshape(saved.shape), s_norm, ctx),)

    def logits(self, hidden: Array, ctx: Context) -> Array:
        """Shapes: (B, T, C) -> (B, T, V)."""
        n, _ = self.norm.forward(hidden, ctx)
        logits = matmul.product(flat(n), self.table.data.T)
        return (crossentropy.capped(logits, self.cap) if self.cap else logits).reshape(*hidden.shape[:2], -1)

    def _wanted(self, ctx: Context) -> tuple[Array, Array | None]:
        assert ctx.batch is not None, "a head reads its targets from the context"
        targets, mask = ctx.batch.targets["ids"], ctx.batch.targets.get("mask")
        return targets.reshape(-1), None if mask is None else mask.reshape(-1)
