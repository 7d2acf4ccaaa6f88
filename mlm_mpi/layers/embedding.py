"""Token and position embeddings."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mlm_mpi import order
from mlm_mpi.backend.arrays import module_of
from mlm_mpi.data.batch import Batch
from mlm_mpi.layers.base import Context, Flow
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.linear import flat
from mlm_mpi.layers.norm import LayerNorm, RMSNorm
from mlm_mpi.ops import embedding, linear
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import Parameter


def token_table(
    name: str, vocabulary: int, width: int, init: float | str, tied: bool, shares: int = order.MOST
) -> Parameter:
    """A row of C numbers for each token. `tied`: of embedding and head; `shares`: at most, of sums over tokens."""
    layout = Layout((vocabulary, width), ("tp", None), shares=order.shares(vocabulary, shares))
    return Parameter(name, layout, init, decay=True, tied=tied)


def _looked_up(table: Parameter, ids: Any, ctx: Context) -> Any:
    """Its rows (B, T, C). One rank of tp has a row, the others -0, which changes nothing that is added to it."""
    if ctx.tp.size == 1:
        return embedding.forward(ids, table.data)
    here, local = _here(table, ids, ctx)
    y = embedding.forward(module_of(ids).where(here, local, 0), table.data)
    y[~here] = -0.0
    return ctx.left(y, "the embedding of tokens")


def _here(table: Parameter, ids: Any, ctx: Context) -> tuple[Any, Any]:
    """(which ids lie in my part of a table, and where there)."""
    box = table.layout.box(ctx.mesh)
    return (ids >= box.starts[0]) & (ids < box.stops[0]), ids - box.starts[0]


def _mine(table: Parameter, rows: Any, ids: Any, ctx: Context) -> tuple[Any, Any]:
    """Gradients whose ids lie in my part of a table, and where they lie there. Shapes: (N, C), (N,) -> the same."""
    if ctx.tp.size == 1:
        return rows, ids
    here, local = _here(table, ids, ctx)
    return rows[here], local[here]


class TokenEmbedding:
    """Shapes: the batch's ids (B, T) -> (B, T, C).

    A tied token table is the head's too, and its gradient has two sums over the micro-batches of a lane, head and
    embedding, each micro-batch complete before it is added. They become one when the lane closes, element by element:
    head + embedding. So the stages of a pipeline that hold the table at its two ends need not take turns: each forms
    its own sum, and they are joined once a lane. A rank that holds some rows of the table (tp) sums the ids that lie
    there; columns are summed one by one, so that ranks with other positions can bring theirs together by columns.
    """

    def __init__(
        self, name: str, vocabulary: int, width: int, std: float, dropout: float, tied: bool = True,
        shares: int = order.MOST, norm: RMSNorm | LayerNorm | None = None, table: Parameter | None = None,
    ) -> None:  # fmt: skip
        """`norm`: of what is looked up; None: there is none. `table`: another embedding's, which looks up first."""
        self.tokens = table or token_table(f"{name}.tokens", vocabulary, width, std, tied, shares)
        self.norm = norm
        self.drop = Dropout(name, dropout)

    def parameters(self) -> list[Parameter]:
        return [self.tokens, *([] if self.norm is None else self.norm.parameters())]

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, Any]:
        assert ctx.batch is not None, "the first part reads its ids from the context"
        ids = ctx.batch.inputs["ids"]
        y, s_norm = self._placed(_looked_up(self.tokens, ids, ctx), ctx), None
        if self.norm is not None:
            y, s_norm = self.norm.forward(y, ctx)
        y, factors = self.drop.forward(y, ctx)
        return (y,), (ids, s_norm, factors)

    def _placed(self, y: Any, ctx: Context) -> Any:
        """What the model adds for positions: nothing. Shapes: (B, T, C) -> the same, may be y itself."""
        return y

    def _shown(self, rows: Any, ids: Any, ctx: Context) -> tuple[Any, Any]:
        """Gradients and ids of the positions where rows of the table were taken: all. Shapes: (N, C), (N,)."""
        return rows, ids

    def backward(self, dy: Flow, saved: Any, ctx: Context) -> Flow:
        ctx.owe(lambda at: self._backward(dy[0], saved, at))
        return ()

    def _backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        """All of it; returns the gradient before norm and dropout. Adds to a tied table's, whatever `ctx.accumulate`
        says: after the head.

        In a lane of several micro-batches the sum of a tied table lies in `ctx.lane` until the last. It begins with -0,
        which changes nothing that is added to it, so that a lane of one needs none.
        """
        ids, s_norm, factors = saved
        dx = self.drop.backward(dy, factors, ctx)
        if self.norm is not None:
            dx = self.norm.backward(dx, s_norm, ctx)
        dx = ctx.entered(dx, "the gradient of the embedding")
        if not self.tokens.frozen:
            self._add_tokens(flat(dx), ids.reshape(-1), ctx)
        return dx

    def _add_tokens(self, rows: Any, ids: Any, ctx: Context) -> None:
        """The gradient of the table. Shapes: (N, C), (N,)."""
        tokens, summed = ctx.grad(self.tokens), ctx.lane.get(self.tokens)
        if not self.tokens.tied and not ctx.accumulate:
            tokens[...] = 0.0
        rows, ids = _mine(self.tokens, *self._shown(rows, ids, ctx), ctx)
        embedding.backward(rows, ids, tokens if summed is None else summed)
        if summed is not None and ctx.closes:
            tokens += summed


