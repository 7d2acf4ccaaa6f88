"""Open MPI's banners are dropped from a job's stderr, and nothing else."""

import pytest

from mlm_mpi.banners import BannerFilter

DASHES = b"-" * 74 + b"\n"
EXIT = b"prterun detected that one or more processes exited with non-zero status,\nthus\n"
DEATH = b"prterun noticed that process rank 3 with PID 7 on node vm exited on\nsignal 11 (Segmentation fault).\n"
UNKNOWN = DASHES + b"There are not enough slots available\n" + DASHES


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (b"a\n" + DASHES + EXIT + DASHES + b"\0b\n", b"a\nb\n"),
        (DASHES + EXIT + DASHES + DASHES + EXIT + DASHES, b""),
        (UNKNOWN, UNKNOWN),
        (b"--- short\n-\n" + DASHES + b"table\n", b"--- short\n-\n" + DASHES + b"table\n"),
        (b"half a line " + DASHES + EXIT, b"half a line " + DASHES + EXIT),
        (DASHES + EXIT, DASHES + EXIT),  # never closed: shown at the end
        (b"\x00\xff 10 %\r20 %", b"\x00\xff 10 %\r20 %"),
    ],
)
def test_the_banner_filter_drops_banners_and_nothing_else(text, shown, size):
    banners = BannerFilter(lambda rank, number: None)
    out = b"".join(banners.feed(text[at : at + size]) for at in range(0, len(text), size))
    assert out + banners.close() == shown


def test_the_banner_filter_holds_nothing_back_that_is_no_banner():
    banners = BannerFilter(lambda rank, number: None)
    assert banners.feed(b"10 %\r") == b"10 %\r"
    assert banners.feed(b"- no banner") == b"- no banner"
    assert banners.feed(b"\n" + UNKNOWN[:90]) == b"\n" + UNKNOWN[:90]


def test_the_banner_filter_reports_a_death():
    deaths = []
    banners = BannerFilter(lambda rank, number: deaths.append((rank, number)))
    assert banners.feed(DASHES + DEATH + DASHES) == b""
    assert deaths == [(3, 11)]


NOISE = b"[vm:14184] PMIX ERROR: PMIX_ERR_UNREACH in file src/server/pmix_server.c at line 3146\n"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_banner_filter_drops_what_pmix_says_to_itself(size):
    banners = BannerFilter(lambda rank, number: None)
    text = NOISE + b"[a list] of things\n" + NOISE + b"[open"
    out = b"".join(banners.feed(text[at : at + size]) for at in range(0, len(text), size))
    assert out + banners.close() == b"[a list] of things\n[open"
    assert banners.passed
