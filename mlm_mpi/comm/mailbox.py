"""Every message under way on a communicator: its request, the memory it reads or fills, whom it is exchanged with.

MPI goes on reading and writing memory after an error, so a message keeps its arrays until it is over, and after the
death of a rank `drain` waits for each message alone. Where the job can go on without a dead rank (`recovers`), whatever
MPI raises is a `PeerLost`: error classes do not tell reliably who has died, or whether, so an agreement decides later.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from mlm_mpi.errors import PeerLost

_TIDY = 64  # messages noted before those that are over are forgotten


class Message:
    """One request, and the memory it uses."""

    __slots__ = ("_mailbox", "arrays", "peer", "request")

    def __init__(self, mailbox: "Mailbox", request: Any, arrays: tuple[Any, ...], peer: int | None) -> None:
        self._mailbox, self.request, self.arrays, self.peer = mailbox, request, arrays, peer

    def done(self) -> bool:
        """Whether it is over. Raises PeerLost where it can no longer be."""
        if self.request is None:
            return True
        with self._mailbox.translated():
            over = bool(self.request.Test())
        if over:
            self.request = None
        return over


class Mailbox:
    """The messages of one rank on one communicator."""

    def __init__(self, comm: Any, recovers: bool = False) -> None:
        from mpi4py import MPI

        self.comm, self.recovers = comm, recovers
        self._error: type[Exception] = MPI.Exception
        self._under_way: list[Message] = []
        self._limit = _TIDY

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """What MPI raises inside is a PeerLost, where the job recovers."""
        try:
            yield
        except self._error as error:
            if not self.recovers:
                raise
            raise PeerLost(f"a rank has died ({self._who()})") from error

    def _who(self) -> str:
        try:
            failed = self.comm.Get_failed()
            ranks = failed.Translate_ranks(None, self.comm.Get_group())
            return ", ".join(f"rank {rank}" for rank in ranks) or "which, MPI does not say yet"
        except self._error:
            return "which, MPI does not say"

    def send(self, array: Any, rank: int, tag: int) -> Message:
        """Sends an array, which may not change before the message is over."""
        return self.begin(lambda: self.comm.Isend(array, rank, tag), array, peer=rank)

    def receive(self, array: Any, rank: int, tag: int) -> Message:
        """Fills an array with what a rank sends."""
        return self.begin(lambda: self.comm.Irecv(array, rank, tag), array, peer=rank)

    def begin(self, start: Callable[[], Any], *arrays: Any, peer: int | None = None) -> Message:
        """A message whose request `start` makes, of a collective say."""
        if len(self._under_way) >= self._limit:
            self._under_way = [other for other in self._under_way if not other.done()]
            self._limit = max(_TIDY, 2 * len(self._under_way))
        with self.translated():
            message = Message(self, start(), arrays, peer)
        self._under_way.append(message)
        return message

    def revoke(self) -> None:
        """Lets every rank that uses this communicator know that something is wrong; its messages end."""
        with contextlib.suppress(self._error):
            self.comm.Revoke()

    def drain(self, patience_s: float) -> bool:
        """Waits until MPI has let go of all memory, each message by itself; False if it has not in time."""
        end = time.monotonic() + patience_s
        for message in self._under_way:
            while message.request is not None:
                try:
                    if message.request.Test():
                        message.request = None
                except self._error:  # which is its end
                    message.request = None
                if message.request is not None:
                    if time.monotonic() > end:
                        return False
                    time.sleep(0)
        self._under_way = []
        return True
