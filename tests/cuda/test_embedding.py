import numpy as np
import pytest
from agreement import assert_close, device, run, same_bits, shifted

from mlm_mpi.ops import embedding


@pytest.mark.parametrize("columns", [1, 7, 333, 1000])
@pytest.mark.parametrize("place", [device, shifted])
def test_forward(gpu, dtype, columns, place, rng):
    table, ids = rng.normal(size=(11, columns)).astype(dtype), rng.integers(0, 11, (3, 5)).astype("i4")
    out = run(embedding.forward, device(ids), place(table))
    assert out.shape == (3, 5, columns) and same_bits(out, device(table[ids]))


def test_forward_of_more_rows_than_the_grid_has(gpu, dtype, rng, monkeypatch):
    monkeypatch.setattr(gpu, "processors", 1)  # 64 rows a round
    table, ids = rng.normal(size=(11, 24)).astype(dtype), rng.integers(0, 11, 150).astype("i4")
    assert same_bits(run(embedding.forward, device(ids), device(table)), device(table[ids]))


# runs inside a chunk of 32 positions, over a border, over many chunks, over more chunks than a warp has lanes
IDS = {
    "one": [3],
    "distinct": list(range(70)),
    "equal": [2] * 70,
    "long": [5] * 1100 + [6] * 3,
    "borders": [0] * 31 + [1] * 2 + [2] * 31 + [3] * 64 + [4],
    "mixed": [i * i % 7 for i in range(150)],
}


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("columns", [8, 333])
def test_backward(gpu, dtype, name, columns, rng):
    if name == "long":
        columns = 5
    ids = rng.permutation(np.array(IDS[name], "i4"))
    dy, table = rng.normal(size=(ids.size, columns)).astype(dtype), rng.normal(size=(70, columns)).astype("f4")
    found, again, exact = device(table), shifted(table), table.astype("f8")
    run(embedding.backward, device(dy), device(ids), found)
    run(embedding.backward, shifted(dy), device(ids), again)
    embedding.backward.__wrapped__(dy.astype("f8"), ids, exact)
    assert_close(found, exact, "f4")
    assert same_bits(found, again), "any address, twice"


def test_ids_outside_the_table(gpu, dtype, rng):
    ids = np.array([1, 9, -1, 4, 9, 2**31 - 1, -(2**31)] * 12, "i4")
    table, dy = rng.normal(size=(9, 40)).astype(dtype), rng.normal(size=(ids.size, 40)).astype(dtype)
    known = (ids >= 0) & (ids < 9)
    out = run(embedding.forward, device(ids), device(table)).get().astype("f8")
    assert np.isnan(out[~known]).all() and np.array_equal(out[known], table[ids[known]].astype("f8"))
    found, exact = device(np.zeros((9, 40), "f4")), np.zeros((9, 40))
    run(embedding.backward, device(dy), device(ids), found)
    embedding.backward.__wrapped__(dy[known].astype("f8"), ids[known], exact)
    assert_close(found, exact, "f4")


def test_not_finite_stays_in_its_row(gpu, dtype, rng):
    dy, table = rng.normal(size=(40, 24)).astype(dtype), device(np.zeros((4, 24), "f4"))
    dy[6, 3] = np.inf
    run(embedding.backward, device(dy), device(np.arange(40).astype("i4") % 4), table)
    assert np.argwhere(~np.isfinite(table.get())).tolist() == [[2, 3]]


def test_nothing_to_add(gpu, dtype):
    table = device(np.ones((3, 8), "f4"))
    run(embedding.backward, device(np.zeros((0, 8), dtype)), device(np.zeros(0, "i4")), table)
    assert (table.get() == 1).all()
