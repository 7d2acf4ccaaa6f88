"""The global norm: its blocks lie inside the shares that tensor parallelism cuts, so that no mesh decides its bits."""

import math

import numpy as np
import pytest
from hostile import Grid
from numerics import same_bits

from mlm_mpi.order import joined
from mlm_mpi.params import clip
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import FlatStore, Parameter

LAYOUTS = {
    "table": Layout((40, 6), ("tp", None), shares=8), "columns": Layout((37, 48), (None, "tp"), shares=8),
    "heads": Layout((19, 3, 32), (None, None, "tp"), (1, 1, 4), 8), "bias": Layout((24,), ("tp",), shares=8),
    "norm": Layout((33,)), "positions": Layout((11, 5)),
}  # fmt: skip


def store_on(grid):
    return FlatStore([[Parameter(name, layout, 1.0) for name, layout in LAYOUTS.items()]], grid, "f4")


def values():
    random = np.random.default_rng(4)
    return {name: random.standard_normal(layout.shape).astype("f4") for name, layout in LAYOUTS.items()}


def gradient_on(store, whole):
    flat = store.new_buffer()
    for name, view in store.named(flat).items():
        view[...] = whole[name][LAYOUTS[name].slices(store.grid)]
    return flat


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("block", [64, 65_536])
def test_tensor_parallel_ranks_find_the_same_sums(ranks, block, monkeypatch):
    """A rank computes its shares and joins them; a number a parameter is what the others learn."""
    monkeypatch.setattr(clip, "BLOCK_ELEMENTS", block)
    whole, alone = values(), store_on(Grid())
    expected = clip.share_norms(alone, gradient_on(alone, whole))
    stores = [store_on(Grid(tp=(ranks, rank))) for rank in range(ranks)]
    found = [clip.share_norms(store, gradient_on(store, whole)) for store in stores]
    for name, layout in LAYOUTS.items():
        if layout.shares == 1:
            assert all(each[name] == expected[name] for each in found)
            continue
        assert [share for each in found for share in each[name]] == expected[name]
        assert joined([joined(each[name]) for each in found]) == joined(expected[name])


def test_the_norm_is_that_of_all_elements_and_names_what_is_not_finite():
    store, whole = store_on(Grid()), values()
    flat = gradient_on(store, whole)
    value, broken = clip.norm(store, flat)
    assert broken is None
    assert value == pytest.approx(math.sqrt(sum((x.astype("f8") ** 2).sum() for x in whole.values())), rel=1e-14)
    store.named(flat)["table"][-1, -1] = np.nan
    assert clip.norm(store, flat)[1] == "table"
    store.named(flat)["heads"][-1, -1, -1] = np.inf
    assert clip.norm(store, flat)[1] == "heads", "the first by name"


@pytest.mark.parametrize("block", [1, 7, 16, 100, 1 << 20])
@pytest.mark.parametrize("columns", [1, 5, 16, 33, 96])
def test_the_bits_of_a_block_are_those_of_its_elements_in_order(block, columns):
    """Rows that are not neighbours, a contiguous copy, kernel and reference."""
    x = np.random.default_rng(columns).standard_normal((13, 4, columns)).astype("f4")
    for share in (x[:, 0], x[:, 3]):
        copy = np.ascontiguousarray(share).reshape(-1)
        found = [clip.squares(share, block), clip.squares(copy, block), clip.squares.__wrapped__(share, block)]
        assert all(same_bits(found[0], other) for other in found[1:])


def test_a_share_is_made_of_whole_units_and_is_not_cut():
    with pytest.raises(ValueError, match="no multiple of its unit 16"):
        Layout((3, 24), (None, "tp"), (1, 2), 8)
    with pytest.raises(ValueError, match="8 shares cannot be cut in 3 equal parts"):
        LAYOUTS["bias"].split(np.zeros(8, "f4"), Grid(tp=(3, 0)))


def test_shares_of_heads_are_those_of_queries_keys_and_values():
    x = np.arange(2 * 3 * 8).reshape(2, 3, 8)
    first, second = Layout((2, 3, 8), (None, None, "tp"), (1, 1, 2), 2).split(x, Grid())
    assert np.array_equal(first, x[:, :, :4].reshape(6, 4)) and np.array_equal(second, x[:, :, 4:].reshape(6, 4))
    assert np.shares_memory(first, x)
