"""The whole model: gradients, masks, the tied table, cached generation, flat memory, determinism."""

from dataclasses import replace

import numpy as np
import pytest
from numerics import directional, poisoned, same_bits
from whole import Whole

from mlm_mpi.layers.attention import KeyValueCache
from mlm_mpi.layers.base import Context, Sizes
from mlm_mpi.models import gpt
from mlm_mpi.params.store import ALIGN_ELEMENTS, FlatStore

VOCABULARY, CONTEXT = 37, 140


def settings(layers: int = 2, dropout: float = 0.0, std: float = 0.3) -> gpt.Settings:
    return gpt.Settings(
        layers=layers, width=24, heads=3, context=CONTEXT, feed_forward=56, dropout=dropout, init_std=std
    )  # fmt: skip


def build(
    dropout: float = 0.0, dtype: str = "f8", std: float = 0.3, recompute: bool = False
) -> tuple[Whole, FlatStore]:
    whole = Whole(settings(dropout=dropout, std=std), VOCABULARY, dtype, recompute=recompute)
    whole.store.initialise(1)
    return whole, whole.store


def batch(rows: int = 2, positions: int = 133, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r = np.random.default_rng(seed)
    ids = r.integers(0, VOCABULARY, (rows, positions + 1))
    return ids[:, :-1], ids[:, 1:], r.random((rows, positions)) < 0.8


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("masked", [False, True])
def test_every_gradient(dropout: float, masked: bool) -> None:
    whole, store = build(dropout)
    ids, targets, mask = batch()
    mask = mask if masked else None
    ctx = Context(training=True, seed=3, step=5, micro_batch=1)
    whole.gradient = poisoned(store.size)
    total = whole.loss_and_grad(ids, targets, mask, ctx)
    assert total == pytest.approx(whole.loss(ids, targets, mask, ctx), rel=1e-13)
    for span in store.spans:
        p = span.parameter
        directional(lambda: whole.loss(ids, targets, mask, ctx), p.data, whole[p], tol=1e-6)


def test_accumulate_adds_and_repetition_gives_equal_bits() -> None:
    whole, store = build(0.1, "f4", 0.1)
    ids, targets, mask = batch()
    ctx = Context(training=True)
    first, second = poisoned(store.size, dtype="f4"), poisoned(store.size, dtype="f4")
    for whole.gradient in (first, second):
        whole.loss_and_grad(ids, targets, mask, ctx)
    assert same_bits(first, second)
    whole.loss_and_grad(ids, targets, mask, replace(ctx, accumulate=True))
    for a, b in zip(store.views(first), store.views(second), strict=True):
        assert np.allclose(b, 2 * a, rtol=1e-4, atol=1e-5)


def test_recomputing_activations_gives_the_same_bits() -> None:
    whole, store = build(0.1, "f4", 0.1)
    ids, targets, mask = batch()
    ctx = Context(training=True)
    wholes = whole, build(0.1, "f4", 0.1, recompute=True)[0]
    losses = []
    for each in wholes:
        each.gradient = poisoned(store.size, dtype="f4")
        losses.append(each.loss_and_grad(ids, targets, mask, ctx))
    assert losses[0] == losses[1]
    assert all(same_bits(a, b) for a, b in zip(*(store.views(each.gradient) for each in wholes), strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_backward_in_two_halves_has_the_same_bits(recompute: bool) -> None:
    """Of a tied table, added to what a lane holds too; every part says once that it is ready, the last one first."""
    whole, store = build(0.1, "f4", 0.1, recompute)
    ids, targets, mask = batch()
    found = []
    for halves in (False, True):
        whole.gradient, said = poisoned(store.size, dtype="f4"), []
        losses = [
            whole.loss_and_grad(
                ids, targets, mask, Context(training=True, accumulate=added), said.append, halves=halves
            )
            for added in (False, True)
        ]
        found.append((losses, said, [view.tobytes() for view in store.views(whole.gradient)]))
    assert found[0] == found[1] and found[0][1] == [3, 2, 1, 0] * 2


def test_a_sum_over_rows_is_the_sum_of_the_rows() -> None:
    whole, store = build()
    ids, targets, mask = batch(rows=4, positions=50)
    together, apart = store.new_buffer(), store.new_buffer()
    whole.gradient = together
    total = whole.loss_and_grad(ids, targets, mask, Context())
    whole.gradient = apart
    parts = [
        whole.loss_and_grad(ids[i : i + 1], targets[i : i + 1], mask[i : i + 1], Context(accumulate=i > 0))
        for i in range(4)
    ]
    assert total == pytest.approx(sum(parts), rel=1e-12)
    assert np.allclose(together, apart, rtol=1e-9, atol=1e-11)


def test_the_tied_table_gets_both_gradients() -> None:
    whole, _ = build()
    ids, targets, _ = batch(rows=1, positions=3)
    whole.loss_and_grad(ids, targets, None, Context())
    unread = np.setdiff1d(np.arange(VOCABULARY), ids)
    table = whole.chain.parts[0].tokens
    assert whole[table][unread].any(axis=1).all(), "the head's part reaches every token"
    assert whole.head.table is table
    assert sum(p is table for block in whole.chain.parameter_blocks() for p in block) == 1


def test_ready_reports_each_block_once_when_its_gradient_is_final() -> None:
    whole, store = build()
    ids, targets, mask = batch(positions=20)
    whole.gradient = gradient = poisoned(store.size)
    seen: dict[int, np.ndarray] = {}

    def ready(block: int) -> None:
        assert block not in seen
        start, stop = store.segments[block]
        seen[block] = gradient[start:stop].copy()

    whole.loss_and_grad(ids, targets, mask, Context(), ready)
    assert list(seen) == [3, 2, 1, 0]
    for block, held in seen.items():
        start, stop = store.segments[block]
        assert same_bits(gradient[start:stop], held)


@pytest.mark.parametrize("pieces", [[100, 1, 1, 31], [1] * 12 + [121], [133]])
def test_cached_generation_gives_the_uncached_logits(pieces: list[int]) -> None:
    whole, _ = build()
    ids, _, _ = batch()
    expected = whole.logits(ids)
    assert expected.shape == (2, 133, VOCABULARY)
    cache, start, parts = KeyValueCache(CONTEXT), 0, []
    for count in pieces:
        parts.append(whole.logits(ids[:, start : start + count], cache))
        start += count
    assert cache.length == 133
    assert np.allclose(np.concatenate(parts, axis=1), expected, rtol=1e-11, atol=1e-11)


def test_dropout_differs_by_step_and_micro_batch_and_not_by_call() -> None:
    whole, _ = build(0.2)
    ids, targets, _ = batch()
    ctx = Context(training=True, seed=3)
    losses = [
        whole.loss(ids, targets, None, c)
        for c in (ctx, ctx, replace(ctx, step=1), replace(ctx, micro_batch=1), replace(ctx, seed=4), Context())
    ]
    assert losses[0] == losses[1] and len(set(losses)) == 5


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    _, a = build()
    _, b = build()
    assert a.weights_sha256() == b.weights_sha256()
    b.initialise(2)
    assert a.weights_sha256() != b.weights_sha256()
    weights = a.named(a.data)
    assert abs(weights["embed.tokens"].std() / 0.3 - 1) < 0.1
    assert abs(weights["block0.feed_forward.down.weight"].std() / (0.3 / 2) - 1) < 0.1
    assert (weights["block1.norm2.gain"] == 1).all() and not weights["block1.norm2.bias"].any()
    c = Whole(settings(layers=3), VOCABULARY).store
    c.initialise(1)
    assert same_bits(c.named(c.data)["block1.attention.qkv.weight"], weights["block1.attention.qkv.weight"])


def test_flat_store_is_aligned_complete_and_zero_between() -> None:
    _, store = build()
    assert all(span.start % ALIGN_ELEMENTS == 0 for span in store.spans)
    assert store.segments[0][0] == 0 and store.segments[-1][1] == store.size
    assert all(a[1] == b[0] for a, b in zip(store.segments, store.segments[1:], strict=False))
    covered = np.zeros(store.size, bool)
    for span in store.spans:
        covered[span.start : span.stop] = True
        assert np.shares_memory(span.parameter.data, store.data)
    assert covered.sum() == store.count and not store.data[~covered].any()
    names = [span.parameter.name for span in store.spans]
    assert len(names) == len(set(names))
    before = store.weights_sha256()
    store.data[~covered] = 7.0
    assert store.weights_sha256() == before, "padding does not enter the hash"


def test_nan_in_a_weight_reaches_the_loss() -> None:
    whole, store = build()
    ids, targets, _ = batch(positions=10)
    store.named(store.data)["block0.feed_forward.up.weight"][0, 0] = np.nan
    assert np.isnan(whole.loss(ids, targets, None, Context()))


def test_step_flops_counts_matrix_products_of_forward_and_backward() -> None:
    model = gpt.Settings(layers=12, width=768, heads=12, context=1024).resolved()
    per_token = gpt.flops(model, Sizes(50257), 1)
    weights = 12 * 12 * 768**2 + 50257 * 768
    assert per_token == 6 * weights + 12 * 12 * 768 * 1024


def test_least_counts_without_building() -> None:
    _, store = build()
    least = gpt.least(settings(), Sizes(VOCABULARY), 3)
    assert least.parameters == store.count and least.passing == 3 * CONTEXT * 24 and least.kept == 2 * least.passing
    assert gpt.least(settings(layers=10**9), Sizes(VOCABULARY), 1).parts == 10**9
