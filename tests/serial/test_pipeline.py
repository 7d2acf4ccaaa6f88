"""How a model is cut into stages, and who owns which weights."""

import itertools
import math

import numpy as np
import pytest
from tiny import tiny_config
from whole import engine_of

from mlm_mpi.comm.mesh import Mesh, placement
from mlm_mpi.config.rules import check_ranks
from mlm_mpi.errors import ConfigError
from mlm_mpi.params.ownership import Owned, ranges
from mlm_mpi.train.pipeline import cost_of, cut_parts, in_words
from mlm_mpi.train.table import _shared_out


@pytest.mark.parametrize("stages", range(1, 6))
def test_the_dearest_stage_is_as_cheap_as_any_cut_makes_it(stages):
    random = np.random.default_rng(stages)
    for _ in range(20):
        costs = random.integers(0, 9, random.integers(stages, 9)).tolist()
        found = cut_parts(costs, stages)
        assert [first for first, _ in found[1:]] == [stop for _, stop in found[:-1]]
        assert (found[0][0], found[-1][1]) == (0, len(costs)) and all(first < stop for first, stop in found)
        every = itertools.combinations(range(1, len(costs)), stages - 1)
        best = min(max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, len(costs)])) for cuts in every)
        assert max(sum(costs[first:stop]) for first, stop in found) == best


