"""Shares of an extent, and boxes of a global array: what they cover, where they meet."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm_mpi.cut import Box, cut


@given(units=st.integers(0, 1000), parts=st.integers(1, 50), unit=st.integers(1, 9))
def test_a_cut_covers_everything_evenly_in_whole_units(units, parts, unit):
    ranges = [cut(units * unit, parts, part, unit) for part in range(parts)]
    assert ranges[0][0] == 0 and ranges[-1][1] == units * unit
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    sizes = [stop - start for start, stop in ranges]
    assert sizes == sorted(sizes, reverse=True) and all(size % unit == 0 for size in sizes)
    assert max(sizes) - min(sizes) <= unit


def test_three_heads_over_two():
    assert [cut(3 * 8, 2, part, 8) for part in range(2)] == [(0, 16), (16, 24)]
    assert [cut(3 * 8, 2, part) for part in range(2)] == [(0, 12), (12, 24)], "elements would cut the second head"


def test_an_extent_that_is_no_multiple_of_the_unit_is_refused():
    with pytest.raises(ValueError, match="an extent of 10 is no multiple of its unit 4"):
        cut(10, 2, 0, 4)


SHAPE = (5, 4, 6)


@st.composite
def boxes(draw):
    edges = [sorted(draw(st.tuples(st.integers(0, extent), st.integers(0, extent)))) for extent in SHAPE]
    return Box(tuple(start for start, _ in edges), tuple(stop for _, stop in edges))


@given(one=boxes(), other=boxes())
def test_an_overlap_is_what_both_have(one, other):
    counted = np.zeros(SHAPE, int)
    counted[one.slices] += 1
    counted[other.slices] += 1
    both = one.overlap(other)
    assert both == other.overlap(one)
    assert (counted == 2).sum() == (0 if both is None else np.prod(both.shape))
    if both is not None:
        assert (counted[both.slices] == 2).all()
        whole = np.arange(np.prod(SHAPE)).reshape(SHAPE)
        for outer in (one, other):
            assert np.array_equal(whole[outer.slices][both.within(outer)], whole[both.slices])


@given(box=boxes())
def test_a_box_survives_json(box):
    assert Box.from_list(json.loads(json.dumps(box.to_list()))) == box
    assert box.within(Box.whole(SHAPE)) == box.slices and box.within(box) == Box.whole(box.shape).slices


def test_a_single_number_is_a_box_without_dims():
    point = Box.whole(())
    assert point.shape == () and point.overlap(point) == point and Box.from_list([]) == point
    assert np.array(7)[point.slices] == 7


@pytest.mark.parametrize("ranges", [[[2, 1]], [[-1, 2]], [[0, 1, 2]], [[0]], [[0, 1.0]], [[False, True]], [["0", "1"]]])
def test_what_is_no_box_is_refused(ranges):
    with pytest.raises(ValueError, match="no box|no list"):
        Box.from_list(ranges)


def test_boxes_of_other_arrays_are_refused():
    line, plane = Box.whole((3,)), Box.whole((3, 3))
    with pytest.raises(ValueError, match="not pieces of one array"):
        line.overlap(plane)
    for outer in (line, Box((1, 0), (3, 3)), Box.whole((2, 3))):
        with pytest.raises(ValueError, match="is not inside"):
            plane.within(outer)
