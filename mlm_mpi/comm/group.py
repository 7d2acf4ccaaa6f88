"""A group of ranks: whom a collective talks to, how long it waits, and what it says when nobody comes.

Every wait of the program ends in `Group.wait`: it polls (an MPI without a progress thread moves only
inside calls), gives the core away while it waits, and after `timeout_s` raises a CommError that says
what was awaited, by whom and from whom. No call here blocks inside MPI. A group of one needs no MPI.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np

from mlm_mpi.errors import CommError, MlmError

_SPIN_S = 0.002  # polls at full speed for this long, then sleeps between polls
_NAP_S = 0.0002


class Group:
    """`size` ranks that can exchange messages; mine is `rank`."""

    def __init__(self, comm: Any = None, timeout_s: float = 600.0) -> None:
        self.comm = comm  # an mpi4py communicator; None: alone
        self.rank: int = comm.Get_rank() if comm is not None else 0
        self.size: int = comm.Get_size() if comm is not None else 1
        self.timeout_s = timeout_s

    def with_timeout(self, timeout_s: float) -> "Group":
        """The same ranks, waiting for another time."""
        return Group(self.comm, timeout_s)

    def duplicate(self) -> "Group":
        """The same ranks on a communicator of their own, so that tags cannot meet. Collective."""
        return Group(self.comm.Dup() if self.comm is not None else None, self.timeout_s)

    def wait(self, requests: Sequence[Any], what: str, sources: Sequence[int] = ()) -> float:
        """Polls until all requests are done; returns the seconds it took.

        `sources[i]` is the rank that request i waits for, to be named if it never comes.
        """
        start = time.perf_counter()
        pending = list(range(len(requests)))
        while True:
            pending = [i for i in pending if not requests[i].Test()]
            waited = time.perf_counter() - start
            if not pending:
                return waited
            if waited > self.timeout_s:
                who = sorted({sources[i] for i in pending if i < len(sources)})
                named = f"rank {', '.join(map(str, who))}" if who else "the others"
                raise CommError(
                    f"waited {waited:.0f} s (comm.timeout_s = {self.timeout_s:g}) for {what} from {named} "
                    f"of {self.size} ranks: look at what that rank does, or raise comm.timeout_s"
                )
            if waited < _SPIN_S:
                os.sched_yield()
            else:
                time.sleep(_NAP_S)

    def allgather_array(self, row: np.ndarray, what: str) -> np.ndarray:
        """Everybody's row. Collective. Shapes: (n,) of one dtype everywhere -> (size, n)."""
        if self.size == 1:
            return row[None].copy()
        out = np.empty((self.size, *row.shape), row.dtype)
        self.wait([self.comm.Iallgather(np.ascontiguousarray(row), out)], what)
        return out

    def allgather(self, value: Any, what: str) -> list[Any]:
        """Everybody's value, in rank order. Collective. Values travel as JSON: plain data only."""
        if self.size == 1:
            return [value]
        mine = np.frombuffer(msgspec.json.encode(value), np.uint8)
        counts = self.allgather_array(np.array([mine.size], np.int64), what)[:, 0]
        out = np.empty(int(counts.sum()), np.uint8)
        starts = np.concatenate([[0], np.cumsum(counts)])
        self.wait([self.comm.Iallgatherv(mine, [out, counts.astype(np.int32)])], what)
        return [msgspec.json.decode(out[a:b].tobytes()) for a, b in zip(starts[:-1], starts[1:], strict=True)]

    def broadcast(self, value: Any, what: str) -> Any:
        """Rank 0's value. Collective. Plain data only."""
        return self.allgather(value if self.rank == 0 else None, what)[0]

    def barrier(self, what: str) -> None:
        """Returns when all have arrived. Collective."""
        if self.size > 1:
            self.wait([self.comm.Ibarrier()], what)

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
        agreed = type(error)(text) if error and same else MlmError(text if same else f"rank {rank}: {text}")
        agreed.agreed = True
        raise agreed

    def abort(self, code: int) -> None:
        """Ends the whole job at once."""
        if self.comm is not None:
            self.comm.Abort(code)
        os._exit(code)
