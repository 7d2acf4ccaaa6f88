"""Collectives of a group: values, order, shared errors, and waits that end with a message."""

import numpy as np
import pytest

from mlm_mpi.errors import CommError, DataError, MlmError


def test_allgather_keeps_rank_order_and_uneven_sizes(group):
    values = group.allgather({"rank": group.rank, "text": "é" * group.rank, "none": None}, "values")
    assert values == [{"rank": r, "text": "é" * r, "none": None} for r in range(group.size)]


def test_allgather_keeps_every_bit_of_a_float(group):
    mine = float(np.random.default_rng(group.rank).standard_normal()) * 1e-300
    expected = [float(np.random.default_rng(r).standard_normal()) * 1e-300 for r in range(group.size)]
    assert group.allgather(mine, "floats") == expected


def test_allgather_array_of_any_shape(group):
    row = np.full((2, 3), group.rank, np.float64)
    table = group.allgather_array(row, "rows")
    assert table.shape == (group.size, 2, 3)
    assert (table == np.arange(group.size)[:, None, None]).all()


def test_broadcast_is_rank_zeros(group):
    assert group.broadcast(group.rank + 7, "a number") == 7


def test_together_passes_without_error(group):
    with group.together("a quiet phase"):
        pass


def test_together_gives_one_ranks_error_to_all_and_names_it(group):
    culprit = group.size - 1
    with pytest.raises(MlmError, match="the shard is torn") as caught, group.together("a phase"):
        if group.rank == culprit:
            raise DataError("the shard is torn")
    assert caught.value.agreed
    assert group.size == 1 or str(caught.value).startswith(f"rank {culprit}: ")


def test_together_leaves_a_common_error_as_it_is(group):
    with pytest.raises(DataError, match="^no corpus$") as caught, group.together("a phase"):
        raise DataError("no corpus")
    assert caught.value.agreed


def test_a_wait_that_lasts_too_long_names_what_and_whom(group):
    impatient = group.with_timeout(0.2)
    with pytest.raises(CommError, match=r"for a gradient from rank 3, 5 of .* comm.timeout_s"):
        impatient.wait_until(lambda: [5, 3, 5], "a gradient")
    with pytest.raises(CommError, match="for a barrier from the others"):
        impatient.wait_until(list, "a barrier")
    group.barrier("the end")
