"""The head of a classifier: of a text, or of each of some positions, one of L labels."""

from typing import Any, Literal

from mlm_mpi.backend.arrays import module_of, wide
from mlm_mpi.layers.base import Array, Context, Flow, Layer
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.head import put_back, taken_rows
from mlm_mpi.layers.linear import Linear, flat
from mlm_mpi.ops import cast, crossentropy, gelu, linear
from mlm_mpi.params.store import Parameter

Pooling = Literal["first", "mean", "token"]


class ClassHead:
    """Shapes: (1, T, C), texts one behind the other -> the tally's "loss", summed over texts, in nats.

    `first` takes the first position of a text, `mean` the mean of all of them, and `token` the positions that the
    targets' `at` (M,) names, each of which has a label. Then GELU(norm(x) W + b) W' + b', with dropout before either
    product: a text's logits. Targets: classes (M,) int32, and weights (M,) float32 of their losses, 1 where left out.
    Outside training the tally also has "outcomes" (M, 4) float64: label, found label, its probability, the label's, and
    what the targets' `begins` (M,) says, where they have it (which positions are the first of their text); or, where
    targets have no classes, "probabilities" (M, L) alone.
    Source: RoBERTa's head (Liu et al., arXiv:1907.11692), with ELECTRA's GELU (Clark et al., arXiv:2003.10555).
    """

    def __init__(
        self, width: int, labels: int, norm: Layer | None, pooling: Pooling = "first", dropout: float = 0.0,
        std: float = 0.02, smoothing: float = 0.0, name: str = "classes",
    ) -> None:  # fmt: skip
        """`norm`: the final one, where blocks have theirs in front. `smoothing`: the part of a target that all labels
        share (Szegedy et al., arXiv:1512.00567)."""
        self.norm, self.pooling, self.smoothing = norm, pooling, smoothing
        self.drops = Dropout(f"{name}.drop1", dropout), Dropout(f"{name}.drop2", dropout)
        self.dense, self.out = Linear(f"{name}.dense", width, width, std), Linear(f"{name}.out", width, labels, std)
        self.out.weight.matrices = None  # a head is none of the hidden layers' matrices

    def parameters(self) -> list[Parameter]:
        norm = [] if self.norm is None else self.norm.parameters()
        return [*norm, *self.dense.parameters(), *self.out.parameters()]

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, Any]:
        (hidden,) = x
        if not ctx.training:
            logits = wide(flat(self._logits(self._pooled(hidden, ctx), ctx.uncut())[0]))
            assert ctx.batch is not None, "a head reads its targets from the context"
            tell = self._tell if "classes" in ctx.batch.targets else _tell_probabilities
            tell(logits, ctx)
        return (), hidden

    def backward(self, dy: Flow, saved: Any, ctx: Context) -> Flow:
        cut, ctx = ctx, ctx.uncut()
        logits, kept = self._logits(self._pooled(saved, cut), ctx)
        ctx.tally["loss"], dlogits = self._loss(wide(flat(logits)), ctx)
        dpooled = self._logits_backward(rounded(dlogits, logits.dtype).reshape(logits.shape), kept, ctx)
        return (self._pooled_backward(dpooled, saved, cut),)

    def logits(self, hidden: Array, ctx: Context) -> Array:
        """Shapes: (1, t, C) -> (1, M, L)."""
        return self._logits(self._pooled(hidden, ctx), ctx.uncut())[0]

    def logits_backward(self, dlogits: Array, hidden: Array, ctx: Context) -> Array:
        """The gradient of what `logits` was given. Shapes: as `logits`."""
        kept = self._logits(self._pooled(hidden, ctx), ctx.uncut())[1]
        return self._pooled_backward(self._logits_backward(dlogits, kept, ctx.uncut()), hidden, ctx)

    def _tell(self, logits: Array, ctx: Context) -> None:
        targets = self._targets(ctx)[0]
        found = logits.argmax(axis=1)
        losses, probabilities = _softmax(logits, targets)
        rows = module_of(logits).arange(len(targets))
        assert ctx.batch is not None
        begins = [ctx.batch.targets["begins"]] if "begins" in ctx.batch.targets else []
        outcomes = targets, found, probabilities[rows, found], probabilities[rows, targets], *begins
        ctx.tally["loss"] = crossentropy.summed(losses, 1)  # of targets as they are, whatever their weights are
        ctx.tally["outcomes"] = module_of(logits).stack([column.astype("f8") for column in outcomes], axis=1)

    def _targets(self, ctx: Context) -> tuple[Array, Array | None]:
        assert ctx.batch is not None, "a head reads its targets from the context"
        return ctx.batch.targets["classes"], ctx.batch.targets.get("weights")

    def _loss(self, logits: Array, ctx: Context) -> tuple[Any, Array]:
        """(weighted, summed loss, its gradient). Shapes: (M, L) -> (), (M, L)."""
        targets, weights = self._targets(ctx)
        rows, smoothing = module_of(logits).arange(len(targets)), self.smoothing
        flattened = _above_mean(logits, rows, targets) * smoothing if smoothing else None
        losses = crossentropy.rows(logits, targets, None, True)
        if flattened is not None:
            losses += flattened
            logits[rows, targets] += smoothing
            logits -= smoothing / logits.shape[1]
        if weights is not None:
            losses *= weights
            logits *= weights[:, None]
        return crossentropy.summed(losses, 1), logits

    def _logits(self, pooled: Array, ctx: Context) -> tuple[Array, Any]:
        """Shapes: (1, M, C) -> (1, M, L)."""
        x, s_norm = (pooled, None) if self.norm is None else self.norm.forward(pooled, ctx)
        x, s_drop1 = self.drops[0].forward(x, ctx)
        hidden, pre = self.dense.forward_gelu(x, ctx)
        hidden, s_drop2 = self.drops[1].forward(hidden, ctx)
        return self.out.forward(hidden, ctx)[0], (s_norm, s_drop1, x, pre, s_drop2, hidden)

    def _logits_backward(self, dlogits: Array, kept: Any, ctx: Context) -> Array:
        s_norm, s_drop1, x, pre, s_drop2, hidden = kept
        dhidden = self.drops[1].backward(self.out.backward(dlogits, hidden, ctx), s_drop2, ctx)
        dpre = gelu.backward(flat(dhidden), flat(pre)).reshape(dhidden.shape)
        dx = self.drops[0].backward(self.dense.backward(dpre, x, ctx), s_drop1, ctx)
        return dx if self.norm is None else self.norm.backward(dx, s_norm, ctx)

    def _pooled(self, hidden: Array, ctx: Context) -> Array:
        """Shapes: (1, t, C) -> (1, M, C), on each tp rank."""
        if self.pooling == "token":
            return taken_rows(hidden, ctx)[0]
        assert ctx.batch is not None
        spans, whole = ctx.batch.spans(), ctx.entered(hidden, "the head's inputs")
        if self.pooling == "first":
            return module_of(whole).stack([whole[:, start] for start, _ in spans], axis=1)
        pooled = module_of(whole).empty((1, len(spans), whole.shape[2]), wide(whole[:, :0]).dtype)
        for number, (start, stop) in enumerate(spans):
            linear.bias_gradient(whole[0, start:stop], pooled[0, number], False)  # Σ over positions
            pooled[0, number] /= stop - start
        return rounded(pooled, whole.dtype)

    def _pooled_backward(self, dpooled: Array, hidden: Array, ctx: Context) -> Array:
        if self.pooling == "token":
            return put_back(dpooled, hidden, ctx)
        assert ctx.batch is not None
        length = hidden.shape[1] * (ctx.tp.size if ctx.cuts_positions else 1)
        dpooled = wide(dpooled)
        whole = module_of(dpooled).zeros((1, length, hidden.shape[2]), dpooled.dtype)
        for number, (start, stop) in enumerate(ctx.batch.spans()):
            if self.pooling == "first":
                whole[:, start] = dpooled[:, number]
            else:
                whole[:, start:stop] = dpooled[:, number : number + 1] / (stop - start)
        return ctx.positions(rounded(whole, hidden.dtype))


def rounded(x: Array, dtype: Any) -> Array:
    """In an element type that may be narrower; itself if it has that."""
    if x.dtype == dtype:
        return x
    out = module_of(x).empty(x.shape, dtype)
    cast.to(x, out)
    return out


def _tell_probabilities(logits: Array, ctx: Context) -> None:
    ctx.tally["probabilities"] = _softmax(logits, module_of(logits).zeros(len(logits), "i4"))[1]


def _above_mean(logits: Array, rows: Array, targets: Array) -> Array:
    """How far a target's logit is above the mean of its row, float64. Shapes: (M, L) -> (M,)."""
    exact, total = logits.astype("f8"), module_of(logits).zeros(len(logits))
    for column in range(logits.shape[1]):  # in this order on any machine
        total = total + exact[:, column]
    return exact[rows, targets] - total / logits.shape[1]


def _softmax(logits: Array, targets: Array) -> tuple[Array, Array]:
    """(losses, probabilities), over the logits. Shapes: (M, L), (M,) -> (M,), (M, L)."""
    losses = crossentropy.rows(logits, targets, None, True)  # leaves probabilities, less 1 at the targets
    logits[module_of(logits).arange(len(targets)), targets] += 1.0
    return losses, logits
