"""The signs of ranks are taken out of their stderr wherever it is cut, and the missing are named."""

import os

import pytest

from mlm_mpi.arrivals import Arrivals, sign

ERR = (
    b"a line\n"
    + sign(1, "started")
    + b"50 %"
    + sign(0, "started")
    + b"\r60 %\n"
    + sign(1, "joining")
    + b"end \x02 \x02mlm"
)
REST = b"a line\n50 %\r60 %\nend \x02 \x02mlm"


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_signs_are_taken_out_and_nothing_else(size):
    arrivals = Arrivals(3, "joined")
    shown = b"".join(arrivals.feed(ERR[at : at + size]) for at in range(0, len(ERR), size))
    assert shown + arrivals.close() == REST
    assert arrivals.seen == 2
    assert arrivals.missing() == [0, 1, 2]
    assert arrivals.describe() == "rank 0 has not come to MPI_Init; rank 2 has not started; rank 1 waits in MPI_Init"


def test_what_is_no_sign_is_not_held_back():
    arrivals = Arrivals(1, "started")
    assert arrivals.feed(b"10 %") == b"10 %"
    assert arrivals.feed(b"\x02 a byte by chance") == b"\x02 a byte by chance"
    assert arrivals.feed(b"\x02mlm-mpi") == b""
    assert arrivals.feed(b" 0 started here 1\n") == b""
    assert arrivals.missing() == []


def test_a_sign_that_comes_late_does_not_take_a_rank_back():
    arrivals = Arrivals(1, "joined")
    for state in ("joined", "joining", "started"):
        arrivals.feed(sign(0, state))
    assert arrivals.missing() == []
    assert str(os.getpid()).encode() in sign(0, "joined")
