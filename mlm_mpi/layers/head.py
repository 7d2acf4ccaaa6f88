"""The head of a language model: final norm, output projection by a table of tokens, cross-entropy."""

from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import module_of
from mlm_mpi.comm.collectives import joined_rows, largest
from mlm_mpi.layers.base import Array, Context, Flow, Layer, Trunk
from mlm_mpi.layers.linear import Linear, flat
from mlm_mpi.layers.norm import LayerNorm
from mlm_mpi.ops import crossentropy, gelu, matmul
from mlm_mpi.params.store import Parameter


class TokenHead:
    """Shapes: (B, T, C) -> the tally's "loss", summed over targets, in nats.

    A tied table is the embedding's parameter; this head's gradient comes first and the embedding adds to it.
    Targets may be of some positions only: then `at` (M,) int32 says of which, counted through all rows, and nothing is
    computed of the others; behind the `count` of the batch they are filled up.
    """

    def __init__(self, trunk: Trunk, smoothing: float = 0.0) -> None:
        """`smoothing`: the part of a target in training that all tokens share (Szegedy et al., arXiv:1512.00567)."""
        self.norm, self.table, self.cap, self.smoothing = trunk.norm, trunk.table, trunk.cap, smoothing

    def parameters(self) -> list[Parameter]:
        """Its own: a tied table belongs to the embedding."""
        return [*self.norm.parameters(), *([] if self.table.tied else [self.table])]

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, Any]:
        (hidden,) = x
        if not ctx.training:
            taken, ctx = taken_rows(hidden, ctx)
            self.tell(ctx.entered(self.norm.forward(taken, ctx)[0], "the head's inputs"), ctx)
        return (), hidden

    def backward(self, dy: Flow, saved: Any, ctx: Context) -> Flow:
        cut = ctx
        taken, ctx = taken_rows(saved, cut)
        n, s_norm = self.norm.forward(taken, ctx)
        dn = ctx.left(self.learn(ctx.entered(n, "the head's inputs"), ctx), "the gradient of the head's inputs")
        return (put_back(self.norm.backward(dn, s_norm, ctx), saved, cut),)

    def tell(self, n: Array, ctx: Context) -> None:
        """Tallies, outside training. Shapes: (B, T, C)."""
        loss = crossentropy.loss if ctx.tp.size == 1 else VocabularyParallel(self.table, ctx).loss
        ctx.tally["loss"] = loss(
            flat(n), self.table.data, *self._wanted(ctx), self.table.layout.shares, ctx.pieces(n), self.cap
        )

    def learn(self, n: Array, ctx: Context) -> Array:
        """Tallies the loss, forms the table's gradient and that of n. Shapes: (B, T, C) -> (B, T, C)."""
        ctx.tally["loss"], dn = self._loss_and_grad(n, ctx)
        return dn

    def _loss_and_grad(self, n: Array, ctx: Context, weights: Array | None = None) -> tuple[Array, Array]:
        """`weights` (B T,): of targets in the gradient. Shapes: (B, T, C) -> (), (B, T, C)."""
        both = crossentropy.loss_and_grad if ctx.tp.size == 1 else VocabularyParallel(self.table, ctx).loss_and_grad
        loss, dn = both(
            flat(n), self.table.data, *self._wanted(ctx), None if self.table.frozen else ctx.grad(self.table),
            ctx.accumulate, self.table.layout.shares, ctx.pieces(n), self.cap, self.smoothing, weights,
        )  # fmt: skip
        return loss, dn.reshape(n.shape)

    def losses(self, n: Array, ctx: Context) -> Array:
        """The cross-entropy of each target in nats, float64, 0 where masked. Shapes: (B, T, C) -> (B, T)."""
        each = crossentropy.each if ctx.tp.size == 1 else VocabularyParallel(self.table, ctx).each
        found = each(flat(n), self.table.data, *self._wanted(ctx), self.table.layout.shares, self.cap)
        return found.reshape(n.shape[:2])

    def logits(self, hidden: Array, ctx: Context) -> Array:
        """Shapes: (B, T, C) -> (B, T, V)."""
        n, _ = self.norm.forward(hidden, ctx)
        logits = matmul.product(flat(n), self.table.data.T)
        return (crossentropy.capped(logits, self.cap) if self.cap else logits).reshape(*hidden.shape[:2], -1)

    def logits_backward(self, dlogits: Array, hidden: Array, ctx: Context) -> Array:
        """The gradient of what `logits` was given, on one rank; the table's is not formed. Shapes: as `logits`."""
        n, s_norm = self.norm.forward(hidden, ctx)
        dlogits = flat(dlogits)
        if self.cap:
            capped = flat(self.logits(hidden, ctx))
            dlogits = dlogits * (1.0 - (capped / self.cap) ** 2)
        return self.norm.backward(matmul.product(dlogits, self.table.data).reshape(n.shape), s_norm, ctx)

    def _wanted(self, ctx: Context) -> tuple[Array, Array | None]:
        assert ctx.batch is not None, "a head reads its targets from the context"
        targets, mask = ctx.batch.targets["ids"], ctx.batch.targets.get("mask")
        return targets.reshape(-1), None if mask is None else mask.reshape(-1)


