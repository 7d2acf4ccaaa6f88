"""Rows of a table; equal indices add in position order; the tied table."""

from dataclasses import replace

import numpy as np
import pytest
from numerics import directional, poisoned, same_bits, strided
from whole import batch_of

from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.embedding import Embedding
from mlm_mpi.ops import embedding
from mlm_mpi.params.store import FlatStore


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
