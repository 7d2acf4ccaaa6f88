"""A group of ranks: whom a collective talks to, how long it waits, and what it says when nobody comes.

Every wait of the program ends in `Group.wait_until`: it polls (an MPI without a progress thread moves only
inside calls), gives the core away while it waits, and after `timeout_s` raises a CommError that names
the ranks that did not arrive and what they did last. Only the splitting of a communicator blocks inside
MPI, after a wait for all. A group of one needs no MPI.
"""

import ctypes
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mlm_mpi.comm.company import Company
from mlm_mpi.errors import CommError, MlmError, agreed, ranges

_SPIN_S = 0.002  # polls at full speed for this long, then sleeps between polls
_NAP_S = 0.0002
_LONG_S = 0.1  # after this a waiting rank also listens for ranks whose patience has ended


class Group:
    """`size` ranks that can exchange messages; mine is `rank`."""

    def __init__(self, comm: Any = None, timeout_s: float = 600.0, company: Company | None = None) -> None:
        self.comm = comm  # an mpi4py communicator; None: alone
        self.company = company  # all ranks of the job; None: waits name no culprit
        self.rank: int = comm.Get_rank() if comm is not None else 0
        self.size: int = comm.Get_size() if comm is not None else 1
        self.timeout_s = timeout_s

    @classmethod
    def of_world(cls, comm: Any) -> "Group":
        """All ranks of the job. Collective over `comm`."""
        return cls(comm, company=Company(comm) if comm.Get_size() > 1 else None)

    def with_timeout(self, timeout_s: float) -> "Group":
        """The same ranks, waiting for another time."""
        return Group(self.comm, timeout_s, self.company)

    def duplicate(self) -> "Group":
        """The same ranks on a communicator of their own, so that tags cannot meet. Collective."""
        if self.comm is None:
            return Group(None, self.timeout_s)
        comm, request = self.comm.Idup()
        self.wait(request, "a communicator")
        return Group(comm, self.timeout_s, self.company)

    def note(self, text: str) -> None:
        """Says what this rank does from now on, for others to read should it never arrive."""
        if self.company is not None:
            self.company.note(text)

    def on_node(self) -> tuple[int, int]:
        """(my number among the ranks of my node, how many they are). Collective."""
        if self.comm is None:
            return 0, 1
        from mpi4py import MPI

        self.barrier("a communicator of the node")  # MPI has no split that can be polled
        node = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        place = node.Get_rank(), node.Get_size()
        node.Free()
        return place

    def highest_tag(self) -> int:
        """The largest tag that the MPI library takes."""
        if self.comm is None:
            return 2**31 - 1
        from mpi4py import MPI

        return int(self.comm.Get_attr(MPI.TAG_UB))

    def reads_gpus(self) -> bool:
        """Whether the MPI library says that it sends from and receives into a GPU's memory."""
        if self.size == 1:
            return False
        maps = Path("/proc/self/maps").read_text().splitlines()
        paths = {line.split(maxsplit=5)[5] for line in maps if "libmpi" in line}
        libraries = [ctypes.CDLL(path) for path in sorted(paths)]
        found = [lib.MPIX_Query_cuda_support for lib in libraries if hasattr(lib, "MPIX_Query_cuda_support")]
        return bool(found and found[0]())

    def wait_until(self, awaited: Callable[[], Sequence[int] | None], what: str) -> float:
        """Calls `awaited` until it returns None; returns the seconds it took.

        Meanwhile it returns the ranks still awaited (empty: not known), to be named if they never come.
        """
        start = time.perf_counter()
        if self.company is not None:
            self.company.note(what, waits=True)
        while True:
            ranks = awaited()
            waited = time.perf_counter() - start
            if ranks is None:
                self.note(f"went on after {what}")
                return waited
            if waited > self.timeout_s:
                error = self._nobody_came(waited, what, ranks)
                if awaited() is not None:  # they may have come while the roll was called
                    raise error
                continue
            if waited < _SPIN_S:
                os.sched_yield()
            else:
                time.sleep(_NAP_S)
            if waited > _LONG_S and self.company is not None:
                self.company.answer()

    def _nobody_came(self, waited_s: float, what: str, awaited: Sequence[int]) -> CommError:
        remedy = f"(comm.timeout_s = {self.timeout_s:g}): look at what holds them up, or raise comm.timeout_s"
        if self.company is not None:
            teller, found = self.company.absent(what, waited_s)
            return CommError(f"{found} {remedy}", teller)
        if self.size == 1:
            return CommError(f"waited {waited_s:.0f} s for {what} {remedy}")
        who = f"rank {ranges(sorted(set(awaited)))}" if awaited else "the others"
        return CommError(f"waited {waited_s:.0f} s for {what} from {who} of {self.size} ranks {remedy}")

    def wait(self, request: Any, what: str) -> float:
        """Polls one request to its end; returns the seconds it took."""
        return self.wait_until(lambda: None if request.Test() else (), what)

    def allgather_array(self, row: np.ndarray, what: str) -> np.ndarray:
        """Everybody's row. Collective. Shapes: (n,) of one dtype everywhere -> (size, n)."""
        if self.size == 1:
            return row[None].copy()
        out = np.empty((self.size, *row.shape), row.dtype)
        self.wait(self.comm.Iallgather(np.ascontiguousarray(row), out), what)
        return out

    def gather_parts(self, whole: np.ndarray, counts: Sequence[int], what: str) -> None:
        """Everybody's part of an array, which holds mine: counts[0] elements of rank 0, and so on. Collective."""
        if self.size > 1:
            from mpi4py import MPI

            self.wait(self.comm.Iallgatherv(MPI.IN_PLACE, [whole, np.array(counts, np.int64)]), what)

    def allgather(self, value: Any, what: str) -> list[Any]:
        """Everybody's value, in rank order. Collective. Values travel as JSON: plain data only."""
        if self.size == 1:
            return [value]
        mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
        counts = self.allgather_array(np.array([mine.size], np.int64), what)[:, 0]
        out = np.empty(int(counts.sum()), np.uint8)
        starts = np.concatenate([[0], np.cumsum(counts)])
        self.wait(self.comm.Iallgatherv(mine, [out, counts.astype(np.int32)]), what)
        return [json.loads(out[a:b].tobytes()) for a, b in itertools.pairwise(starts)]

    def broadcast(self, value: Any, what: str) -> Any:
        """Rank 0's value. Collective. Plain data only."""
        return self.allgather(value if self.rank == 0 else None, what)[0]

    def barrier(self, what: str) -> None:
        """Returns when all have arrived. Collective."""
        if self.size > 1:
            self.wait(self.comm.Ibarrier(), what)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A phase without communication that all ranks pass, or all leave with the same error. Collective.

        An MlmError on any rank is raised on every rank when the phase ends, naming the rank unless all
        ranks say the same. Any other exception goes straight through, and the job aborts.
        """
        error: MlmError | None = None
        try:
            yield
        except MlmError as caught:
            error = caught
        reports = self.allgather(str(error) if error else None, what)
        found = [(rank, text) for rank, text in enumerate(reports) if text is not None]
        if not found:
            return
        rank, text = found[0]
        same = len(found) == self.size and len({text for _, text in found}) == 1
        raise agreed(type(error)(text) if error and same else MlmError(text if same else f"rank {rank}: {text}"))
