"""Token and position embeddings."""

from typing import Any

from mlm_mpi.layers.base import Context
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.ops import embedding, linear
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import Parameter


class Embedding:
    """Shapes: ids (B, T) -> (B, T, C). The token table is tied to the head, which writes its gradient first."""

    def __init__(self, name: str, vocabulary: int, context: int, width: int, std: float, dropout: float) -> None:
        self.tokens = Parameter(f"{name}.tokens", Layout((vocabulary, width), ("tp", None)), std, decay=True)
        self.positions = Parameter(f"{name}.positions", Layout((context, width)), std)
        self.drop = Dropout(name, dropout)

    def parameters(self) -> list[Parameter]:
        return [self.tokens, self.positions]

    def forward(self, ids: Any, ctx: Context) -> tuple[Any, Any]:
        start = ctx.cache.length if ctx.cache is not None else 0
        x = embedding.forward(ids, self.tokens.data)  # (B, T, C)
        x += self.positions.data[start : start + ids.shape[1]]
        x, factors = self.drop.forward(x, ctx)
        return x, (ids, factors)

    def backward(self, dy: Any, saved: Any, ctx: Context) -> None:
        """Adds to the tied token gradient, whatever `ctx.accumulate` says: the head came first."""
        ids, factors = saved
        dx = self.drop.backward(dy, factors, ctx)
        embedding.backward(dx.reshape(-1, dx.shape[2]), ids.reshape(-1), self.tokens.grad)
        seen = self.positions.grad[: ids.shape[1]]
        linear.bias_gradient(dx.reshape(ids.shape[0], -1), seen.reshape(-1), ctx.accumulate)  # Σ over rows of the batch
        if not ctx.accumulate:
            self.positions.grad[ids.shape[1] :] = 0.0