def test_a_part_costs_what_its_tokens_are_multiplied_by():
    config = tiny_config("model.layers=2", "model.width=32", "model.heads=4")
    embedding, block, other, head = engine_of(config, 64).machine.chain.parts
    assert cost_of(embedding) == 0 and cost_of(block) == cost_of(other) == 12 * 32 * 32 and cost_of(head) == 64 * 32


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 16])
def test_ranges_tile_the_store_and_boxes_the_parameters(kind, ranks):
    store = engine_of(tiny_config(f"model.kind={kind}"), 37).machine.store
    for whole_matrices in (False, True):
        every = ranges(store, ranks, whole_matrices)
        assert [a for a, _ in every[1:]] == [b for _, b in every[:-1]] and (every[0][0], every[-1][1]) == (
            0,
            store.size,
        )
        owners = [Owned(store, every, rank) for rank in range(ranks)]
        for span in store.spans:
            boxes = [box for owned in owners if (box := owned.boxes().get(span.parameter.name)) is not None]
            assert sum(math.prod(box.shape) for box in boxes) == span.stop - span.start
            assert not whole_matrices or span.parameter.matrices is None or len(boxes) == 1
        if not whole_matrices:
            rows = max((span.stop - span.start) // span.shape[0] for span in store.spans)
            assert all(abs((b - a) - store.size / ranks) <= 2 * rows for a, b in every), "equal but for a row"


def test_what_an_owner_has_are_views_of_the_store():
    store = engine_of(tiny_config(), 37).machine.store
    store.initialise(3)
    owned = Owned(store, ranges(store, 3, False), 1)
    for name, (box, view) in owned.named(owned.data).items():
        assert (view == store.named(store.data)[name][box.slices]).all() and np.shares_memory(view, store.data)


class Ranks:
    """What `placement` asks of a group: hosts of the world, or an extent."""

    def __init__(self, hosts):
        self.hosts, self.size, self.rank = hosts, len(hosts), 0

    def allgather(self, value, what):
        return list(self.hosts)


@pytest.mark.parametrize(
    ("hosts", "pp", "tp", "said"),
    [
        ("aaaa", 2, 2, "all ranks on one node"),
        ("aabb", 2, 2, "2 nodes, each group of tp on one, stages on several"),
        ("aabbaabb", 2, 2, "2 nodes, each group of tp on one, stages of a copy too"),
        ("abab", 1, 2, "2 of 2 groups of tp span nodes, of 2: give a node whole groups (--map-by slot)"),
        ("aaabbb", 1, 2, "1 of 3 groups of tp span nodes, of 2: give a node whole groups (--map-by slot)"),
    ],
)
def test_where_ranks_lie_that_share_a_model(hosts, pp, tp, said):
    sizes = {"pp": pp, "dp": len(hosts) // (pp * tp), "tp": tp}
    assert placement(Mesh(Ranks(hosts), {axis: Ranks("x" * size) for axis, size in sizes.items()})) == said
    assert placement(Mesh(Ranks(hosts))) == ""


def test_stages_are_told_in_words():
    assert in_words([(0, 2), (2, 3)], [0, 3, 1], 2) == "0–1 (75%), 2–2 (25%)"
    cuts = [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert in_words(cuts, [0, 2, 3, 4, 1], 2) == "0–1 and 3–3 (60%), 2–2 and 4–4 (40%)"


@pytest.mark.parametrize(
    ("words", "ranks", "text"),
    [
        (("mesh.tp=2",), 3, "need 2 ranks, the launcher gave 3: start 2 ranks, or set mesh.pp = 1 and mesh.tp = 1"),
        (("mesh.pp=2", "mesh.tp=2"), 2, "need 4 ranks, the launcher gave 2: start 4 ranks, or set mesh.pp = 1 and"),
        (("mesh.dp=2", "mesh.pp=2", "mesh.tp=2"), 2, "start 8 ranks, or set mesh.dp = 0, mesh.pp = 1 and mesh.tp = 2"),
        (("mesh.dp=3",), 2, "mesh.dp = 3, mesh.tp = 1 need 3 ranks, the launcher gave 2: set mesh.dp = 2"),
        (("mesh.tp=2",), 18, "train.lanes = 8 allows at most 16: start 16 ranks, or set train.lanes = 16, which"),
        (("train.micro_batches=8",), 9, "start 8 ranks, or set train.micro_batches = 9 and train.lanes = 9 (it"),
        (("mesh.tp=2", "comm.spares=1"), 3, "comm.spares = 1 hold all, and with mesh.tp = 2 each rank holds a part"),
        (("mesh.zero=2", "comm.spares=1"), 3, "with mesh.zero = 2 each rank holds a part: set comm.spares = 0, or"),
        (("mesh.dp=4", "comm.spares=1"), 4, "gave 4, 1 of them spares: set mesh.dp = 3"),
        (("comm.spares=1",), 12, "allows at most 9: start 9 ranks, or set train.lanes = 16"),
    ],
)
def test_a_mesh_that_does_not_fit_the_ranks_is_one_line(words, ranks, text):
    with pytest.raises(ConfigError) as caught:
        check_ranks(tiny_config(*words), ranks)
    assert text in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("mesh.tp=2", "numerics.products=bf16"), 'not "bf16"'),
        (("mesh.tp=3",), r"mesh.tp = 3 must be a power of two, at most numerics.shares = 8 \(of 8\): set mesh.tp = 2"),
        (("mesh.tp=16",), "set mesh.tp = 8"),
        (("mesh.tp=4", "numerics.shares=2"), "at most numerics.shares = 2"),
        (("mesh.tp=4", "mesh.sequence=true"), "mesh.sequence cuts model.context = 10, whose sums have 2 shares"),
        (("mesh.pp=2", "comm.reduction=allreduce"), 'mesh.pp = 2 needs comm.reduction = "canonical"'),
        (
            ("mesh.pp=2", "mesh.chunks=2"),
            'train.schedule = "single" does not heed mesh.chunks: set train.schedule = "interleaved"',
        ),
        (
            ("mesh.pp=2", "mesh.chunks=2", "train.schedule=zero_bubble"),
            'train.schedule = "zero_bubble" does not heed mesh.chunks',
        ),
        (
            ("mesh.chunks=2", "train.schedule=interleaved"),
            r"mesh.chunks = 2 .* mesh.pp = 1 makes one: set mesh.pp = 2 or more, or mesh.chunks = 1",
        ),
    ],
)
def test_what_a_mesh_cannot_do_is_refused_at_once(words, text):
    with pytest.raises(ConfigError, match=text):
        tiny_config(*words)


def test_a_single_copy_says_that_it_shares_nothing_out():
    assert _shared_out(0, 1) == "" and _shared_out(3, 2) == ", ZeRO-3"
    assert _shared_out(2, 1) == "; mesh.zero = 2 has nobody to share with, there is one copy"
