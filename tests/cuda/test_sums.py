import cupy
import numpy as np
import pytest
from agreement import device, run, same_bits, shifted

from mlm_mpi.backend import registry, sums
from mlm_mpi.comm.tree import merges_of

TREES = {  # name -> merges, as reductions make them
    "one": [0],
    "lanes": merges_of((0, 5), [(lane, lane + 1) for lane in range(5)]),
    "subtrees": merges_of((0, 8), [(0, 4), (4, 6), (6, 7), (7, 8)]),
    "right": [0, 0, 0, 3],
    "most": merges_of((0, 16), [(lane, lane + 1) for lane in range(16)]),
}


@pytest.mark.parametrize("name", TREES)
def test_tree(gpu, name, rng):
    merges = TREES[name]
    size, place = 333, (shifted if name == "lanes" else device)
    leaves = [(rng.normal(size=size) * 10.0 ** rng.integers(-6, 6, size)).astype("f4") for _ in merges]
    wanted = np.empty(size, "f4")
    sums.tree.__wrapped__(leaves, merges, wanted)
    placed, out = [place(leaf) for leaf in leaves], place(np.full(size, np.nan, "f4"))
    run(sums.tree, placed, merges, out)
    assert same_bits(out, device(wanted)), "the same tree, so the same bits"
    assert all(same_bits(a, device(b)) for a, b in zip(placed, leaves, strict=True)), "leaves are only read"
    for position in {0, len(merges) - 1}:
        own = [cupy.array(leaf) for leaf in placed]
        run(sums.tree, own, merges, own[position])
        assert same_bits(own[position], out), "out may be a leaf"


def test_not_finite_stays_where_it_is(gpu, rng):
    leaves = rng.normal(size=(3, 40)).astype("f4")
    leaves[1, 6] = np.inf
    out = device(np.zeros(40, "f4"))
    run(sums.tree, [device(leaf) for leaf in leaves], [0, 1, 1], out)
    assert np.flatnonzero(~np.isfinite(out.get())).tolist() == [6]


def test_more_leaves_than_a_launch_takes_are_the_references(gpu, rng):
    leaves, merges = rng.normal(size=(17, 9)).astype("f4"), [0] + [1] * 16
    out, wanted = device(np.zeros(9, "f4")), np.empty(9, "f4")
    sums.tree([device(leaf) for leaf in leaves], merges, out)
    sums.tree.__wrapped__(list(leaves), merges, wanted)
    assert same_bits(out, device(wanted)) and registry.fallbacks() == {"sums.tree: more than 16 leaves": 1}
