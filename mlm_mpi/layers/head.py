"""The head of a language model: final norm, output projection by a table of tokens, cross-entropy."""

from typing import Any

import numpy as np

from mlm_mpi.comm.collectives import joined_rows, largest
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
            n = ctx.entered(self.norm.forward(hidden, ctx)[0], "the head's inputs")
            loss = crossentropy.loss if ctx.tp.size == 1 else VocabularyParallel(self.table, ctx).loss
            ctx.tally["loss"] = loss(
                flat(n), self.table.data, *self._wanted(ctx), self.table.layout.shares, ctx.pieces(n), self.cap
            )
        return (), hidden

    def backward(self, dy: Flow, saved: Any, ctx: Context) -> Flow:
        n, s_norm = self.norm.forward(saved, ctx)
        n = ctx.entered(n, "the head's inputs")
        both = crossentropy.loss_and_grad if ctx.tp.size == 1 else VocabularyParallel(self.table, ctx).loss_and_grad
        ctx.tally["loss"], dn = both(
            flat(n), self.table.data, *self._wanted(ctx), ctx.grad(self.table), ctx.accumulate,
            self.table.layout.shares, ctx.pieces(n), self.cap,
        )  # fmt: skip
        dn = ctx.left(dn.reshape(n.shape), "the gradient of the head's inputs")
        return (self.norm.backward(dn, s_norm, ctx),)

    def logits(self, hidden: Array, ctx: Context) -> Array:
        """Shapes: (B, T, C) -> (B, T, V)."""
        n, _ = self.norm.forward(hidden, ctx)
        logits = matmul.product(flat(n), self.table.data.T)
        return (crossentropy.capped(logits, self.cap) if self.cap else logits).reshape(*hidden.shape[:2], -1)

    def _wanted(self, ctx: Context) -> tuple[Array, Array | None]:
        assert ctx.batch is not None, "a head reads its targets from the context"
        targets, mask = ctx.batch.targets["ids"], ctx.batch.targets.get("mask")
        return targets.reshape(-1), None if mask is None else mask.reshape(-1)


class VocabularyParallel:
    """`crossentropy.loss` and `loss_and_grad` of ranks that have some rows of the table each, to the same bits.

    No rank has all logits of a row. For each row ranks exchange three numbers: its largest logit, the sum of exp over
    theirs, the wanted logit; and the gradient of what came in. Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053.
    """

    def __init__(self, table: Parameter, ctx: Context) -> None:
        self.tp, box = ctx.tp, table.layout.box(ctx.mesh)
        self.first, self.stop = box.starts[0], box.stops[0]

    def loss(
        self, x: Array, w: Array, targets: Array, mask: Array | None, shares: int, pieces: int, cap: float
    ) -> Array:  # fmt: skip
        """Shapes and result: those of `crossentropy.loss`, w (V / ranks, C)."""
        losses = np.empty(x.shape[0])
        for part, some in crossentropy.chunks(x, mask):
            losses[part], _ = self._rows(x[part], w, targets[part], some, shares, cap, gradient=False)
        return crossentropy.summed(losses, pieces)

    def loss_and_grad(
        self, x: Array, w: Array, targets: Array, mask: Array | None, dw: Array, accumulate: bool, shares: int,
        pieces: int, cap: float,
    ) -> tuple[Array, Array]:  # fmt: skip
        """As `crossentropy.loss_and_grad`, w and dw (V / ranks, C); of dx my part of the sum over ranks."""
        losses, dx, parts = np.empty(x.shape[0]), np.empty_like(x), crossentropy.chunks(x, mask)
        several = len(parts) > 1
        whole = np.empty_like(dw) if accumulate and several else dw
        for part, some in parts:
            losses[part], gradient = self._rows(x[part], w, targets[part], some, shares, cap, gradient=True)
            matmul.add(gradient, w, dx[part], False, shares // self.tp.size)
            matmul.add(gradient.T, x[part], whole, part.start > 0 or (accumulate and not several))
        if whole is not dw:
            dw += whole
        return crossentropy.summed(losses, pieces), dx

    def _rows(
        self, x: Array, w: Array, targets: Array, mask: Array | None, shares: int, cap: float, gradient: bool
    ) -> tuple[Array, Array]:  # fmt: skip
        """(losses (R,), gradient of my logits (R, V / ranks)), as `crossentropy.rows` has them."""
        logits = crossentropy.capped(crossentropy.logits_of(x, w), cap)
        kept = logits.copy() if cap and gradient else None
        here, local = (targets >= self.first) & (targets < self.stop), targets - self.first
        wanted = np.where(here, logits[np.arange(len(targets)), np.where(here, local, 0)], -0.0).astype(logits.dtype)
        top = largest(self.tp, logits.max(axis=1), "the largest logits")
        sums = crossentropy.exponentials(logits, top, shares // self.tp.size)
        sums, wanted = np.split(joined_rows(self.tp, np.concatenate([sums, wanted]), "sums over the vocabulary"), 2)
        losses = crossentropy.losses(sums, top, wanted)
        if gradient:
            crossentropy.gradient(logits, sums, np.where(here, local, -1).astype(targets.dtype), kept, cap)
        if mask is not None:
            losses[~mask] = 0.0
            logits[~mask] = 0.0
        return losses, logits
