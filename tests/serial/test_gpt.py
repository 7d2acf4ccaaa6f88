"""The whole model: gradients, masks, the tied table, cached generation, flat memory, determinism."""

from dataclasses import replace

import numpy as np
import pytest
from numerics import directional, poisoned, same_bits

from mlm_mpi import config
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.layers.attention import KeyValueCache
from mlm_mpi.layers.base import Context
from mlm_mpi.models import gpt
from mlm_mpi.models.stack import Stack
from mlm_mpi.params.store import ALIGN_ELEMENTS, FlatStore

VOCABULARY, CONTEXT = 37, 140


def build(dropout: float = 0.0, dtype: str = "f8", std: float = 0.3) -> tuple[Stack, FlatStore]:
    model = gpt.Settings(
        layers=2, width=24, heads=3, context=CONTEXT, feed_forward=56, dropout=dropout, init_std=std
    )  # fmt: skip
    stack = gpt.build(model, VOCABULARY)
    store = FlatStore(stack.parameter_blocks(), Mesh(), dtype)
    store.initialise(1)
    return stack, store


def batch(rows: int = 2, positions: int = 133, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r = np.random.default_rng(seed)
    ids = r.integers(0, VOCABULARY, (rows, positions + 1))
    return ids[:, :-1], ids[:, 1:], r.random((rows, positions)) < 0.8


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("masked", [False, True])
def test_every_gradient(dropout: float, masked: bool) -> None:
    stack, store = build(dropout)
    ids, targets, mask = batch()
    mask = mask if masked else None
    ctx = Context(training=True, seed=3, step=5, micro_batch=1)
    gradient = poisoned(store.size)
    store.point_gradients(gradient)
    total = stack.loss_and_grad(ids, targets, mask, ctx)
    assert total == pytest.approx(stack.loss(ids, targets, mask, ctx), rel=1e-13)
    for span in store.spans:
        p = span.parameter
        directional(lambda: stack.loss(ids, targets, mask, ctx), p.data, p.grad, tol=1e-6)


def test_accumulate_adds_and_repetition_gives_equal_bits() -> None:
    stack, store = build(0.1, "f4", 0.1)
    ids, targets, mask = batch()
    ctx = Context(training=True)
    first, second = poisoned(store.size, dtype="f4"), poisoned(store.size, dtype="f4")
    for buffer in (first, second):
        store.point_gradients(buffer)
        stack.loss_and_grad(ids, targets, mask, ctx)
    assert same_bits(first, second)
    stack.loss_and_grad(ids, targets, mask, replace(ctx, accumulate=True))
    for a, b in zip(store.views(first), store.views(second), strict=True):
        assert np.allclose(b, 2 * a, rtol=1e-4, atol=1e-5)


def test_recomputing_activations_gives_the_same_bits() -> None:
    stack, store = build(0.1, "f4", 0.1)
    ids, targets, mask = batch()
    ctx = Context(training=True)
    buffers = [poisoned(store.size, dtype="f4") for _ in range(2)]
    losses = []
    for stack.recompute, buffer in zip((False, True), buffers, strict=True):
        store.point_gradients(buffer)
        losses.append(stack.loss_and_grad(ids, targets, mask, ctx))
    assert losses[0] == losses[1]
    assert all(same_bits(a, b) for a, b in zip(*map(store.views, buffers), strict=True))


def test_a_sum_over_rows_is_the_sum_of_the_rows() -> None:
    stack, store = build()
    ids, targets, mask = batch(rows=4, positions=50)
    together, apart = store.new_buffer(), store.new_buffer()
    store.point_gradients(together)
    whole = stack.loss_and_grad(ids, targets, mask, Context())
    store.point_gradients(apart)
    parts = [
        stack.loss_and_grad(ids[i : i + 1], targets[i : i + 1], mask[i : i + 1], Context(accumulate=i > 0))
        for i in range(4)
    ]
    assert whole == pytest.approx(sum(parts), rel=1e-12)
    assert np.allclose(together, apart, rtol=1e-9, atol=1e-11)


def test_the_tied_table_gets_both_gradients() -> None:
    stack, store = build()
    ids, targets, _ = batch(rows=1, positions=3)
    store.point_gradients(store.new_buffer())
    stack.loss_and_grad(ids, targets, None, Context())
    unread = np.setdiff1d(np.arange(VOCABULARY), ids)
    table = stack.embedding.tokens.grad
    assert table[unread].any(axis=1).all(), "the head's part reaches every token"
    hidden = stack.head.tokens
    assert hidden is stack.embedding.tokens
    assert sum(p is hidden for block in stack.parameter_blocks() for p in block) == 1


def test_ready_reports_each_block_once_when_its_gradient_is_final() -> None:
    stack, store = build()
    ids, targets, mask = batch(positions=20)
    gradient = poisoned(store.size)
    store.point_gradients(gradient)
    seen: dict[int, np.ndarray] = {}

    def ready(block: int) -> None:
        assert block not in seen
        start, stop = store.segments[block]
        seen[block] = gradient[start:stop].copy()

    stack.loss_and_grad(ids, targets, mask, Context(), ready)
    assert list(seen) == [3, 2, 1, 0]
    for block, held in seen.items():
        start, stop = store.segments[block]
        assert same_bits(gradient[start:stop], held)


@pytest.mark.parametrize("pieces", [[100, 1, 1, 31], [1] * 12 + [121], [133]])
def test_cached_generation_gives_the_uncached_logits(pieces: list[int]) -> None:
    stack, _ = build()
    ids, _, _ = batch()
    whole = stack.logits(ids, Context())
    assert whole.shape == (2, 133, VOCABULARY)
    cache, start, parts = KeyValueCache(CONTEXT), 0, []
    for count in pieces:
        parts.append(stack.logits(ids[:, start : start + count], Context(cache=cache)))
        start += count
    assert cache.length == 133
    assert np.allclose(np.concatenate(parts, axis=1), whole, rtol=1e-11, atol=1e-11)


def test_dropout_differs_by_step_and_micro_batch_and_not_by_call() -> None:
    stack, _ = build(0.2)
    ids, targets, _ = batch()
    ctx = Context(training=True, seed=3)
    losses = [
        stack.loss(ids, targets, None, c)
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
    deeper = gpt.build(gpt.Settings(layers=3, width=24, heads=3, context=CONTEXT, feed_forward=56, init_std=0.3), 37)
    c = FlatStore(deeper.parameter_blocks(), Mesh(), "f8")
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
    stack, store = build()
    ids, targets, _ = batch(positions=10)
    store.named(store.data)["block0.feed_forward.up.weight"][0, 0] = np.nan
    assert np.isnan(stack.loss(ids, targets, None, Context()))


def test_step_flops_counts_matrix_products_of_forward_and_backward() -> None:
    model = config.load(None, ["model.layers=12", "model.width=768", "model.heads=12", "model.context=1024"]).model
    per_token = gpt.step_flops(model, 50257, 1)
    weights = 12 * 12 * 768**2 + 50257 * 768
    assert per_token == 6 * weights + 12 * 12 * 768 * 1024
