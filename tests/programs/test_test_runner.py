"""`mpiexec -n 3 python tests/parallel`: a failure on one rank ends all ranks at once and says where."""

import sys
import time
from pathlib import Path

import pytest
from programs import LAUNCH, SOON_S, ended

RUNNER = str(Path(__file__).parents[1] / "parallel")

ONE_RANK_FAILS = """
from mlm_mpi.comm import launch

def test_sum():
    assert launch.start().allgather(1, "ones") == [1, 1, 1]

def test_uneven():
    group = launch.start()
    assert group.rank != 1, "odd one out"
    group.barrier("all ranks")  # for ever, if nobody ends it
"""

ONE_RANK_CANNOT_IMPORT = """
from mlm_mpi.comm import launch
if launch.start().rank == 2:
    raise OSError("no such library")

def test_sum():
    launch.start().barrier("all ranks")
"""

ALL_PASS = """
from mlm_mpi.comm import launch

def test_sum():
    assert launch.start().allgather(1, "ones") == [1, 1, 1]
"""


@pytest.fixture
def runner(place):
    def run(body: str):
        folder = place.folder / "tests"
        folder.mkdir()
        (folder / "test_it.py").write_text(body)
        begin = time.monotonic()
        done = ended(place.popen([sys.executable, "-P", "-c", LAUNCH, "3", RUNNER, str(folder)]))
        assert time.monotonic() - begin < SOON_S
        return done

    return run


def test_a_failing_assert_on_one_rank(runner):
    done = runner(ONE_RANK_FAILS)
    assert done.code == 1
    assert "rank 1 of 3 failed in" in done.err and "test_it.py::test_uneven" in done.err
    assert "AssertionError: odd one out" in done.err
    assert "rank 0 of 3" not in done.err and "rank 2 of 3" not in done.err


def test_a_file_that_one_rank_cannot_import(runner):
    done = runner(ONE_RANK_CANNOT_IMPORT)
    assert done.code == 1
    assert "rank 2 of 3 failed in" in done.err and "OSError: no such library" in done.err


@pytest.mark.slow  # what `make test` does itself
def test_a_folder_that_passes(runner):
    done = runner(ALL_PASS)
    assert done.code == 0, done.err
    assert done.out.startswith("3 ranks: ") and done.out.count("1 passed") == 1