def taken_rows(hidden: Array, ctx: Context) -> tuple[Array, Context]:
    """The positions whose targets count, and a context in which each tp rank has all of them; or what came in.

    Shapes: (B, t, C) -> (1, M, C).
    """
    assert ctx.batch is not None
    at = ctx.batch.targets.get("at")
    if at is None:
        return hidden, ctx
    return flat(ctx.entered(hidden, "the head's inputs"))[at][None], ctx.uncut()


def put_back(dx: Array, hidden: Array, ctx: Context) -> Array:
    """The gradient of `taken_rows`, 0 elsewhere. Shapes: (1, M, C), (B, t, C) -> (B, t, C)."""
    assert ctx.batch is not None
    at = ctx.batch.targets.get("at")
    if at is None:
        return dx
    batch, length, width = hidden.shape
    length *= ctx.tp.size if ctx.cuts_positions else 1
    whole = module_of(dx).zeros((batch * length, width), dx.dtype)
    whole[at[: ctx.batch.count]] = dx[0, : ctx.batch.count]
    return ctx.positions(whole.reshape(batch, length, width))


class VocabularyParallel:
    """`crossentropy.loss` and `loss_and_grad` of ranks that have some rows of the table each, to the same bits.

    No rank has all logits of a row. For each row ranks exchange three numbers: its largest logit, the sum of exp over
    theirs, the wanted logit; and the gradient of what came in. Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053.
    """

    def __init__(self, table: Parameter, ctx: Context) -> None:
        self.tp, box = ctx.tp, table.layout.box(ctx.mesh)
        self.first, self.stop, self.columns = box.starts[0], box.stops[0], table.layout.shape[0]

    def loss(
        self, x: Array, w: Array, targets: Array, mask: Array | None, shares: int, pieces: int, cap: float
    ) -> Array:  # fmt: skip
        """Shapes and result: those of `crossentropy.loss`, w (V / ranks, C)."""
        return crossentropy.summed(self.each(x, w, targets, mask, shares, cap), pieces)

    def each(self, x: Array, w: Array, targets: Array, mask: Array | None, shares: int, cap: float) -> Array:
        """Shapes and result: those of `crossentropy.each`, w (V / ranks, C)."""
        losses = np.empty(x.shape[0])
        for part, some in crossentropy.chunks(x, mask):
            losses[part], _ = self._rows(x[part], w, targets[part], some, shares, cap, False, 0.0)
        return losses

    def loss_and_grad(
        self, x: Array, w: Array, targets: Array, mask: Array | None, dw: Array | None, accumulate: bool, shares: int,
        pieces: int, cap: float, smoothing: float = 0.0, weights: Array | None = None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """As `crossentropy.loss_and_grad`, w and dw (V / ranks, C); of dx my part of the sum over ranks."""
        losses, dx, parts = np.empty(x.shape[0]), np.empty_like(x), crossentropy.chunks(x, mask)
        several = len(parts) > 1
        whole = np.empty_like(dw) if accumulate and several and dw is not None else dw
        for part, some in parts:
            losses[part], gradient = self._rows(x[part], w, targets[part], some, shares, cap, True, smoothing)
            if weights is not None:
                crossentropy.weigh(gradient, weights[part])
            matmul.add(gradient, w, dx[part], False, shares // self.tp.size)
            if whole is not None:
                matmul.add(gradient.T, x[part], whole, part.start > 0 or (accumulate and not several))
        if dw is not None and whole is not dw:
            dw += whole
        return crossentropy.summed(losses, pieces), dx

    def _rows(
        self, x: Array, w: Array, targets: Array, mask: Array | None, shares: int, cap: float, gradient: bool,
        smoothing: float,
    ) -> tuple[Array, Array]:  # fmt: skip
        """(losses (R,), gradient of my logits (R, V / ranks)), as `crossentropy.rows` has them."""
        logits = crossentropy.capped(crossentropy.logits_of(x, w), cap)
        kept = logits.copy() if cap and gradient else None
        here, local = (targets >= self.first) & (targets < self.stop), targets - self.first
        wanted = np.where(here, logits[np.arange(len(targets)), np.where(here, local, 0)], -0.0).astype(logits.dtype)
        plain = [crossentropy.logit_sums(logits, shares // self.tp.size)] if smoothing else []
        top = largest(self.tp, logits.max(axis=1), "the largest logits")
        sums = crossentropy.exponentials(logits, top, shares // self.tp.size)
        sent = [sums, wanted, *plain]
        sums, wanted, *plain = np.split(
            joined_rows(self.tp, np.concatenate(sent), "sums over the vocabulary"), len(sent)
        )
        losses = crossentropy.losses(sums, top, wanted)
        local = np.where(here, local, -1).astype(targets.dtype)
        if gradient:
            crossentropy.gradient(logits, sums, local, kept, cap)
        if mask is not None:
            losses[~mask] = 0.0
            logits[~mask] = 0.0
        if smoothing:
            losses += smoothing * crossentropy.above_mean(wanted, plain[0], self.columns, mask)
            crossentropy.smooth(logits, local, mask, smoothing, self.columns)
        return losses, logits


class Transform:
    """norm(GELU(x W + b)), of what `before` gives: between an encoder and its table. Shapes: (B, T, C) -> (B, T, C).

    Source: Devlin et al., arXiv:1810.04805, as released: the transform of its masked language model.
    """

    def __init__(self, name: str, width: int, std: float, epsilon: float, before: Layer | None = None) -> None:
        """`before`: the final norm of a model whose blocks have theirs in front."""
        self.before, self.norm = before, LayerNorm(f"{name}.norm", width, epsilon)
        self.dense = Linear(f"{name}.transform", width, width, std)

    def parameters(self) -> list[Parameter]:
        before = [] if self.before is None else self.before.parameters()
        return [*before, *self.dense.parameters(), *self.norm.parameters()]

    def forward(self, x: Array, ctx: Context) -> tuple[Array, Any]:
        s_before = None
        if self.before is not None:
            x, s_before = self.before.forward(x, ctx)
        hidden, pre = self.dense.forward_gelu(x, ctx)
        y, s_norm = self.norm.forward(hidden, ctx)
        return y, (s_before, x, pre, s_norm)

    def backward(self, dy: Array, saved: Any, ctx: Context) -> Array:
        s_before, x, pre, s_norm = saved
        dhidden = self.norm.backward(dy, s_norm, ctx)
        dpre = gelu.backward(flat(dhidden), flat(pre)).reshape(dhidden.shape)
        dx = self.dense.backward(dpre, x, ctx)
        return dx if self.before is None else self.before.backward(dx, s_before, ctx)
