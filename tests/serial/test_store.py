"""Flat memory, layouts, assignment: views, slices, hashes, and who runs what."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.layers.base import Sizes
from mlm_mpi.models import gpt
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import ALIGN_ELEMENTS, FlatStore, Parameter
from mlm_mpi.train.assignment import Assignment


class Grid:
    """A mesh of which this is coordinate `at` of `extent` along tp."""

    def __init__(self, extent, at):
        self.extent, self.at = extent, at

    def size(self, axis):
        return self.extent if axis == "tp" else 1

    def coord(self, axis):
        return self.at if axis == "tp" else 0


def parameters():
    return [
        [Parameter("b", Layout((7, 5), ("tp", None)), 0.5, decay=True), Parameter("a", Layout((3,)), "zeros")],
        [Parameter("c", Layout((2, 4)), "ones")],
    ]


def test_parameters_are_views_into_one_aligned_buffer():
    store = FlatStore(parameters(), Mesh(), "f4")
    store.initialise(1)
    assert store.segments == [(0, 64), (64, 80)]
    assert all(span.start % ALIGN_ELEMENTS == 0 for span in store.spans)
    for span in store.spans:
        assert np.shares_memory(span.parameter.data, store.data)
    store.spans[2].parameter.data[1, 3] = 9
    assert store.data[store.spans[2].start + 7] == 9
    assert store.count == 35 + 3 + 8


@given(extent=st.integers(1, 9))
def test_initial_values_do_not_depend_on_the_mesh(extent):
    whole = FlatStore(parameters(), Mesh(), "f4")
    whole.initialise(4)
    pieces = []
    for at in range(extent):
        store = FlatStore(parameters(), Grid(extent, at), "f4")
        store.initialise(4)
        pieces.append(store.named(store.data)["b"])
    assert np.array_equal(np.concatenate(pieces), whole.named(whole.data)["b"])


def test_tp_cuts_between_heads():
    """Three heads of width 4 over two ranks: two and one, in the fused projection as in the rows of the output's."""
    layer = gpt.build(gpt.Settings(layers=1, width=12, heads=3), Sizes(5)).parts[1].mixer
    shapes = [[parameter.layout.local_shape(Grid(2, at)) for parameter in layer.parameters()] for at in range(2)]
    assert shapes[0] == [(12, 3, 8), (3, 8), (8, 12), (12,)]
    assert shapes[1] == [(12, 3, 4), (3, 4), (4, 12), (12,)]
    assert layer.qkv.weight.layout.slices(Grid(2, 1))[2] == slice(8, 12)
    with pytest.raises(ValueError, match="12 is no multiple of its unit 5"):
        Layout((12,), ("tp",), (5,)).slices(Grid(2, 0))


def test_initial_values_depend_on_seed_and_name():
    values = []
    for seed, name in ((1, "x"), (2, "x"), (1, "y")):
        store = FlatStore([[Parameter(name, Layout((50,)), 1.0)]], Mesh(), "f8")
        store.initialise(seed)
        values.append(store.data[:50].copy())
    assert not np.array_equal(values[0], values[1]) and not np.array_equal(values[0], values[2])


def test_the_hash_is_over_sorted_names_shapes_and_values_without_padding():
    store = FlatStore(parameters(), Mesh(), "f4")
    store.initialise(1)
    digest = hashlib.sha256()
    for name, value in sorted(store.named(store.data).items()):
        digest.update(f"{name} float32 {value.shape}\n".encode() + value.astype("<f4").tobytes())
    before = store.weights_sha256()
    assert before == digest.hexdigest()
    store.data[63] = 5.0  # a gap
    assert store.weights_sha256() == before
    store.data[0] = np.nextafter(store.data[0], np.float32(1e9))
    assert store.weights_sha256() != before


@given(lanes=st.integers(1, 40), each=st.integers(1, 4), data=st.data())
def test_every_micro_batch_is_run_once_in_order(lanes, each, data):
    ranks = data.draw(st.integers(1, lanes))
    assignment = Assignment(lanes * each, lanes, ranks)
    assert [i for rank in range(ranks) for i in assignment.of_rank(rank)] == list(range(lanes * each))


def test_balance():
    assert Assignment(8, 4, 3).balance == pytest.approx(4 / 6)
    assert Assignment(8, 8, 4).balance == 1.0
