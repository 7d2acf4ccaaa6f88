"""The head that learns which of two answers is preferred: direct preference optimisation."""

from mlm_mpi.backend.arrays import module_of, wide
from mlm_mpi.layers.base import Array, Context, Trunk
from mlm_mpi.layers.head import TokenHead
from mlm_mpi.ops import crossentropy


class PreferenceHead(TokenHead):
    """Shapes: (2P, T, C), of each pair the chosen text and the rejected one -> the tally's "loss", summed over pairs.

    A pair's loss is −log σ(m) nats with the margin m = β ((log π(c) − log ρ(c)) − (log π(r) − log ρ(r))), where log π
    is the sum over a text's targets, and log ρ what the weights said of it with which the run began.
    Targets: ids and mask (2P, T) of a `TokenHead`, reference (P, 2) float64 of log ρ, pairs (P,) bool: which count.
    Outside training the tally also has "outcomes" (pairs that count, 4) float64: log π of both, log ρ of both.
    Source: Rafailov et al., arXiv:2305.18290, equation 7.
    """

    def __init__(self, trunk: Trunk, beta: float) -> None:
        super().__init__(trunk)
        self.beta = beta

    def tell(self, n: Array, ctx: Context) -> None:
        assert ctx.batch is not None
        said, reference = self._said(n, ctx), ctx.batch.targets["reference"]
        ctx.tally["loss"], _ = self._compared(said, n, ctx)
        ctx.tally["outcomes"] = module_of(n).concatenate([said, reference], axis=1)[: ctx.batch.count]

    def learn(self, n: Array, ctx: Context) -> Array:
        ctx.tally["loss"], slopes = self._compared(self._said(n, ctx), n, ctx)
        weights = module_of(n).repeat(slopes.reshape(-1), n.shape[1])
        return self._loss_and_grad(n, ctx, weights)[1]

    def _said(self, n: Array, ctx: Context) -> Array:
        """log π of each text, float64; a text's sum is rounded once. Shapes: (2P, T, C) -> (P, 2)."""
        texts = [crossentropy.summed(losses, 1) for losses in self.losses(n, ctx)]
        return -module_of(n).stack(texts).reshape(-1, 2)

    def _compared(self, said: Array, n: Array, ctx: Context) -> tuple[Array, Array]:
        """(summed loss, its slopes by the cross-entropies of the texts). Shapes: (P, 2) -> (), (P, 2).

        −log σ(m) is the cross-entropy of the first of two classes with logits m and 0.
        """
        assert ctx.batch is not None, "a head reads its targets from the context"
        xp, counted = module_of(n), ctx.batch.targets["pairs"]
        gains = said - ctx.batch.targets["reference"]
        logits = xp.zeros(said.shape, wide(n[:0]).dtype)
        logits[:, 0] = self.beta * (gains[:, 0] - gains[:, 1])
        losses = crossentropy.rows(logits, xp.zeros(len(said), "i4"), counted, True)  # leaves σ(m) − 1 in column 0
        return crossentropy.summed(losses, 1), -self.beta * logits[:, :1] * xp.array([1, -1], logits.dtype)
