"""The signs of ranks are taken out of their stderr wherever it is cut, and the missing are named."""

import os

import pytest

from mlm_mpi.signs import Arrivals, Signs, arrival, sign

ERR = (
    b"a line\n"
    + arrival(1, "started")
    + b"50 %"
    + arrival(0, "started")
    + b"\r60 %\n"
    + arrival(1, "joining")
    + sign("unknown", "dropped")
    + b"end \x02 \x02mlm"
)
REST = b"a line\n50 %\r60 %\nend \x02 \x02mlm"


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_signs_are_taken_out_and_nothing_else(size):
    arrivals = Arrivals(3, "joined")
    signs = Signs({"arrival": arrivals.note})
    shown = b"".join(signs.feed(ERR[at : at + size]) for at in range(0, len(ERR), size))
    assert shown + signs.close() == REST
    assert arrivals.seen == 2
    assert arrivals.missing() == [0, 1, 2]
    assert arrivals.describe() == "rank 0 has not come to MPI_Init; rank 2 has not started; rank 1 waits in MPI_Init"


def test_what_is_no_sign_is_not_held_back():
    heard: list[str] = []
    signs = Signs({"word": heard.append})
    assert signs.feed(b"10 %") == b"10 %"
    assert signs.feed(b"\x02 a byte by chance") == b"\x02 a byte by chance"
    assert signs.feed(b"\x02mlm-mpi") == b""
    assert signs.feed(b" word 0 started h\xffre\n") == b""
    assert heard == ["0 started h\ufffdre"]


def test_a_sign_that_comes_late_does_not_take_a_rank_back():
    arrivals = Arrivals(1, "joined")
    for state in ("joined", "joining", "started"):
        arrivals.note(f"0 {state} here 1")
    assert arrivals.missing() == []
    assert str(os.getpid()).encode() in arrival(0, "joined")


@pytest.mark.parametrize("text", ["", "0 joined", "zero joined here 1", "0 asleep here 1"])
def test_a_sign_that_means_nothing_is_not_believed(text):
    arrivals = Arrivals(1, "joined")
    arrivals.note(text)
    assert arrivals.seen == 0


def test_a_rank_that_goes_further_than_it_must_has_arrived():
    arrivals = Arrivals(2, "started")
    arrivals.note("0 joined here 1")
    assert arrivals.missing() == [1]