class Embedding(TokenEmbedding):
    """Tokens and learned positions. Shapes: the batch's ids (B, T) -> (B, T, C)."""

    def __init__(
        self, name: str, vocabulary: int, context: int, width: int, std: float, dropout: float, shares: int = order.MOST
    ) -> None:
        """`shares`: at most so many has a sum over the vocabulary."""
        super().__init__(name, vocabulary, width, std, dropout, shares=shares)
        self.positions = Parameter(f"{name}.positions", Layout((context, width)), std)

    def parameters(self) -> list[Parameter]:
        return [self.tokens, self.positions]

    def _placed(self, y: Any, ctx: Context) -> Any:
        start = ctx.cache.length if ctx.cache is not None else 0
        if ctx.cuts_positions:
            start = ctx.tp.rank * y.shape[1]
        y += self.positions.data[start : start + y.shape[1]]
        return y

    def _backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        dx, positions = super()._backward(dy, saved, ctx), ctx.grad(self.positions)
        batch, length, _ = dx.shape
        linear.bias_gradient(dx.reshape(batch, -1), positions[:length].reshape(-1), ctx.accumulate)  # Σ over the batch
        if not ctx.accumulate:
            positions[length:] = 0.0
        return dx


class PlacedEmbedding(TokenEmbedding):
    """Tokens and learned positions, of several texts in a row too. Shapes: the batch's ids (B, T) -> (B, T, C).

    The batch may also have `places` (B, T) int32, each position's in its text; by default its number in the row.
    """

    def __init__(
        self, name: str, vocabulary: int, context: int, width: int, std: float, dropout: float,
        shares: int = order.MOST, norm: LayerNorm | None = None, table: Parameter | None = None,
    ) -> None:  # fmt: skip
        """As of `TokenEmbedding`."""
        super().__init__(name, vocabulary, width, std, dropout, shares=shares, norm=norm, table=table)
        self.positions = Parameter(f"{name}.positions", Layout((context, width)), std)

    def parameters(self) -> list[Parameter]:
        return [*super().parameters(), self.positions]

    def _placed(self, y: Any, ctx: Context) -> Any:
        y += embedding.forward(ctx.positions(_places(ctx)), self.positions.data)
        return y

    def _backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        dx = super()._backward(dy, saved, ctx)
        self._add(self.positions, flat(dx), _places(ctx).reshape(-1), ctx)
        return dx

    def _add(self, table: Parameter, rows: Any, ids: Any, ctx: Context) -> None:
        if table.frozen:
            return
        gradient = ctx.grad(table)
        if not ctx.accumulate:
            gradient[...] = 0.0
        embedding.backward(rows, ids, gradient)


