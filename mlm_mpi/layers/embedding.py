"""Token and position embeddings."""

from typing import Any

from mlm_mpi.layers.base import Context, Flow
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.ops import embedding, linear
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import Parameter


class Embedding:
    """Shapes: the batch's ids (B, T) -> (B, T, C). The token table is the head's too, whose gradient comes first."""

    def __init__(self, name: str, vocabulary: int, context: int, width: int, std: float, dropout: float) -> None:
        self.tokens = Parameter(f"{name}.tokens", Layout((vocabulary, width), ("tp", None)), std, decay=True)
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
        """Adds to the tied token gradient, whatever `ctx.accumulate` says: the head came first."""
        ids, factors = saved
        dx = self.drop.backward(dy[0], factors, ctx)
        tokens, positions = ctx.grad(self.tokens), ctx.grad(self.positions)
        embedding.backward(dx.reshape(-1, dx.shape[2]), ids.reshape(-1), tokens)
        seen = positions[: ids.shape[1]]
        linear.bias_gradient(dx.reshape(ids.shape[0], -1), seen.reshape(-1), ctx.accumulate)  # Σ over rows of the batch
        if not ctx.accumulate:
            positions[ids.shape[1] :] = 0.0
        return ()
