"""The order of additions holds on a mesh: what tensor-parallel ranks would compute, on cut operands, computed here one
after another and joined by the tree, has the bits of the uncut model.
"""

import inspect
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numerics import same_bits
from whole import Whole, batch_of

from mlm_mpi import order
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.grouped import queries_and_key, unit_of
from mlm_mpi.layers.linear import Linear, flat
from mlm_mpi.layers.norm import LayerNorm, RMSNorm
from mlm_mpi.models import gpt, llama
from mlm_mpi.ops import attention, crossentropy, dropout, layernorm, linear, matmul, rotary
from mlm_mpi.order import joined
from mlm_mpi.params.store import FlatStore

VOCABULARY, LENGTH, ROWS = 8192, 64, 2
SETTINGS = gpt.Settings(
    layers=8, width=384, heads=8, context=LENGTH, feed_forward=1536, dropout=0.1, init_std=0.02
)  # fmt: skip
DECODER = llama.Settings(
    layers=2, width=128, heads=8, key_value_heads=4, context=LENGTH, dropout=0.1, qk_norm=True, embedding_norm=True,
    tied=True, logit_cap=4.0, window=20, full_every=2,
)  # fmt: skip


@dataclass(frozen=True)
class Rank:
    """One of `size` tensor-parallel ranks: what a Layout needs of a mesh, and what it cuts of a parameter."""

    number: int
    ranks: int

    def size(self, axis):
        return self.ranks if axis == "tp" else 1

    def coord(self, axis):
        return self.number if axis == "tp" else 0

    def of(self, parameter):
        return np.ascontiguousarray(self.mine(parameter, parameter.data))

    def mine(self, parameter, array):
        return array[parameter.layout.slices(self)]