class PairEmbedding:
    """What a decoder reads and what its encoder does, of one table, each with positions of its own.

    Shapes: the batch's ids (B, T) and its source's (B, S) -> (B, T, C), (B, S, C). Both are looked up in front of the
    encoder, so that the table lies at the two ends of the model, as any tied one. A batch that has no source goes on
    where a cache is, which has what was made of it. With `words` a third array, the normalised rows of the source's
    tokens (B, S, C).
    """

    def __init__(
        self, name: str, vocabulary: int, context: int, width: int, std: float, dropout: float,
        shares: int = order.MOST, words: LayerNorm | None = None,
    ) -> None:  # fmt: skip
        """`context`: positions of either. `words`: the norm of rows that go on by themselves; None: they do not."""
        sizes = vocabulary, context, width, std, dropout, shares
        self.target = PlacedEmbedding(
            f"{name}.target", *sizes, table=token_table(f"{name}.tokens", vocabulary, width, std, True, shares)
        )
        self.tokens = self.target.tokens
        self.source = PlacedEmbedding(f"{name}.source", *sizes, table=self.tokens)
        self.words = None
        if words is not None:
            self.words = TokenEmbedding(f"{name}.words", vocabulary, width, std, 0.0, norm=words, table=self.tokens)

    def parameters(self) -> list[Parameter]:
        words = [] if self.words is None else self.words.parameters()[1:]
        return [self.tokens, self.target.positions, self.source.positions, *words]

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, Any]:
        assert ctx.batch is not None, "the first part reads its ids from the context"
        target, s_target = self.target.forward(x, ctx)
        if ctx.batch.source is None:
            return target, None
        source, s_source = self.source.forward(x, ctx.of_source())
        if self.words is None:
            return (*target, *source), (s_target, s_source, None)
        words, s_words = self.words.forward(x, ctx.of_source())
        return (*target, *source, *words), (s_target, s_source, s_words)

    def backward(self, dy: Flow, saved: Any, ctx: Context) -> Flow:
        ctx.owe(lambda at: self._backward(dy, saved, at))
        return ()

    def _backward(self, dy: Flow, saved: Any, ctx: Context) -> None:
        """The lane closes once, when all have added to the table."""
        now = replace(ctx, later=None)
        there = replace(now.of_source(), closes=False)
        if self.words is not None:
            self.words.backward(dy[2:], saved[2], there)
        self.source.backward(dy[1:2], saved[1], there)
        self.target.backward(dy[:1], saved[0], now)


