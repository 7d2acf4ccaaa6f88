"""The encoder-decoder: golden values of PyTorch, every gradient, pairs in rows, the cache, smoothed targets, bits."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numerics import directional, poisoned, same_bits
from whole import Driven

from mlm_mpi.beams import written
from mlm_mpi.data.batch import Batch
from mlm_mpi.data.translation import Pair, pairs_batch
from mlm_mpi.layers.attention import KeyValueCache
from mlm_mpi.layers.base import Context, Sizes
from mlm_mpi.layers.chain import Chain
from mlm_mpi.layers.head import TokenHead
from mlm_mpi.models import encoder_decoder
from mlm_mpi.ops import crossentropy

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from make_encoder_decoder import FILE, SETTINGS, SMOOTHING, VOCABULARY, golden_weights, texts

SMALL = replace(SETTINGS, layers=1, decoder_layers=2, width=8, heads=2, feed_forward=12, init_std=0.3)
LEXICAL = replace(SMALL, lexical=True)
TRAINING = Context(training=True, seed=3, step=5, micro_batch=1)


def pairs() -> list[Pair]:
    return [Pair(*(ids.astype(np.int32) for ids in one)) for one in texts()]


def made() -> Batch:
    """The recorded pairs, in rows that are filled up."""
    return pairs_batch(pairs(), eot=0)


def driven(settings: encoder_decoder.Settings, smoothing: float = 0.0, dtype: str = "f8", **more) -> Driven:
    """A model with its head, its weights not yet set."""
    trunk = encoder_decoder.build(settings, Sizes(VOCABULARY))
    return Driven([*trunk.parts, TokenHead(trunk, smoothing)], dtype, **more)


def drawn(settings: encoder_decoder.Settings, *rest, **more) -> Driven:
    whole = driven(settings, *rest, **more)
    whole.store.initialise(1)
    return whole


def logits(whole: Driven, batch: Batch, cache: KeyValueCache | None = None) -> np.ndarray:
    """Shapes: -> (B, T, V)."""
    ctx = Context(batch=batch, cache=cache)
    (hidden,), _ = Chain(whole.chain.parts[:-1]).forward((), ctx)
    return whole.head.logits(hidden, ctx)


@pytest.mark.parametrize("smoothing", [0.0, SMOOTHING])
def test_loss_and_every_gradient_are_those_of_pytorch(smoothing: float) -> None:
    whole = driven(SETTINGS, smoothing)
    for name, value in whole.store.named(whole.store.data).items():
        value[...] = golden_weights(name, value.shape)
    with np.load(FILE, allow_pickle=False) as record:
        assert whole.loss_and_grad(made(), TRAINING) == pytest.approx(record[f"{smoothing}/loss"], rel=1e-10)
        assert len(whole.store.spans) * 2 + 2 == len(record.files)
        for span in whole.store.spans:
            theirs = record[f"{smoothing}/gradient/{span.parameter.name}"]
            ours = whole[span.parameter]
            # a bias of keys moves no softmax: its gradient is what rounding leaves
            error = np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-3)
            assert error <= 1e-10, f"{span.parameter.name}: {error:.1e}"


SOME = (
    "embed.tokens", "embed.source.positions", "embed.words.norm.gain", "encoder.block0.attention.qkv.weight",
    "decoder.block0.cross.query.bias", "decoder.lexical.norm.bias", "decoder.lexical.query.weight",
    "decoder.lexical.key.weight", "decoder.lexical.project.weight",
)  # fmt: skip


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("settings", [SMALL, LEXICAL], ids=["plain", "lexical"])
def test_every_gradient_is_the_slope_of_the_loss_with_dropout(settings, every: bool) -> None:
    """Without dropout all of a plain model's are PyTorch's."""
    whole, batch = drawn(replace(settings, dropout=0.2), 0.1), pairs_batch(pairs()[1:3], eot=0)
    whole.gradient = poisoned(whole.store.size)
    whole.loss_and_grad(batch, TRAINING)
    for span in whole.store.spans:
        p, kept = span.parameter, whole[span.parameter].copy()
        if every or p.name in SOME:
            directional(lambda: whole.training_loss(batch, TRAINING), p.data, kept, tol=1e-6)


def test_rows_of_one_length_are_what_their_pairs_are() -> None:
    whole = drawn(SMALL)
    random = np.random.default_rng(0)
    some = [Pair(*(random.integers(0, VOCABULARY, n).astype(np.int32) for n in (6, 8, 8))) for _ in range(3)]
    packed = pairs_batch(some, eot=0)
    source, read, wanted = (np.stack(arrays) for arrays in zip(*some, strict=True))
    rows = Batch(0, 0, {"ids": read}, {"ids": wanted}, 24, source=Batch(0, 0, {"ids": source}, {}, 0))
    found = [(whole.loss_and_grad(batch, TRAINING), whole.gradient.copy()) for batch in (packed, rows)]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert np.allclose(found[0][1], found[1][1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("settings", [SMALL, LEXICAL], ids=["plain", "lexical"])
def test_recomputing_repeating_and_halves_give_equal_bits(settings) -> None:
    settings, batch, found = replace(settings, dropout=0.1), made(), []
    plain, recomputed = drawn(settings, 0.1, "f4"), drawn(settings, 0.1, "f4", recompute=True)
    for whole, halves in ((plain, False), (plain, True), (recomputed, False)):
        whole.gradient = poisoned(whole.store.size, dtype="f4")
        whole.loss_and_grad(batch, TRAINING, halves=halves)
        found.append(whole.store.views(whole.gradient))
    assert all(same_bits(a, b) and same_bits(a, c) for a, b, c in zip(*found, strict=True))


def test_a_target_sees_its_own_source_and_what_came_before() -> None:
    whole, some = drawn(SMALL), pairs()
    plain = whole.hidden(pairs_batch(some, eot=0))[0]
    ends = np.cumsum([len(pair.read) for pair in some])

    def changed(which: int, **arrays: np.ndarray) -> np.ndarray:
        """Which positions of the decoder are others."""
        mine = [pair._replace(**arrays) if number == which else pair for number, pair in enumerate(some)]
        other = whole.hidden(pairs_batch(mine, eot=0))[0]
        return np.array([not same_bits(a, b) for a, b in zip(plain[: ends[-1]], other, strict=False)])

    source = some[1].source.copy()
    source[-1] += 1
    assert (changed(1, source=source) == ((np.arange(ends[-1]) // ends[0]) == 1)).all(), "of the second pair alone"
    read = some[0].read.copy()
    read[3] += 1
    assert (changed(0, read=read).nonzero()[0] == np.arange(3, ends[0])).all(), "none before it"


def test_a_lexical_model_hands_tokens_on_before_it_has_learnt_anything() -> None:
    """Those of the source are likelier than they would be, and others are not."""
    source = np.array([3, 3, 3, 3], np.int32)
    some = pairs_batch([Pair(source, *2 * [np.array([0, 5], np.int32)])], eot=0)
    settings = replace(LEXICAL, width=64, init_std=0.02)
    for lexical in (True, False):
        most = logits(drawn(replace(settings, lexical=lexical)), some)[0, :2].argmax(axis=1)
        assert (most == 3).all() == lexical


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("settings", [SMALL, LEXICAL], ids=["plain", "lexical"])
def test_cached_logits_are_the_uncached_ones(settings, rows: int) -> None:
    whole, random = drawn(settings), np.random.default_rng(1)
    ids = random.integers(0, VOCABULARY, (rows, 7)).astype(np.int32)
    source = Batch(0, 0, {"ids": random.integers(0, VOCABULARY, (rows, 5)).astype(np.int32)}, {}, 0)
    wanted = logits(whole, Batch(0, 0, {"ids": ids}, {}, 0, source=source))
    cache, found = KeyValueCache(SMALL.context), []
    for start, stop in ((0, 1), (1, 2), (2, 5), (5, 7)):
        step = Batch(0, 0, {"ids": ids[:, start:stop]}, {}, 0, source=source if not start else None)
        found.append(logits(whole, step, cache))
        cache.advance(stop - start)
    assert np.allclose(np.concatenate(found, axis=1), wanted, rtol=1e-10, atol=1e-12)


def test_greedy_search_takes_the_likeliest_token_each_time() -> None:
    """By the logits of all that is written so far; a text does not depend on those beside it."""
    whole, random = drawn(SMALL), np.random.default_rng(2)
    sources, end = random.integers(0, VOCABULARY, (4, 6)).astype(np.int32), 5
    found = written(whole.chain, sources, SMALL.context, end)
    assert found == [written(whole.chain, row[None], SMALL.context, end)[0] for row in sources]
    for source, text in zip(sources, found, strict=True):
        ids = np.array([[end, *text]], np.int32)[:, : SMALL.context]
        batch = Batch(0, 0, {"ids": ids}, {}, 0, source=Batch(0, 0, {"ids": source[None]}, {}, 0))
        best = logits(whole, batch)[0].argmax(axis=1).tolist()
        assert best[: len(text)] == text and (len(text) == SMALL.context or best[len(text)] == end)


@pytest.mark.parametrize("count", [7, 1030])
def test_smoothed_targets_are_those_of_the_formula(count: int) -> None:
    """Of several chunks of rows too, some of them masked."""
    random = np.random.default_rng(2)
    x, w = random.normal(size=(count, 6)), random.normal(size=(16, 6))
    targets, mask = random.integers(0, 16, count), random.random(count) < 0.8
    dw = np.zeros_like(w)
    loss, dx = crossentropy.loss_and_grad(x, w, targets, mask, dw, False, shares=4, smoothing=0.3)
    z = x @ w.T
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    wanted = (0.7 * np.eye(16)[targets] + 0.3 / 16) * mask[:, None]
    assert loss == pytest.approx(-(wanted * np.log(p)).sum(), rel=1e-12)
    dz = p * mask[:, None] - wanted
    assert np.allclose(dx, dz @ w, atol=1e-12) and np.allclose(dw, dz.T @ x, atol=1e-11)
