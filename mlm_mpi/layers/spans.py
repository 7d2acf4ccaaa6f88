"""The head that finds an answer in a text: of each position, how well an answer begins and how well it ends there."""

from typing import Any

from mlm_mpi.backend.arrays import module_of, wide
from mlm_mpi.layers.base import Array, Context, Flow, Layer
from mlm_mpi.layers.classes import rounded
from mlm_mpi.layers.linear import Linear, flat
from mlm_mpi.ops import crossentropy
from mlm_mpi.params.store import Parameter


class SpanHead:
    """Shapes: (1, T, C), texts one behind the other -> the tally's "loss", summed over texts, in nats.

    An affine map to two logits a position. A text's loss is the mean of two cross-entropies over its positions, of
    where the answer begins and of where it ends: both at the first position where there is none. Targets, (B, 2) int32
    each: answers, contexts and names (data/windows.py).
    Outside training the tally also has "outcomes" (B, 6) float64: both numbers of the name; the first and one past the
    last token of the best answer, of at most `longest` tokens of the context, counted from its begin; log P of it, and
    of there being none, P being the product of both softmaxes.
    Source: Devlin et al., arXiv:1810.04805, sections 4.2 and 4.3.
    """

    def __init__(self, width: int, norm: Layer | None, longest: int, std: float = 0.02, name: str = "spans") -> None:
        """`norm`: the final one, where blocks have theirs in front."""
        self.norm, self.longest = norm, longest
        self.out = Linear(f"{name}.out", width, 2, std)
        self.out.weight.matrices = None  # a head is none of the hidden layers' matrices

    def parameters(self) -> list[Parameter]:
        return [*([] if self.norm is None else self.norm.parameters()), *self.out.parameters()]

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, Any]:
        (hidden,) = x
        if not ctx.training:
            self._tell(wide(flat(self._logits(hidden, ctx)[0])), ctx)
        return (), hidden

    def backward(self, dy: Flow, saved: Any, ctx: Context) -> Flow:
        logits, kept = self._logits(saved, ctx)
        ctx.tally["loss"], dlogits = _loss(wide(flat(logits)), ctx)
        return (self._logits_backward(rounded(dlogits, logits.dtype).reshape(logits.shape), kept, ctx),)

    def _logits(self, hidden: Array, ctx: Context) -> tuple[Array, Any]:
        """Shapes: (1, t, C) -> (1, T, 2), on each tp rank."""
        x, s_norm = ctx.entered(hidden, "the head's inputs"), None
        if self.norm is not None:
            x, s_norm = self.norm.forward(x, ctx.uncut())
        return self.out.forward(x, ctx.uncut())[0], (s_norm, x)

    def _logits_backward(self, dlogits: Array, kept: Any, ctx: Context) -> Array:
        s_norm, x = kept
        dx = self.out.backward(dlogits, x, ctx.uncut())
        return ctx.positions(dx if self.norm is None else self.norm.backward(dx, s_norm, ctx.uncut()))

    def _tell(self, logits: Array, ctx: Context) -> None:
        """Shapes: (T, 2)."""
        assert ctx.batch is not None, "a head reads its targets from the context"
        targets, told, losses = ctx.batch.targets, [], []
        for number, (begin, end) in enumerate(ctx.batch.spans()):
            own = logits[begin:end]
            scores, nothing = own.astype("f8"), _losses(own, targets["answers"][number] * 0, False)[0]
            totals = nothing + scores[0]  # log Σ exp of both columns
            first, stop = targets["contexts"][number].tolist()
            start, past, best = _best(scores[first:stop] - totals, self.longest)
            row = [*targets["names"][number].astype("f8"), start, past, best, -(nothing[0] + nothing[1])]
            told.append(module_of(own).stack(row))
            missed = totals - scores[targets["answers"][number], module_of(own).arange(2)]
            losses.append((missed[0] + missed[1]) / 2)
        ctx.tally["outcomes"] = module_of(logits).stack(told)
        ctx.tally["loss"] = crossentropy.summed(module_of(logits).stack(losses), 1)


def _losses(logits: Array, at: Array, gradient: bool) -> tuple[Array, Array]:
    """(−log softmax over positions, of one position of each column, in nats; its gradient). Shapes: (n, 2), (2,) ->
    (2,) float64, (n, 2)."""
    columns = logits.T.copy()  # rows of their own
    return crossentropy.rows(columns, at, None, gradient), columns.T


def _loss(logits: Array, ctx: Context) -> tuple[Any, Array]:
    """(summed loss, its gradient). Shapes: (T, 2) -> (), (T, 2)."""
    assert ctx.batch is not None, "a head reads its targets from the context"
    xp, every = module_of(logits), []
    gradient = xp.zeros_like(logits)
    for number, (begin, end) in enumerate(ctx.batch.spans()):
        losses, gradient[begin:end] = _losses(logits[begin:end], ctx.batch.targets["answers"][number], True)
        every.append(losses)
    gradient *= 0.5
    return crossentropy.summed(xp.concatenate(every), 1) / 2, gradient


def _best(scores: Array, longest: int) -> tuple[Array, Array, Array]:
    """(first, one past the last, score) of the best span of at most so many positions; of equal ones the first, the
    shortest. Shapes: (n, 2)."""
    xp, count = module_of(scores), scores.shape[0]
    longest = min(longest, count)
    ends = xp.concatenate([scores[:, 1], xp.full(longest - 1, -xp.inf)])
    totals = scores[:, 0][:, None] + ends[xp.arange(count)[:, None] + xp.arange(longest)[None, :]]  # (n, longest)
    best = totals.argmax()
    first, more = best // longest, best % longest
    return first.astype("f8"), (first + more + 1).astype("f8"), totals.reshape(-1)[best]