class EncoderEmbedding(PlacedEmbedding):
    """Tokens, positions and segments, normalised. Shapes: the batch's ids (B, T) -> (B, T, C).

    The batch may also have, each (B, T): `places`; `segments` int32, by default 0; `hidden` bool: there a vector of its
    own stands in the token's place, which is the row of BERT's [MASK], so that any tokenizer will do.

    To each position is added a vector for the 2, … `ngrams` tokens that end there, a row of a table of `buckets` that a
    hash of them names. A hidden token is hidden there too, and no n-gram reaches into another text.
    Sources: Devlin et al., arXiv:1810.04805; n-grams: Bojanowski et al., arXiv:1607.04606, and before a transformer
    Pagnoni et al., arXiv:2412.09871, section 3.2.1.
    """

    def __init__(
        self, name: str, vocabulary: int, context: int, segments: int, width: int, std: float, dropout: float,
        norm: LayerNorm, shares: int = order.MOST, ngrams: int = 1, buckets: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(name, vocabulary, context, width, std, dropout, shares, norm)
        self.segments = Parameter(f"{name}.segments", Layout((segments, width)), std)
        self.hidden = Parameter(f"{name}.hidden", Layout((1, width)), std)
        self.vocabulary, self.sizes = vocabulary, range(2, ngrams + 1)
        self.ngrams = token_table(f"{name}.ngrams", buckets, width, "zeros", False, shares) if self.sizes else None

    def parameters(self) -> list[Parameter]:
        ngrams = [] if self.ngrams is None else [self.ngrams]
        return [*super().parameters(), self.segments, self.hidden, *ngrams]

    def _placed(self, y: Any, ctx: Context) -> Any:
        assert ctx.batch is not None
        if "hidden" in ctx.batch.inputs:
            y[ctx.positions(ctx.batch.inputs["hidden"])] = self.hidden.data[0]
        y = super()._placed(y, ctx)
        y += embedding.forward(ctx.positions(_segments(ctx.batch)), self.segments.data)
        if self.ngrams is not None:
            for ids, reaches in self._buckets(ctx, self.ngrams):
                found = _looked_up(self.ngrams, ids, ctx)
                y += found * ctx.positions(reaches)[:, :, None]
        return y

    def _buckets(self, ctx: Context, table: Parameter) -> Iterator[tuple[Any, Any]]:
        """For n-grams of each size: their rows of the table, (B, T) int32, and where a text has so many tokens, (B, T)
        bool."""
        assert ctx.batch is not None
        ids, places, hidden = ctx.batch.inputs["ids"], _places(ctx), ctx.batch.inputs.get("hidden")
        xp = module_of(ids)
        read = ids if hidden is None else xp.where(hidden, self.vocabulary, ids)
        seen = read.astype(xp.uint32)
        keys = _mixed(seen)
        for size in self.sizes:
            before = xp.zeros_like(seen)
            before[:, size - 1 :] = seen[:, : seen.shape[1] - size + 1]
            keys = _mixed(keys ^ before)
            yield (keys % xp.uint32(table.layout.shape[0])).astype(xp.int32), places >= size - 1

    def _shown(self, rows: Any, ids: Any, ctx: Context) -> tuple[Any, Any]:
        assert ctx.batch is not None
        if "hidden" not in ctx.batch.inputs:
            return rows, ids
        shown = ~ctx.batch.inputs["hidden"].reshape(-1)
        return rows[shown], ids[shown]

    def _backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        assert ctx.batch is not None
        dx = super()._backward(dy, saved, ctx)
        rows, segments, hidden = flat(dx), _segments(ctx.batch), ctx.batch.inputs.get("hidden")
        self._add(self.segments, rows, segments.reshape(-1), ctx)
        some = rows[:0] if hidden is None else rows[hidden.reshape(-1)]
        self._add(self.hidden, some, module_of(segments).zeros(len(some), segments.dtype), ctx)
        if self.ngrams is not None:
            self._add_ngrams(self.ngrams, rows, ctx)
        return dx

    def _add_ngrams(self, table: Parameter, rows: Any, ctx: Context) -> None:
        if table.frozen:
            return
        gradient = ctx.grad(table)
        if not ctx.accumulate:
            gradient[...] = 0.0
        for ids, reaches in self._buckets(ctx, table):
            whole = reaches.reshape(-1)
            mine, local = _mine(table, rows[whole], ids.reshape(-1)[whole], ctx)
            embedding.backward(mine, local, gradient)


def _mixed(keys: Any) -> Any:
    """uint32 whose every bit depends on all bits of the one given: the end of MurmurHash3 (Appleby, 2011)."""
    xp = module_of(keys)
    keys = (keys ^ (keys >> xp.uint32(16))) * xp.uint32(0x85EBCA6B)
    keys = (keys ^ (keys >> xp.uint32(13))) * xp.uint32(0xC2B2AE35)
    return (keys ^ (keys >> xp.uint32(16))) + xp.uint32(1)  # a zero stays none


def _places(ctx: Context) -> Any:
    """Of each position in its text, (B, T) int32, behind those that a cache has."""
    assert ctx.batch is not None
    ids, places = ctx.batch.inputs["ids"], ctx.batch.inputs.get("places")
    if places is not None:
        return places
    xp, start = module_of(ids), ctx.cache.length if ctx.cache is not None else 0
    return xp.zeros_like(ids) + xp.arange(start, start + ids.shape[1], dtype=ids.dtype)


def _segments(batch: Batch) -> Any:
    """Of each position, (B, T) int32."""
    ids = batch.inputs["ids"]
    return batch.inputs["segments"] if "segments" in batch.inputs else module_of(ids).zeros_like(ids)
