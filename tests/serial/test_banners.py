"""Open MPI's banners are dropped from a job's stderr, and nothing else."""

import pytest

from mlm_mpi.banners import BannerFilter, EchoFilter

DASHES = b"-" * 74 + b"\n"
EXIT = b"prterun detected that one or more processes exited with non-zero status,\nthus\n"
DEATH = b"prterun noticed that process rank 3 with PID 7 on node vm exited on\nsignal 11 (Segmentation fault).\n"
UNKNOWN = DASHES + b"There are not enough slots available\n" + DASHES

# Recorded on two nodes under Slurm 22.05, Open MPI 5.0.11: a node or its daemon is lost, and mpirun exits with 0; ...
LOST = (
    DASHES
    + b"""PRTE has lost communication with a remote daemon.

  HNP daemon   : [prterun-node1-637@0,0] on node node1
  Remote daemon: [prterun-node1-637@0,1] on node node2

This is usually due to either a failure of the TCP network
connection to the node, or possibly an internal failure of
the daemon itself. We cannot recover from this failure, and
therefore will terminate the job.
"""
    + DASHES
    + b"\0"
)

# ... scancel ends the daemon of the other node; a daemon that cannot be started gives the same with 512; ...
SRUN = (
    DASHES
    + b"""srun returned non-zero exit status (36608) from launching
the per-node daemon. You may debug this problem further
by augmenting the cmd line with:

* "--debug-daemons"
* "--leave-session-attached"
* "--prtemca plm_base_verbose N" where N > 0
"""
    + DASHES
    + b"\0"
)

# ... a rank of the other node calls MPI_Abort.
ABORT = (
    DASHES
    + b"""MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD
  Proc: [[8495,1],1]
  Errorcode: 4

NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.
You may or may not see output from other processes, depending on
exactly when Open MPI kills them.
"""
    + DASHES
    + DASHES
    + b"""prterun has exited due to process rank 1 with PID 640 on node node2 calling
"abort". This may have caused other processes in the application to be
terminated by signals sent by prterun (as reported here).
"""
    + DASHES
    + b"\0"
)


def ignore(*what: object) -> None:
    """Takes a report and does nothing with it."""


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (b"a\n" + DASHES + EXIT + DASHES + b"\0b\n", b"a\nb\n"),
        (DASHES + EXIT + DASHES + DASHES + EXIT + DASHES, b""),
        (UNKNOWN, UNKNOWN),
        (UNKNOWN + b"\0", UNKNOWN),
        (b"mine\n" + LOST + b"mine\n", b"mine\nmine\n"),
        (SRUN + b"srun: error: mine\n", b"srun: error: mine\n"),
        (b"mine\n" + ABORT, b"mine\n"),
        (b"mine\0\0\n\0\n" + DASHES[1:] + b"\0", b"mine\0\0\n\0\n" + DASHES[1:] + b"\0"),
        (DASHES + b"PRTE has lost my keys\n" + DASHES, DASHES + b"PRTE has lost my keys\n" + DASHES),
        (b"--- short\n-\n" + DASHES + b"table\n", b"--- short\n-\n" + DASHES + b"table\n"),
        (b"half a line " + DASHES + EXIT, b"half a line " + DASHES + EXIT),
        (DASHES + EXIT, DASHES + EXIT),  # never closed: shown at the end
        (b"\x00\xff 10 %\r20 %", b"\x00\xff 10 %\r20 %"),
    ],
)
def test_the_banner_filter_drops_banners_and_nothing_else(text, shown, size):
    banners = BannerFilter(ignore, ignore)
    out = b"".join(banners.feed(text[at : at + size]) for at in range(0, len(text), size))
    assert out + banners.close() == shown


def test_the_banner_filter_holds_nothing_back_that_is_no_banner():
    banners = BannerFilter(ignore, ignore)
    assert banners.feed(b"10 %\r") == b"10 %\r"
    assert banners.feed(b"- no banner") == b"- no banner"
    assert banners.feed(b"\n" + UNKNOWN[:90]) == b"\n" + UNKNOWN[:90]


def test_the_banner_filter_reports_a_death():
    deaths = []
    banners = BannerFilter(lambda *death: deaths.append(death), ignore)
    assert banners.feed(DASHES + DEATH + DASHES) == b""
    assert deaths == [(3, 11)]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("text", "what"),
    [
        (LOST, "node2"),
        (LOST.replace(b"PRTE", b"ORTE"), "node2"),
        (SRUN, "a node: srun ended with 143"),
        (SRUN.replace(b"36608", b"512"), "a node: srun ended with 2"),
    ],
)
def test_the_banner_filter_reports_a_lost_node(text, what, size):
    losses = []
    banners = BannerFilter(ignore, losses.append)
    assert b"".join(banners.feed(text[at : at + size]) for at in range(0, len(text), size)) == b""
    assert losses == [what] and banners.passed


NOISE = b"[vm:14184] PMIX ERROR: PMIX_ERR_UNREACH in file src/server/pmix_server.c at line 3146\n"
EPOLL = b"[warn] Epoll MOD(1) on fd 20 failed. Old events were 6; read change was 0 (none): Bad file descriptor\n"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_banner_filter_drops_what_pmix_says_to_itself(size):
    banners = BannerFilter(ignore, ignore)
    text = NOISE + b"[a list] of things\n" + EPOLL + NOISE + b"[open"
    out = b"".join(banners.feed(text[at : at + size]) for at in range(0, len(text), size))
    assert out + banners.close() == b"[a list] of things\n[open"
    assert banners.passed


NBC = b"NBC_Progress: an error 75 was found during schedule 0x5587fc7cbc80 at row-offset 0 - aborting the schedule\n"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_banner_filter_drops_what_collectives_say_of_a_death(size):
    """Each rank writes its line and an empty one, between those of others."""
    banners = BannerFilter(ignore, ignore)
    text = b"a line\n" + NBC + NBC + b"\nmore\n\n\n" + b"NBC is no noise\n"
    out = b"".join(banners.feed(text[at : at + size]) for at in range(0, len(text), size))
    assert out + banners.close() == b"a line\nmore\n\nNBC is no noise\n"


@pytest.mark.parametrize("size", [1, 3, 8, 1000])
def test_what_another_rank_has_said_is_not_said_again(size):
    said = (
        b"mlm-mpi: no corpus\nmlm-mpi: rank 1: no corpus\nmlm-mpi: rank 2: disk full\nwarning\nwarning\n"
        b"x mlm-mpi: no corpus\nmlm-mpi: rank 3: disk full\nmlm-mpi: rank 1: no corpus\nmlm-m"
    )
    echoes = EchoFilter()
    shown = b"".join(echoes.feed(said[at : at + size]) for at in range(0, len(said), size)) + echoes.close()
    assert shown == (b"mlm-mpi: no corpus\nmlm-mpi: rank 2: disk full\nwarning\nwarning\nx mlm-mpi: no corpus\nmlm-m")


def test_only_a_line_of_ours_is_held_back():
    echoes = EchoFilter()
    assert echoes.feed(b"50 %") == b"50 %"
    assert echoes.feed(b"\rmlm-mpi: ") == b"\rmlm-mpi: "
    assert echoes.feed(b"\nmlm-mpi: half") == b"\n"
    assert echoes.feed(b" a line\n") == b"mlm-mpi: half a line\n"
