"""Token and position embeddings."""

from typing import Any

from mlm_mpi import order
from mlm_mpi.layers.base import Context, Flow
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.ops import embedding, linear
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import Parameter


class Embedding:
    """Shapes: the batch's ids (B, T) -> (B, T, C).

    The token table is the head's too, and its gradient has two sums over the micro-batches of a lane, head and
    embedding, each micro-batch complete before it is added. They become one when the lane closes, element by element:
    head + embedding. So the stages of a pipeline that hold the table at its two ends need not take turns: each forms
    its own sum, and they are joined once a lane. A rank that holds some rows of the table (tp) sums the ids that lie
    there; columns are summed one by one, so that ranks with other positions can bring theirs together by columns.
    """

    def __init__(
        self, name: str, vocabulary: int, context: int, width: int, std: float, dropout: float, shares: int = order.MOST
    ) -> None:
        """`shares`: at most so many has a sum over the vocabulary."""
        layout = Layout((vocabulary, width), ("tp", None), shares=order.shares(vocabulary, shares))
        self.tokens = Parameter(f"{name}.tokens", layout, std, decay=True, tied=True)
        self.positions = Parameter(f"{name}.positions", Layout((context, width)), std)
        self.drop = Dropout(name, dropout)

    def parameters(self) -> list[Parameter]:
        return [self.tokens, self.positions]

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, Any]:
        assert ctx.batch is not None, "the first part reads its ids from the context"
        ids = ctx.batch.inputs["ids"]
        start = ctx.cache.length if ctx.cache is not None else 0
        y = embedding.forward(ids, self.tokens.data)  # (B, T, C)
        y += self.positions.data[start : start + ids.shape[1]]
        y, factors = self.drop.forward(y, ctx)
        return (y,), (ids, factors)

    def backward(self, dy: Flow, saved: Any, ctx: Context) -> Flow:
        """Adds to the tied token gradient, whatever `ctx.accumulate` says: the head came first.

        In a lane of several micro-batches the sum lies in `ctx.lane` until the last. It begins with -0, which changes
        nothing that is added to it, so that a lane of one needs none.
        """
        ids, factors = saved
        dx = self.drop.backward(dy[0], factors, ctx)
        tokens, positions = ctx.grad(self.tokens), ctx.grad(self.positions)
        summed = ctx.lane.get(self.tokens)
        embedding.backward(dx.reshape(-1, dx.shape[2]), ids.reshape(-1), tokens if summed is None else summed)
        if summed is not None and ctx.closes:
            tokens += summed
        seen = positions[: ids.shape[1]]
        linear.bias_gradient(dx.reshape(ids.shape[0], -1), seen.reshape(-1), ctx.accumulate)  # Σ over rows of the batch
        if not ctx.accumulate:
            positions[ids.shape[1] :] = 0.0
        return ()
