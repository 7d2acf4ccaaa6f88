"""`mpiexec -n N python tests/parallel [FOLDER]`: every rank runs the same tests; only rank 0 reports.

A failing assert on one rank would leave the others in a collective for ever. So the rank that fails says
who it is and which test, with the traceback, and ends the whole job.
"""

import os
import shutil
import sys
import traceback
from pathlib import Path

import pytest

from mlm_mpi.comm import launch


class AbortAll:
    """Ends all ranks when a test fails on one."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def pytest_exception_interact(self, node, call, report) -> None:
        where = f"rank {self.rank} of {self.size} failed in {node.nodeid}"
        lines = "".join(traceback.format_exception(call.excinfo.value)) if call.excinfo else str(report.longrepr)
        sys.__stderr__.write(f"\n{where}\n{lines}")
        sys.__stderr__.flush()
        if self.size > 1:
            from mpi4py import MPI

            MPI.COMM_WORLD.Abort(1)


def main() -> int:
    group = launch.start()
    words = sys.argv[1:]
    folder = [] if any(Path(word).exists() for word in words) else [str(Path(__file__).parent)]
    # ranks that tidy up one folder meet in it; what a failure leaves is there to be looked at until the next run
    own = Path(__file__).parents[2] / "build" / "tests" / f"rank{group.rank}-of-{group.size}"
    own.parent.mkdir(parents=True, exist_ok=True)
    arguments = ["-p", "no:cacheprovider", "-W", "error", "--basetemp", str(own), *words, *folder]
    if group.rank == 0:
        print(f"{group.size} rank{'s' * (group.size > 1)}: ", end="", flush=True)
        arguments += ["-q", "--color=no"]
    else:
        arguments += ["-p", "no:terminal"]
    code = pytest.main(arguments, plugins=[AbortAll(group.rank, group.size)])
    if code:
        os._exit(int(code))  # the launcher ends the others
    group.barrier("the end of the tests")
    shutil.rmtree(own, ignore_errors=True)  # no test may have used it
    launch.finish()
    return int(code)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
