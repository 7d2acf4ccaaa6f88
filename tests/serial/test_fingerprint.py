"""What decides bits is a fact of the fingerprint, and what does not is none."""

import numpy as np
import pytest
from numerics import same_bits
from tiny import tiny_config

from mlm_mpi.backend import choice, sums
from mlm_mpi.backend.cpu import library
from mlm_mpi.ops import dropout, embedding
from mlm_mpi.rng import key_of
from mlm_mpi.train.fingerprint import _SAME, fingerprint, unforeseen

LIBRARIES = {"libc", "numpy", "simd", "blas", "threads"}
pytestmark = pytest.mark.skipif(not library.runs("avx2"), reason="no kernels with a fused multiply-add here")


@pytest.fixture(autouse=True)
def restored():
    yield
    choice.select()


def facts(*overrides, plugins=None, level="auto"):
    config = tiny_config(*overrides)
    place = choice.place_of(config, level)
    return fingerprint(config, 3, place, plugins or {}, True)


def test_kernels_leave_nothing_to_libraries():
    found = facts()
    assert not LIBRARIES & set(found) and found["kernels"] == "fused multiply-add"
    others = [level for level in library.LEVELS[1:] if library.runs(level)]
    assert all(facts(level=level) == found for level in others)
    assert facts("numerics.threads=2") == found
    assert facts("numerics.reference=sums,dropout,embedding") == found
    assert facts("train.recompute=true", "train.schedule=gpipe") == found


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("numerics.shares=1", "shares"), ("train.lanes=4", "lanes"), ("train.micro_batches=8", "micro_batches"),
        ("train.rows=1", "rows"), ("comm.reduction=naive", "reduction"),
    ],
)  # fmt: skip
def test_what_is_added_to_what_is_a_fact(override, name):
    assert {key for key, value in facts(override).items() if facts().get(key) != value} == {name}


def test_a_level_without_fused_multiply_add_is_another():
    found = facts(level="base")
    assert "no fused multiply-add" in found["kernels"] and not LIBRARIES & set(found)


@pytest.mark.parametrize("override", ["numerics.reference=gelu", "numerics.reference=all", "train.dtype=float64"])
def test_where_numpy_computes_libraries_decide(override):
    found = facts(override)
    assert set(found) >= LIBRARIES and ("gelu" in found["reference"])
    assert (found["reference"] == ["gelu"]) == (override == "numerics.reference=gelu")


def test_without_kernels_and_with_plugins_libraries_decide():
    assert set(facts(level="off")) >= LIBRARIES and "matmul" in facts(level="off")["reference"]
    assert set(facts(plugins={"models/mine.py": "0"})) >= LIBRARIES


def test_a_kernel_that_could_not_run_makes_bits_incomparable():
    assert unforeseen(facts(), {}) is None
    assert unforeseen(facts(level="off"), {"matmul.add: empty": 1}) is None
    assert unforeseen(facts(), {"matmul.add: one row": 3}) == (
        "NumPy ran where no kernel's contract held (matmul.add: one row)"
    )


def test_references_that_are_no_fact_have_the_bits_of_their_kernels():
    random = np.random.default_rng(0)
    draw = dropout.Draw(0.3, key_of(1, "x"), 2, 3)
    leaves = random.standard_normal((5, 1000)).astype("f4")
    ids, dy = random.integers(0, 9, 300).astype("i4"), random.standard_normal((300, 37)).astype("f4")
    table = random.standard_normal((9, 37)).astype("f4")
    results = []
    for form in (lambda op: op, lambda op: op.__wrapped__):
        out, into = np.empty(1000, "f4"), table.copy()
        form(sums.tree)(list(leaves), [0, 1, 0, 2, 1], out)
        form(embedding.backward)(dy, ids, into)
        dropped = form(dropout.forward)(dy, draw, dy)
        results.append([out, into, dropped, form(embedding.forward)(ids, table)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert _SAME - {"cast", "sgd"} == {"sums", "embedding", "dropout"}, "those without a kernel on a CPU left out"
