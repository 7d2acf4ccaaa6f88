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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlm_mpi.comm.board import Sign
from mlm_mpi.comm.company import Company
from mlm_mpi.comm.lookout import Post, listening, token
from mlm_mpi.comm.mailbox import Mailbox, Message
from mlm_mpi.comm.neighbours import Records
from mlm_mpi.comm.watch import NO_WORK, Work
from mlm_mpi.errors import CommError, MlmError, PeerLost, agreed, ranges

_SPIN_S = 0.002  # polls at full speed for this long, then sleeps between polls
_NAP_S = 0.0002
_COUNT = 1 << 28  # elements of a message: older MPIs count in 31 bits
_TAGS = 32767  # at least, says MPI 4.1, section 9.1.2
_LONG_S = 0.1  # after this a waiting rank also listens for ranks whose patience has ended


class Group:
    """`size` ranks that can exchange messages; mine is `rank`."""

    def __init__(
        self, comm: Any = None, timeout_s: float = 600.0, company: Company | None = None, mail: Mailbox | None = None,
        members: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.comm = comm  # an mpi4py communicator; None: alone
        self.company = company  # all ranks of the job; None: waits name no culprit
        if mail is None and comm is not None:
            mail = company.mailbox(comm) if company is not None else Mailbox(comm)
        self._mail = mail
        self.rank: int = comm.Get_rank() if comm is not None else 0
        self.size: int = comm.Get_size() if comm is not None else 1
        self.timeout_s, self.waited_s = timeout_s, 0.0  # in all
        self.members = range(self.size) if members is None else members  # their ranks in the company

    @classmethod
    def of_world(cls, comm: Any, recovers: bool = False) -> "Group":
        """All ranks of the job. Collective over `comm`. `recovers`: the job can go on without a rank that died."""
        with Mailbox(comm, recovers).translated():
            return cls(comm, company=Company(comm, recovers=recovers) if comm.Get_size() > 1 else None)

    def with_timeout(self, timeout_s: float) -> "Group":
        """The same ranks, waiting for another time."""
        return Group(self.comm, timeout_s, self.company, self._mail, self.members)

    @property
    def mail(self) -> Mailbox:
        """What is under way between these ranks, of whom there are several."""
        assert self._mail is not None, "a group of one has nobody to write to"
        return self._mail

    @property
    def recovers(self) -> bool:
        """Whether the death of a rank is a PeerLost, after which the others may go on."""
        return self._mail is not None and self._mail.recovers

    def duplicate(self) -> "Group":
        """The same ranks on a communicator of their own, so that tags cannot meet. Collective."""
        if self.comm is None:
            return Group(None, self.timeout_s)
        with self.mail.translated():
            comm, request = self.comm.Idup()
        self.wait(self.mail.begin(lambda: request, comm), "a communicator")
        return Group(comm, self.timeout_s, self.company, members=self.members)

    def split(self, color: int, what: str) -> "Group":
        """Those who give the same colour, in the order of their ranks. Collective."""
        if self.comm is None:
            return Group(None, self.timeout_s)
        colors = self.allgather(color, what)  # MPI has no split that can be polled: all are here now
        with self.mail.translated():
            comm = self.comm.Split(color, self.rank)
        members = [self.members[rank] for rank, other in enumerate(colors) if other == color]
        return Group(comm, self.timeout_s, self.company, members=members)

    def note(self, text: str, work: Work = NO_WORK) -> None:
        """Says what this rank does from now on, for others to read should it never arrive. `work`: where that takes
        about as long each time, and is to be missed when it does not (`comm.watch`)."""
        if self.company is not None:
            self.company.note(text, work=work)

    def watch(self, stall_s: float, records: Records) -> None:
        """From now on whoever waits also looks for ranks of its node that stall (`comm.stall_s`). Collective."""
        if self.company is not None:
            self.company.watch(stall_s, records)
            self.look_out()

    def look_out(self) -> None:
        """Begins to watch other nodes, if there are some, or anew without the dead (`comm.lookout`). Collective."""
        company = self.company
        if company is None:
            return
        company.post.close()
        first = min(sign.rank for sign in company.here())  # all have shown a sign by now: a collective lies behind us
        if not company.watches_nodes:
            company.post = Post()
            return
        mine = listening() if first == self.rank and company.near.board.has_processes else None
        try:
            row = [first, mine and mine.getsockname()[:2], token() if self.rank == 0 else ""]
            rows = self.allgather(row, "the addresses of lookouts")
            nodes = sorted({first for first, _, _ in rows})
            addresses = [rows[rank][1] for rank in nodes]
            company.post = Post.taken(company.near, nodes.index(first), rows[0][2], addresses, mine)
        finally:
            if mine is not None:
                mine.close()  # the lookout has its own

    def on_node(self) -> tuple[int, int]:
        """(my number among the ranks of my node, how many they are). Collective."""
        if self.comm is None:
            return 0, 1
        from mpi4py import MPI

        self.barrier("a communicator of the node")  # MPI has no split that can be polled
        with self.mail.translated():
            node = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        place = node.Get_rank(), node.Get_size()
        node.Free()
        return place

    def highest_tag(self) -> int:
        """The largest tag that the MPI library takes."""
        if self.comm is None:
            return 2**31 - 1
        from mpi4py import MPI

        found = self.comm.Get_attr(MPI.TAG_UB)  # which a communicator that was split off does not know
        if found is None:
            found = self.company.highest_tag if self.company is not None else _TAGS
        return int(found)

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
        start, patient = time.perf_counter(), True
        if self.company is not None:
            self.company.note(what, waits=True)
        while True:
            ranks = awaited()
            waited = time.perf_counter() - start
            if ranks is None:
                self.note(f"went on after {what}")
                self.waited_s += waited
                return waited
            if waited > self.timeout_s:
                error, culprits = self._nobody_came(waited, what, ranks)
                if awaited() is None:  # they may have come while the roll was called
                    continue
                if not (patient and self.recovers and culprits and self.company is not None):
                    raise error
                patient = not self.company.put_down(culprits, str(error), error.teller)
                start = time.perf_counter()  # their death will be noticed
                continue
            if waited < _SPIN_S:
                os.sched_yield()
            else:
                time.sleep(_NAP_S)
            if waited > _LONG_S and self.company is not None:
                self.company.answer()
                if self.company.near.is_time():
                    self._act_on(self.company.look())

    def _act_on(self, found: Sequence[Sign]) -> None:
        """Goes on without ranks that hold all up, or ends the job."""
        if not found or self.company is None:
            return
        why = self.company.near.words(found)
        if not self.recovers:
            raise CommError(f"{why}{self.company.near.stacks(found)}: start again to go on", self.rank)
        self.company.put_down(found, why, self.rank)

    def _nobody_came(self, waited_s: float, what: str, awaited: Sequence[int]) -> tuple[CommError, list[Sign]]:
        """What to say, and the signs of those who have not come, if they are known."""
        remedy = f"(comm.timeout_s = {self.timeout_s:g}): look at what holds them up, or raise comm.timeout_s"
        if self.company is not None:
            absence = self.company.absent(what, waited_s)
            return CommError(f"{absence.text} {remedy}", absence.teller), absence.culprits
        if self.size == 1:
            return CommError(f"waited {waited_s:.0f} s for {what} {remedy}"), []
        who = f"rank {ranges(sorted(set(awaited)))}" if awaited else "the others"
        return CommError(f"waited {waited_s:.0f} s for {what} from {who} of {self.size} ranks {remedy}"), []

    def wait(self, message: Message, what: str) -> float:
        """Polls one message to its end; returns the seconds it took."""
        return self.wait_until(lambda: None if message.done() else (), what)

    def agree(self, what: str) -> None:
        """Returns on all ranks, or raises PeerLost, marked as agreed, on all that live. Collective; every rank passes
        one agreement for each attempt at something, also after an error (`comm.recovery`)."""
        if self.recovers and not self.agrees(True, what):
            raise agreed(PeerLost("a rank has died"))

    def agrees(self, well: bool, what: str) -> bool:
        """Whether all ranks live and are well: the same answer on all that live. Collective."""
        flag, alive = np.array([well], np.int32), True

        def awaited() -> tuple[()] | None:
            nonlocal alive
            try:
                return None if message.done() else ()
            except PeerLost:  # MPI tells all of them alike
                alive = False
                return None

        message = self.mail.begin(lambda: self.comm.Iagree(flag), flag)
        self.wait_until(awaited, what)
        return alive and bool(flag[0])

    def allgather_array(self, row: np.ndarray, what: str) -> np.ndarray:
        """Everybody's row. Collective. Shapes: (n,) of one dtype everywhere -> (size, n)."""
        if self.size == 1:
            return row[None].copy()
        mine, out = np.ascontiguousarray(row), np.empty((self.size, *row.shape), row.dtype)
        self.wait(self.mail.begin(lambda: self.comm.Iallgather(mine, out), mine, out), what)
        return out

    def gather_parts(self, whole: np.ndarray, counts: Sequence[int], what: str) -> None:
        """Everybody's part of an array, which holds mine: counts[0] elements of rank 0, and so on. Collective."""
        if self.size > 1:
            from mpi4py import MPI

            sizes = np.array(counts, np.int64)
            message = self.mail.begin(lambda: self.comm.Iallgatherv(MPI.IN_PLACE, [whole, sizes]), whole, sizes)
            self.wait(message, what)

    def name(self, rank: int) -> int:
        """What a rank was called when the job began."""
        return self.company.names[self.members[rank]] if self.company is not None else rank

    def spread(self, array: np.ndarray, root: int, what: str) -> None:
        """Rank `root`'s array into everybody's. Collective. Shapes: (n,), contiguous."""
        for start in range(0, array.size if self.size > 1 else 0, _COUNT):
            part = array[start : start + _COUNT]
            self.wait(self.mail.begin(partial(self.comm.Ibcast, part, root), part), what)

    def allgather(self, value: Any, what: str) -> list[Any]:
        """Everybody's value, in rank order. Collective. Values travel as JSON: plain data only."""
        if self.size == 1:
            return [value]
        mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
        counts = self.allgather_array(np.array([mine.size], np.int64), what)[:, 0]
        out = np.empty(int(counts.sum()), np.uint8)
        starts = np.concatenate([[0], np.cumsum(counts)])
        sizes = counts.astype(np.int32)
        self.wait(self.mail.begin(lambda: self.comm.Iallgatherv(mine, [out, sizes]), mine, out, sizes), what)
        return [json.loads(out[a:b].tobytes()) for a, b in itertools.pairwise(starts)]

    def broadcast(self, value: Any, what: str) -> Any:
        """Rank 0's value. Collective. Plain data only."""
        return self.allgather(value if self.rank == 0 else None, what)[0]

    def barrier(self, what: str) -> None:
        """Returns when all have arrived. Collective."""
        if self.size > 1:
            self.wait(self.mail.begin(self.comm.Ibarrier), what)

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
