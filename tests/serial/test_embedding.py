"""Rows of a table; equal indices add in position order; the tied table."""

from dataclasses import replace

import numpy as np
import pytest
from numerics import directional, poisoned, same_bits, strided
from tiny import VOCABULARY, batches, tiny_config
from whole import batch_of, engine_of

from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.embedding import Embedding
from mlm_mpi.ops import embedding
from mlm_mpi.params.store import FlatStore
from mlm_mpi.train.memory import bytes_held


@pytest.mark.parametrize(("n", "v", "c"), [(1, 1, 1), (7, 3, 5), (1000, 11, 6), (50, 4000, 3)])
@pytest.mark.parametrize("arrange", [np.ascontiguousarray, strided])
@pytest.mark.parametrize("integers", ["i4", "i8", "u2"])
def test_scatter_equals_add_at(n, v, c, arrange, integers) -> None:  # type: ignore[no-untyped-def]
    r = np.random.default_rng(n)
    ids, dy = arrange(r.integers(0, v, n).astype(integers)), arrange(r.standard_normal((n, c)))
    table = r.standard_normal((v, c))
    assert np.array_equal(embedding.forward(ids, table), table[ids])
    got, expected = arrange(table.copy()), table.copy()
    embedding.backward(dy, ids, got)
    np.add.at(expected, ids, dy)
    assert np.allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_twice_gives_equal_bits() -> None:
    r = np.random.default_rng(0)
    ids, dy = r.integers(0, 5, 3000), r.standard_normal((3000, 8)).astype("f4")
    first, second = np.zeros((5, 8), "f4"), np.zeros((5, 8), "f4")
    embedding.backward(dy, ids, first)
    embedding.backward(dy, ids, second)
    assert same_bits(first, second)


def test_layer_adds_to_the_tied_table_and_writes_every_position() -> None:
    layer = Embedding("embed", 13, 10, 4, 0.5, 0.0)
    store = FlatStore([layer.parameters()], Mesh(), "f8")
    store.initialise(0)
    r = np.random.default_rng(1)
    ids, dy = r.integers(0, 13, (3, 7)), r.standard_normal((3, 7, 4))
    grad = store.by_parameter(poisoned(store.size))
    tokens, positions = grad[layer.tokens], grad[layer.positions]
    tokens[...] = 2.0  # what the head has written
    ctx = Context(batch=batch_of(ids, ids), gradients=grad)
    (x,), saved = layer.forward((), ctx)
    assert np.allclose(x, layer.tokens.data[ids] + layer.positions.data[:7])
    layer.backward((dy,), saved, ctx)

    def objective() -> float:
        return float((layer.forward((), ctx)[0][0] * dy).sum())

    directional(objective, layer.tokens.data, tokens - 2.0)
    directional(objective, layer.positions.data, positions)
    assert not positions[7:].any()
    before = positions.copy()
    layer.backward((dy,), saved, replace(ctx, accumulate=True))
    assert np.allclose(positions, 2 * before)


def test_equal_ids_are_complete_before_they_join_the_table() -> None:
    """In position order from the first on, and so by the kernel and by the reference."""
    r = np.random.default_rng(3)
    for n, v, c in [(1, 1, 1), (200, 3, 33), (513, 40, 17), (70, 1, 16)]:
        ids, dy = r.integers(0, v, n).astype("i4"), r.standard_normal((n, c)).astype("f4")
        table = r.standard_normal((v, c)).astype("f4")
        expected = table.copy()
        for token in np.unique(ids):
            whole = None
            for row in dy[ids == token]:
                whole = row if whole is None else whole + row
            expected[token] = table[token] + whole
        for backward in (embedding.backward, embedding.backward.__wrapped__):
            found = table.copy()
            backward(dy, ids, found)
            assert same_bits(found, expected)


def test_the_tied_table_has_two_sums_a_lane() -> None:
    """The engine sums lanes of three micro-batches as two stages of a pipeline would: each its own, then joined."""
    config = tiny_config("train.micro_batches=6", "train.lanes=2", "model.dropout=0.0")
    engine = engine_of(config, VOCABULARY)
    machine, store = engine.machine, engine.machine.store
    store.initialise(1)
    tokens = machine.chain.parts[0].tokens
    made = engine.attempt(0, batches(config, engine.plan(0, 1)))
    found = store.by_parameter(made.total)[tokens].copy()

    lanes, whole = [], store.by_parameter(store.new_buffer())
    for lane in ([0, 1, 2], [3, 4, 5]):
        of_head, of_embedding = np.zeros_like(found), np.zeros_like(found)
        for number in lane:
            apart = {tokens: np.full_like(found, -0.0)}
            ctx = engine._context(0, made.batches[number])
            ctx = replace(ctx, gradients=whole, lane=apart, closes=False)
            _, kept = machine.chain.forward((), ctx)
            machine.chain.backward((), kept, ctx)
            of_head += whole[tokens]
            of_embedding += apart[tokens]
        lanes.append(of_head + of_embedding)
    assert np.array_equal(found, lanes[0] + lanes[1])
    assert [sums.shape for sums in engine.second_sums.values()] == [(VOCABULARY, 24)]
    assert bytes_held(engine)["second sums of tied weights"] == VOCABULARY * 24 * 4


def test_a_lane_of_one_micro_batch_needs_no_second_sum() -> None:
    config = tiny_config("train.micro_batches=2", "train.lanes=2")
    engine = engine_of(config, VOCABULARY)
    assert engine.second_sums == {} and "second sums of tied weights" not in bytes_held(engine)
    store, chain = engine.machine.store, engine.machine.chain
    store.initialise(1)
    tokens, results = chain.parts[0].tokens, []
    for lane in ({}, {tokens: np.full((VOCABULARY, 24), -0.0, "f4")}):
        gradients = store.by_parameter(store.new_buffer())
        ctx = Context(training=True, batch=batches(config, [(0, 0)])(), gradients=gradients, lane=lane)
        _, kept = chain.forward((), ctx)
        chain.backward((), kept, ctx)
        results.append(gradients[tokens].copy())
    assert same_bits(*results)


def test_the_second_sum_of_an_engine_leaves_alone_what_nobody_looks_up():
    """It begins with -0: zeros have the same signs in a lane of several micro-batches and in one of a single one."""
    config = tiny_config()
    engine = engine_of(config, VOCABULARY)
    engine.machine.store.initialise(1)
    inner = batches(config, list(engine.plan(0, 1)))
    engine.step(0, lambda: inner().map(lambda array: array % 5 if array.dtype == np.int32 else array))
    (summed,) = engine.second_sums.values()
    assert summed[:5].any() and not summed[5:].any()
    assert np.signbit(summed[5:]).all()
