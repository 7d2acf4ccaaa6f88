"""Collectives of a group: values, order, shared errors, and waits that end with a message."""

import os
import time

import numpy as np
import pytest

from mlm_mpi.comm.company import Company
from mlm_mpi.comm.group import Group
from mlm_mpi.comm.neighbours import Records
from mlm_mpi.comm.watch import Work
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


def test_a_wait_that_lasts_too_long_names_what_and_whom():
    """Without a company a wait knows only what its caller says."""
    impatient = Group(timeout_s=0.2)
    impatient.size = 9
    with pytest.raises(CommError, match=r"for a gradient from rank 3, 5 of .* comm.timeout_s"):
        impatient.wait_until(lambda: [5, 3, 5], "a gradient")
    with pytest.raises(CommError, match="for a barrier from the others of 9 ranks"):
        impatient.wait_until(list, "a barrier")
    with pytest.raises(CommError, match=r"waited 0 s for a disk \(comm.timeout_s = 0.2\): look"):
        Group(timeout_s=0.2).wait_until(list, "a disk")


@pytest.mark.parametrize("culprit", [0, -1], ids=["first", "last"])
def test_the_rank_that_did_not_arrive_is_named_by_one_of_the_others(group, culprit):
    """Ranks of a node read each other's signs; between nodes the roll is called."""
    if group.size not in (3, 5):
        pytest.skip("on 3 ranks of one node and on 5 of two")
    nodes = group.size // 2
    culprit %= group.size
    mine = group.comm.Split(group.rank % nodes)
    company = Company(group.comm, mine)
    impatient = Group(group.comm, 0.3, company)
    if group.rank == culprit:
        company.note("step 7, micro-batch 3")
        time.sleep(2)  # and answers nobody
        tellers = group.allgather(None, "who tells")
    else:
        with pytest.raises(CommError) as caught:
            impatient.wait_until(list, "the losses of step 7")
        text, teller = str(caught.value), caught.value.teller
        if teller == group.rank:
            assert text.startswith(
                f"rank {culprit} did not arrive, {group.size - 1} of {group.size} ranks wait for the "
            )
            assert f"; rank {culprit} did last, " in text and " s ago: step 7, micro-batch 3 (process " in text
            assert text.endswith("(comm.timeout_s = 0.3): look at what holds them up, or raise comm.timeout_s")
        tellers = group.allgather(teller, "who tells")
    assert tellers[culprit] is None
    assert any(teller == rank for rank, teller in enumerate(tellers)), "somebody tells"
    assert culprit not in tellers


def test_where_all_wait_each_wait_is_named(group):
    if group.size not in (2, 4):
        pytest.skip("on 2 ranks and on 4")
    impatient = Group(group.comm, 0.3, Company(group.comm))
    with pytest.raises(CommError) as caught:
        impatient.wait_until(list, f"message {group.rank // 2}")
    group.barrier("the end")
    if caught.value.teller == group.rank:
        assert str(caught.value).startswith(f"all {group.size} ranks wait: rank 0-1 for message 0")


def test_who_has_moved_meanwhile_is_not_killed(group, tmp_path):
    if group.size != 2:
        pytest.skip("on 2 ranks")
    company = Company(group.comm)
    company.watch(1.0, Records(tmp_path / "stacks", tmp_path / "failures"))
    company.note("step 1, micro-batch 2, backward", work=Work("backward", 0, 2))
    group.barrier("signs to be there")
    seen = [sign for sign in company.here() if sign.rank == 1]
    group.barrier("signs to be read")
    if group.rank == 1:
        company.note("step 1, micro-batch 2, backward", work=Work("backward", 0, 2))
    group.barrier("rank 1 to have moved")
    if group.rank == 0:
        assert (seen[0].step, seen[0].micro) == (0, 2)
        assert not company.put_down(seen, "it seemed to have stalled", 0)
        assert "in barrier" in (tmp_path / "stacks" / "rank-1.txt").read_text()
        assert not (tmp_path / "failures").exists(), "nobody has failed"
    group.barrier("both to be alive")


def test_a_sign_is_cut_at_its_slot_and_read_by_the_node(group):
    company = Company(group.comm) if group.comm is not None else None
    if company is None:
        pytest.skip("no MPI")
    company.note(f"é{group.rank}" * 200, waits=True)
    group.barrier("all have written")
    signs = company.here()
    assert [sign.rank for sign in signs] == list(range(group.size))
    assert all(sign.waits and sign.text.startswith(f"é{sign.rank}é") for sign in signs)
    assert signs[group.rank].process == os.getpid() and not signs[group.rank].stopped
    group.barrier("all have read")
