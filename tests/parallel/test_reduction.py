"""Both reductions: the canonical sum equals a serial tree bit for bit; allreduce within rounding."""

import itertools

import numpy as np
import pytest

from mlm_mpi.comm.buckets import Setup
from mlm_mpi.comm.reductions import allreduce, canonical, naive
from mlm_mpi.comm.tree import maximal_nodes, middle, plan_lanes
from mlm_mpi.cut import cut

SEGMENTS = [[(0, 1000)], [(0, 100), (100, 160), (160, 5000)], [(0, 7), (7, 8), (8, 9)]]


def tree(values, first, stop):
    if stop - first == 1:
        return values[first].copy()
    centre = middle(first, stop)
    return tree(values, first, centre) + tree(values, centre, stop)


def run_step(reduction, group, lanes, values, segments):
    first, stop = cut(lanes, group.size, group.rank)
    reduction.begin()
    for lane in range(first, stop):
        buffer, fresh = reduction.open_lane(lane)
        buffer[:] = values[lane] if fresh else buffer + values[lane]
        if lane == stop - 1:
            for block in range(len(segments) - 1, -1, -1):
                reduction.block_ready(block)
        reduction.close_lane(lane)
    return reduction.finish()


def setup_of(group, lanes, segments, dtype="f4", overlap=True, bucket_bytes=4 * 300):
    ranges = [cut(lanes, group.size, rank) for rank in range(group.size)]
    return Setup(group, lanes, ranges, segments, bucket_bytes, dtype, overlap)


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 5, 7, 8, 11])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("segments", SEGMENTS, ids=["one block", "three blocks", "tiny blocks"])
def test_canonical_sum_is_the_tree(group, lanes, overlap, segments):
    if group.size > lanes:
        pytest.skip("more ranks than lanes is refused at the start")
    reduction = canonical.build(setup_of(group, lanes, segments, overlap=overlap))
    for step in range(3):
        values = np.random.default_rng([lanes, step]).standard_normal((lanes, segments[-1][1])).astype("f4")
        total = run_step(reduction, group, lanes, values, segments)
        assert np.array_equal(total, tree(values, 0, lanes))


@pytest.mark.parametrize("lanes", [1, 3, 4, 8, 11])
@pytest.mark.parametrize("build", [canonical.build, naive.build], ids=["canonical", "naive"])
def test_chunks_go_through_lanes_by_themselves(group, lanes, build):
    """One is through before the next begins, in any order of chunks; a bucket lies in two of them."""
    if group.size > lanes:
        pytest.skip("more ranks than lanes is refused at the start")
    segments = SEGMENTS[1]
    reduction, (first, stop) = build(setup_of(group, lanes, segments)), cut(lanes, group.size, group.rank)
    for step, order in enumerate([(2, 1, 0), (0, 2, 1), (1, 0, 2)]):
        values = np.random.default_rng([lanes, step]).standard_normal((lanes, 5000)).astype("f4")
        reduction.begin()
        for block in order:
            part = slice(*segments[block])
            for lane in range(first, stop):
                buffer, _ = reduction.open_lane(lane)
                buffer[part] = values[lane, part]
                if lane == stop - 1:
                    reduction.block_ready(block)
                reduction.close_lane(lane, part)
        assert np.array_equal(reduction.finish(), tree(values, 0, lanes))


@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_naive_is_the_definition(group, lanes):
    if group.size > lanes:
        pytest.skip("more ranks than lanes is refused at the start")
    reduction = naive.build(setup_of(group, lanes, SEGMENTS[1]))
    for step in range(2):
        values = np.random.default_rng([lanes, step]).standard_normal((lanes, 5000)).astype("f4")
        assert np.array_equal(run_step(reduction, group, lanes, values, SEGMENTS[1]), tree(values, 0, lanes))


@pytest.mark.parametrize("overlap", [True, False])
def test_allreduce_sums_all_lanes(group, overlap):
    segments, lanes = SEGMENTS[1], 8
    reduction = allreduce.build(setup_of(group, lanes, segments, "f8", overlap))
    for step in range(3):
        values = np.random.default_rng(step).standard_normal((lanes, 5000))
        total = run_step(reduction, group, lanes, values, segments)
        np.testing.assert_allclose(total, values.sum(axis=0), rtol=1e-12, atol=1e-12)


def test_a_step_that_differs_from_the_last_leaves_nothing_behind(group):
    reduction = canonical.build(setup_of(group, 8, SEGMENTS[1], bucket_bytes=999))
    run_step(reduction, group, 8, np.full((8, 5000), np.nan, "f4"), SEGMENTS[1])
    total = run_step(reduction, group, 8, np.ones((8, 5000), "f4"), SEGMENTS[1])
    assert (total == 8).all()


@pytest.mark.parametrize("lanes", range(1, 34))
def test_subtrees_of_the_ranks_make_up_the_tree(lanes):
    for ranks in range(1, lanes + 1):
        held = [maximal_nodes((0, lanes), *cut(lanes, ranks, rank)) for rank in range(ranks)]
        flat = [node for nodes in held for node in nodes]
        assert flat[0][0] == 0 and flat[-1][1] == lanes
        assert all(a[1] == b[0] for a, b in itertools.pairwise(flat))


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32])
def test_aligned_lanes_need_one_buffer_and_a_logarithm(lanes):
    _, nodes, buffers = plan_lanes(lanes, 0, lanes)
    assert len(nodes) == 1
    assert buffers <= 1 + lanes.bit_length() - 1