class Cut:
    """Forward and backward of a GPT as `ranks` tensor-parallel ranks compute them; gradients by (rank, parameter)."""

    def __init__(self, whole: Whole, ranks: int) -> None:
        self.whole, self.ranks = whole, [Rank(number, ranks) for number in range(ranks)]
        self.gradients: dict[tuple[int, str], np.ndarray] = {}

    def loss_and_grad(self, ids, targets, ctx):
        batch = batch_of(ids, targets)
        ctx = replace(ctx, training=True, batch=batch, tally={}, gradients=_Same(self))
        embedding, *blocks, head = self.whole.chain.parts
        (x,), s_embedding = embedding.forward((), ctx)
        saved = []
        for block in blocks:
            x, kept = self.block(block, x, ctx)
            saved.append(kept)
        dx = self.head(head, x, targets, ctx)
        for block, kept in zip(reversed(blocks), reversed(saved), strict=True):
            dx = self.block_backward(block, dx, kept, ctx)
        embedding.backward((dx,), s_embedding, ctx)
        return ctx.tally["loss"]

    def grad(self, rank, parameter):
        """Where a rank keeps the gradient of its part of a parameter."""
        key = (rank.number, parameter.name)
        if key not in self.gradients:
            self.gradients[key] = np.full(parameter.layout.local_shape(rank), np.nan, "f4")
        return self.gradients[key]

    # ---- blocks

    def block(self, block, x, ctx):
        n1, s_norm1 = block.norm1.forward(x, ctx)
        middle_, s_mixer = self.mixer(block.mixer, n1, x, ctx)
        n2, s_norm2 = block.norm2.forward(middle_, ctx)
        y, s_mlp = self.mlp(block.mlp, n2, middle_, ctx)
        return y, (s_norm1, s_mixer, s_norm2, s_mlp)

    def block_backward(self, block, dy, saved, ctx):
        s_norm1, s_mixer, s_norm2, s_mlp = saved
        d = block.norm2.backward(self.mlp_backward(block.mlp, dy, s_mlp, ctx), s_norm2, ctx, add=dy)
        return block.norm1.backward(self.mixer_backward(block.mixer, d, s_mixer, ctx), s_norm1, ctx, add=d)

    def row_parallel(self, layer, parts, residual, ctx):
        """Every rank's columns of x times its rows of W, joined; then bias, dropout and residual."""
        shares = layer.shares_in // len(self.ranks)
        partials = [
            matmul.product(flat(x), rank.of(layer.weight), shares) for rank, x in zip(self.ranks, parts, strict=True)
        ]
        tree, base, draw = joined(partials), flat(residual), layer.drop.draw(ctx)
        bias = np.float32(-0.0) if layer.bias is None else layer.bias.data  # -0 leaves what it is added to alone
        if draw is None:
            return ((bias + base) + tree).reshape(residual.shape), None
        return dropout.forward((bias + tree).reshape(residual.shape), draw, residual), draw

    def row_parallel_backward(self, layer, dy, parts, draw, ctx):
        """(dy after dropout, flat); gradients of every rank's rows of W."""
        d = flat(layer.drop.backward(dy, draw, ctx))
        for rank, x in zip(self.ranks, parts, strict=True):
            dw, db = self.grad(rank, layer.weight), None if layer.bias is None else self.grad(rank, layer.bias)
            linear.backward_weight(d, flat(x), dw, db, ctx.accumulate, ctx.pieces(dy))
        return d

    def mixer(self, mixer, x, residual, ctx):
        kept, outs = [], []
        for rank in self.ranks:
            weight, bias = rank.of(mixer.qkv.weight), rank.of(mixer.qkv.bias)
            qkv = linear.forward(flat(x), weight.reshape(weight.shape[0], -1), bias.reshape(-1))
            q, k, v = self.heads(mixer, qkv, x.shape[0])
            draw, share = self.drawn(mixer, rank, q, ctx), order.share_length(x.shape[1])
            o, lse = attention.forward(q, k, v, draw=draw, share=share)
            outs.append(o.reshape(*x.shape[:2], -1))
            kept.append((qkv, o, lse, draw, share))
        y, draw = self.row_parallel(mixer.project, outs, residual, ctx)
        return y, (x, kept, outs, draw)

    def mixer_backward(self, mixer, dy, saved, ctx):
        x, kept, outs, draw = saved
        d = self.row_parallel_backward(mixer.project, dy, outs, draw, ctx)
        partials = []
        for rank, (qkv, o, lse, drop, share) in zip(self.ranks, kept, strict=True):
            do = linear.backward_input(d, rank.of(mixer.project.weight)).reshape(o.shape)
            dqkv = np.empty_like(qkv)
            batch = x.shape[0]
            attention.backward(
                do, *self.heads(mixer, qkv, batch), o, lse, *self.heads(mixer, dqkv, batch), draw=drop, share=share
            )
            weight, bias = self.grad(rank, mixer.qkv.weight), self.grad(rank, mixer.qkv.bias)
            linear.backward_weight(
                dqkv, flat(x), weight.reshape(weight.shape[0], -1), bias.reshape(-1), ctx.accumulate, ctx.pieces(dy)
            )
            w = rank.of(mixer.qkv.weight)
            partials.append(
                linear.backward_input(
                    dqkv, w.reshape(w.shape[0], -1), shares=mixer.qkv.shares_out // len(self.ranks), segments=3
                )
            )
        return joined(partials).reshape(dy.shape)

    def heads(self, mixer, qkv, batch):
        mine = mixer.heads // len(self.ranks)
        parts = qkv.reshape(batch, -1, 3, mine, qkv.shape[1] // (3 * mine)).transpose(2, 0, 3, 1, 4)
        return parts[0], parts[1], parts[2]

    def drawn(self, mixer, rank, q, ctx):
        """The mask of this rank's heads: a cut of that of (B, H, T, T)."""
        draw = mixer.drop.draw(ctx)
        if draw is None:
            return None
        _, mine, length, _ = q.shape
        one = length * length
        return draw._replace(start=rank.number * mine * one, strides=(mixer.heads * one, one, length, 1))

    def mlp(self, mlp, x, residual, ctx):
        pairs = [linear.forward_gelu(flat(x), rank.of(mlp.up.weight), rank.of(mlp.up.bias)) for rank in self.ranks]
        hidden = [h.reshape(*x.shape[:2], -1) for h, _ in pairs]
        y, draw = self.row_parallel(mlp.down, hidden, residual, ctx)
        return y, (x, [pre for _, pre in pairs], hidden, draw)

    def mlp_backward(self, mlp, dy, saved, ctx):
        x, pres, hidden, draw = saved
        d = self.row_parallel_backward(mlp.down, dy, hidden, draw, ctx)
        partials = []
        for rank, pre in zip(self.ranks, pres, strict=True):
            dpre = linear.backward_input(d, rank.of(mlp.down.weight), pre)
            dw, db = self.grad(rank, mlp.up.weight), self.grad(rank, mlp.up.bias)
            linear.backward_weight(dpre, flat(x), dw, db, ctx.accumulate, ctx.pieces(dy))
            partials.append(
                linear.backward_input(dpre, rank.of(mlp.up.weight), shares=mlp.up.shares_out // len(self.ranks))
            )
        return joined(partials).reshape(dy.shape)

    # ---- the vocabulary-parallel head

    def head(self, head, x, targets, ctx):
        n, s_norm = head.norm.forward(x, ctx)
        flat_n, wanted, rows = flat(n), targets.reshape(-1), np.arange(targets.size)
        tables = [rank.of(head.table) for rank in self.ranks]
        shares, width = head.table.layout.shares // len(self.ranks), tables[0].shape[0]
        logits = [crossentropy.capped(matmul.product(flat_n, table.T), head.cap) for table in tables]
        kept = [part.copy() for part in logits]
        top = np.max([part.max(axis=1) for part in logits], axis=0)  # exact, in any order
        picked = np.concatenate(logits, axis=1)[rows, wanted].copy()  # one rank has it
        total = joined([crossentropy.exponentials(part, top, shares) for part in logits])
        losses = crossentropy.losses(total, top, picked)
        for number, part in enumerate(logits):
            local = wanted - number * width
            here = (local >= 0) & (local < width)
            crossentropy.gradient(part, total, np.where(here, local, -1).astype("i4"), kept[number], head.cap)
        ctx.tally["loss"] = crossentropy.summed(losses, ctx.pieces(x))
        partials = []
        for rank, part, table in zip(self.ranks, logits, tables, strict=True):
            partials.append(matmul.product(part, table, shares))
            matmul.add(part.T, flat_n, self.grad(rank, head.table), ctx.accumulate)
        return head.norm.backward(joined(partials).reshape(x.shape), s_norm, ctx)


class CutDecoder(Cut):
    """The same for the modern decoder: whole groups of queries, key and value; gates and their products together."""

    def mixer(self, mixer, x, residual, ctx):
        kept, outs, starts = [], [], mixer.starts(x, ctx, 0)
        cos, sin = mixer.positions.at(x, 0, x.shape[1])
        for rank in self.ranks:
            weight = rank.of(mixer.qkv.weight)  # (C, G / ranks, g + 2, D)
            units = linear.forward(flat(x), weight.reshape(weight.shape[0], -1), None)
            units = units.reshape(*x.shape[:2], *weight.shape[1:])
            turned, inverse = rotary.forward(units[..., :-1, :], cos, sin, mixer.gain.data, mixer.epsilon)
            q, k, v = *queries_and_key(turned), unit_of(units, -1)
            draw, share = self.drawn(mixer, rank, q, ctx), order.share_length(x.shape[1])
            o, lse = attention.forward(q, k, v, draw=draw, share=share, starts=starts)
            outs.append(o.reshape(*x.shape[:2], -1))
            kept.append((units, turned, inverse, o, lse, draw, share))
        y, draw = self.row_parallel(mixer.project, outs, residual, ctx)
        return y, (x, kept, outs, draw, starts)

    def mixer_backward(self, mixer, dy, saved, ctx):
        x, kept, outs, draw, starts = saved
        d = self.row_parallel_backward(mixer.project, dy, outs, draw, ctx)
        cos, sin = mixer.positions.at(x, 0, x.shape[1])
        partials, gains = [], []
        shares = mixer.qkv.shares_out // len(self.ranks)
        for rank, (units, turned, inverse, o, lse, drop, share) in zip(self.ranks, kept, strict=True):
            do = linear.backward_input(d, rank.of(mixer.project.weight)).reshape(o.shape)
            dunits, dgain = np.empty_like(units), np.empty_like(mixer.gain.data)
            dturned = dunits[..., :-1, :]
            attention.backward(
                do, *queries_and_key(turned), unit_of(units, -1), o, lse,
                *queries_and_key(dturned), unit_of(dunits, -1),
                draw=drop, share=share, starts=starts,
            )  # fmt: skip
            rotary.backward(
                dturned, units[..., :-1, :], cos, sin, mixer.gain.data, inverse, dgain, False, ctx.pieces(dy), shares,
                out=dturned,
            )  # fmt: skip
            gains.append(dgain)
            dqkv, dw = dunits.reshape(flat(x).shape[0], -1), self.grad(rank, mixer.qkv.weight)
            weight = rank.of(mixer.qkv.weight)
            linear.backward_weight(dqkv, flat(x), dw.reshape(dw.shape[0], -1), None, ctx.accumulate, ctx.pieces(dy))
            partials.append(linear.backward_input(dqkv, weight.reshape(weight.shape[0], -1), shares=shares))
        gain = self.grad(self.ranks[0], mixer.gain)
        gain[...] = gain + joined(gains) if ctx.accumulate else joined(gains)
        return joined(partials).reshape(dy.shape)

    def drawn(self, mixer, rank, q, ctx):
        """The mask of this rank's groups: a cut of that of (B, H, T, T)."""
        draw, heads, one = mixer.drop.draw(ctx), mixer.heads.groups * mixer.heads.queries, q.shape[3] ** 2
        start = rank.number * heads // len(self.ranks) * one
        return draw._replace(start=start, strides=(heads * one, one, q.shape[3], 1))

    def mlp(self, mlp, x, residual, ctx):
        weights = [rank.of(mlp.up.weight) for rank in self.ranks]  # (C, 2, F / ranks)
        pres = [linear.forward(flat(x), w.reshape(w.shape[0], -1), None).reshape(-1, *w.shape[1:]) for w in weights]
        hidden = [mlp.activation.forward(pre).reshape(*x.shape[:2], -1) for pre in pres]
        y, draw = self.row_parallel(mlp.down, hidden, residual, ctx)
        return y, (x, pres, hidden, draw)

    def mlp_backward(self, mlp, dy, saved, ctx):
        x, pres, hidden, draw = saved
        d = self.row_parallel_backward(mlp.down, dy, hidden, draw, ctx)
        partials, shares = [], mlp.up.shares_out // len(self.ranks)
        for rank, pre in zip(self.ranks, pres, strict=True):
            dpre = mlp.activation.backward(linear.backward_input(d, rank.of(mlp.down.weight)), pre)
            dpre, w, dw = dpre.reshape(len(pre), -1), rank.of(mlp.up.weight), self.grad(rank, mlp.up.weight)
            linear.backward_weight(dpre, flat(x), dw.reshape(dw.shape[0], -1), None, ctx.accumulate, ctx.pieces(dy))
            partials.append(linear.backward_input(dpre, w.reshape(w.shape[0], -1), shares=shares, segments=2))
        return joined(partials).reshape(dy.shape)


class _Same:
    """Gradients of what every rank computes alike: kept once, as those of rank 0."""

    def __init__(self, cut: Cut) -> None:
        self.cut = cut

    def __getitem__(self, parameter):
        if "tp" in parameter.layout.axes:  # the embedding's sum joins the head's, row by row of the vocabulary
            return _Joined(self.cut, parameter)
        return self.cut.grad(self.cut.ranks[0], parameter)


class _Joined:
    """The ranks' parts of a table as one array that can be added to."""

    def __init__(self, cut, parameter):
        self.cut, self.parameter = cut, parameter

    def __iadd__(self, other):
        for rank in self.cut.ranks:
            self.cut.grad(rank, self.parameter)[...] += rank.mine(self.parameter, other)
        return self


def trained(settings, model, vocabulary):
    """(model, micro-batches, losses, gradients) of two micro-batches of a lane."""
    whole = Whole(settings, vocabulary, "f4", model=model)
    whole.store.initialise(1)
    random = np.random.default_rng(0)
    data = [random.integers(0, vocabulary, (2, ROWS, LENGTH)).astype("i4") for _ in range(2)]
    losses = run(lambda ids, targets, ctx: whole.loss_and_grad(ids, targets, None, ctx), data, whole.head.table)
    return whole, data, losses, whole.gradient.copy()


@pytest.fixture(scope="module")
def uncut():
    return trained(SETTINGS, gpt, VOCABULARY)


@pytest.fixture(scope="module")
def uncut_decoder():
    return trained(DECODER, llama, 2048)


def run(loss_and_grad, data, table):
    """The losses of a lane of micro-batches, as the engine runs them."""
    lane = {table: np.full(table.data.shape, -0.0, "f4")}
    return [
        loss_and_grad(
            ids, targets,
            Context(
                seed=3, step=4, micro_batch=index, accumulate=index > 0, lane=lane, closes=index == len(data) - 1,
                training=True,
            ),
        )
        for index, (ids, targets) in enumerate(data)
    ]  # fmt: skip


def compare(cut, uncut):
    """Losses and gradients of all ranks are those of the uncut model."""
    whole, data, losses, gradient = uncut
    assert run(cut.loss_and_grad, data, whole.head.table) == losses
    for parameter, wanted in whole.store.by_parameter(gradient).items():
        for rank in cut.ranks if "tp" in parameter.layout.axes else cut.ranks[:1]:
            found = cut.grad(rank, parameter)
            assert same_bits(found, np.ascontiguousarray(rank.mine(parameter, wanted))), f"{parameter.name}, {rank}"


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_tensor_parallel_gpt_has_the_bits_of_the_uncut_one(uncut, ranks):
    compare(Cut(uncut[0], ranks), uncut)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_tensor_parallel_decoder_has_the_bits_of_the_uncut_one(uncut_decoder, ranks):
    compare(CutDecoder(uncut_decoder[0], ranks), uncut_decoder)


@pytest.mark.parametrize("ranks", [2, 4])
def test_whole_groups_of_queries_may_be_cut(ranks):
    """Attention of tensor-parallel ranks that have a fused buffer of some groups each: g queries, a key, a value."""
    random, (batch, length, groups, each, width) = np.random.default_rng(0), (2, 96, 4, 3, 16)
    fused = random.standard_normal((batch, length, groups, each + 2, width)).astype("f4")
    do = random.standard_normal((batch, length, groups * each, width)).astype("f4")
    draw = dropout.Draw(0.2, (1, 2), 3, 4)
    starts = np.maximum(np.arange(length) - 40, np.arange(length) // 30 * 30).astype("i4")[None]

    def run(first, stop):
        """o, lse and the gradient of the buffer, of groups first … stop − 1."""
        mine, rows = np.ascontiguousarray(fused[:, :, first:stop]), slice(first * each, stop * each)
        heads, shape = (0, first * each, 0, 0), (batch, groups * each, length, length)
        rest = (True, draw.cut(shape, heads), None, order.share_length(length), None, starts)
        parts = [(x[:, :, :each], x[:, :, each], x[:, :, each + 1]) for x in views(mine, np.full_like(mine, np.nan))]
        o, lse = attention.forward(*parts[0], *rest)
        attention.backward(np.ascontiguousarray(do[:, :, rows]), *parts[0], o, lse, *parts[1], *rest)
        return o, lse, parts[1][0].base

    def views(*buffers):
        return [x.transpose(0, 2, 3, 1, 4) for x in buffers]

    whole, size = run(0, groups), groups // ranks
    parts = zip(*(run(rank * size, (rank + 1) * size) for rank in range(ranks)), strict=True)
    for wanted, found, axis in zip(whole, parts, (2, 1, 2), strict=True):
        assert np.isfinite(wanted).all() and same_bits(np.concatenate(found, axis=axis), wanted)


@pytest.mark.parametrize(
    "make", [lambda: LayerNorm("n", 48, 1e-5), lambda: RMSNorm("n", 48, 1e-5), lambda: Linear("l", 48, 40, 0.02)]
)
def test_sums_over_rows_are_those_of_ranks_that_hold_a_share_of_the_positions(make):
    """Gain, bias: every rank sums its positions of every row of the batch; the tree joins row after row."""
    random = np.random.default_rng(0)
    layer, batch, length, shares = make(), 3, 64, 8
    store = FlatStore([layer.parameters()], Mesh(), "f4")
    store.initialise(1)
    x = random.standard_normal((batch, length, 48)).astype("f4")
    bias = layer.parameters()[-1]
    dy = random.standard_normal((batch, length, bias.data.size)).astype("f4")

    def gradient(x, dy, shares):
        flat_buffer = store.new_buffer()
        views = store.by_parameter(flat_buffer)
        _, saved = layer.forward(x, Context())
        layer.backward(dy, saved, Context(gradients=views, shares=shares))
        return {p.name: view for p, view in views.items() if view.ndim == 1}

    pieces = [
        gradient(x[b : b + 1, at : at + length // shares], dy[b : b + 1, at : at + length // shares], 1)
        for b in range(batch)
        for at in range(0, length, length // shares)
    ]
    for name, found in gradient(x, dy, shares).items():
        assert same_bits(found, joined([piece[name] for piece in pieces])), name


def test_every_sum_over_rows_of_a_model_has_pieces(uncut, monkeypatch):
    whole, data, _, _ = uncut
    asked: list[int] = []

    def recorded(inner, rows):
        def call(dy, *rest, **named):
            bound = inspect.signature(inner).bind(dy, *rest, **named)
            bound.apply_defaults()
            if dy.shape[0] == rows:  # not the positions' gradient, which is summed over the batch
                asked.append(bound.arguments["pieces"])
            return inner(dy, *rest, **named)

        return call

    monkeypatch.setattr(linear, "bias_gradient", recorded(linear.bias_gradient, ROWS * LENGTH))
    monkeypatch.setattr(layernorm, "backward", recorded(layernorm.backward, ROWS * LENGTH))
    run(lambda ids, targets, ctx: whole.loss_and_grad(ids, targets, None, ctx), data[:1], whole.head.table)
    assert len(asked) == 6 * SETTINGS.layers + 1  # four biases and two norms a block, and the last norm
    assert set(asked) == {ROWS * order.MOST}
