"""The head of word vectors: which of a few words stands near, and which were drawn by chance."""

from typing import Any

from mlm_mpi.backend.arrays import module_of, wide
from mlm_mpi.layers.base import Array, Context, Flow
from mlm_mpi.ops import crossentropy, embedding, matmul
from mlm_mpi.order import joined
from mlm_mpi.params.store import Parameter


class NegativeSampling:
    """Shapes: a vector v for each pair (n, 1, C) -> the tally's "loss", summed over pairs, in nats.

    A pair's loss is −log σ(u₀·v) − Σₖ log σ(−uₖ·v), u the rows of this head's table for its neighbour and the K words
    drawn by chance, the targets' ids (n, 1 + K). A word drawn that is the neighbour itself does not count. Each term is
    a cross-entropy over the two logits (0, u·v), so its logarithm and exponential have the bits of that op.
    Source: Mikolov et al., arXiv:1310.4546, equation 4; word2vec.c.
    """

    def __init__(self, table: Parameter) -> None:
        self.table = table

    def parameters(self) -> list[Parameter]:
        return [self.table]

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, Any]:
        (vectors,) = x
        if not ctx.training:
            ids = _ids(ctx)
            ctx.tally["loss"], _ = _judged(_rows(vectors), self._looked_up(ids), ids, False)
        return (), vectors

    def backward(self, dy: Flow, saved: Any, ctx: Context) -> Flow:
        ids, v = _ids(ctx), _rows(saved)
        u = self._looked_up(ids)
        ctx.tally["loss"], slopes = _judged(v, u, ids, True)
        gradient = ctx.grad(self.table)
        if not ctx.accumulate:
            gradient[...] = 0.0
        du = slopes[:, :, None] * v[:, None, :]
        embedding.backward(du.reshape(-1, v.shape[1]), ids.reshape(-1), gradient)
        dv = joined([slopes[:, k, None] * u[:, k] for k in range(ids.shape[1])])
        return (dv.reshape(saved.shape).astype(saved.dtype, copy=False),)

    def _looked_up(self, ids: Array) -> Array:
        """Rows of the table. Shapes: (n, 1 + K) -> (n, 1 + K, C)."""
        return wide(embedding.forward(ids, self.table.data))


def _ids(ctx: Context) -> Array:
    assert ctx.batch is not None, "a head reads its targets from the context"
    return ctx.batch.targets["ids"]


def _rows(vectors: Array) -> Array:
    """Shapes: (n, 1, C) -> (n, C)."""
    return wide(vectors.reshape(-1, vectors.shape[2]))


def _judged(v: Array, u: Array, ids: Array, gradient: bool) -> tuple[Any, Array]:
    """(summed loss, with `gradient` its slope in each u·v). Shapes: (n, C), (n, 1 + K, C), (n, 1 + K) -> (n, 1 + K)."""
    xp, scores = module_of(v), _products(v, u)
    logits = xp.zeros((scores.size, 2), scores.dtype)
    logits[:, 1] = scores.reshape(-1)
    near, counts = xp.zeros(ids.shape, xp.int32), ids != ids[:, :1]
    near[:, 0], counts[:, 0] = 1, True
    losses = crossentropy.rows(logits, near.reshape(-1), counts.reshape(-1), gradient)
    return crossentropy.summed(losses, 1), logits[:, 1].reshape(ids.shape)


def _products(v: Array, u: Array) -> Array:
    """Inner products u·v: a matrix product by ones has the bits of its stated order, and needs half the time that
    halves added to each other take. Shapes: (n, C), (n, k, C) -> (n, k).
    """
    terms = (u * v[:, None, :]).reshape(-1, v.shape[1])
    return matmul.product(terms, module_of(v).ones((v.shape[1], 1), v.dtype)).reshape(u.shape[:2])
