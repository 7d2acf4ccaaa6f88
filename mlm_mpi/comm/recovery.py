"""What the ranks that live do when one has died: a group of their own, in which the job goes on.

Every rank that lives comes here after its PeerLost, wherever that met it, once for each group it was in:

    revoke      those who still wait for something else hear that it will not come
    drain       MPI lets go of all memory
    agree       unless the PeerLost came of an agreement: each rank passes one for each attempt, on every path, because
                an agreement cannot be revoked, and who comes late would wait for one that all others have passed
    shrink      MPI's communicator of those who live

Source: Bland et al., "Post-failure recovery of MPI communication capability", 2013; Open MPI 5, with-ft ulfm.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mlm_mpi.comm.group import Group
from mlm_mpi.comm.mailbox import Mailbox
from mlm_mpi.errors import PeerLost

_DRAIN_S = 10.0
_LEAVING = "leaving a group in which a rank has died"
_SHRINK_S = 30.0  # inside MPI, where nobody can speak; 10 ms are usual


def survivors(group: Group, lost: PeerLost) -> Group:
    """The group of those who live. Collective over them. Ends this process where recovery itself fails."""
    while True:
        _leave(group, lost)
        with _within(_SHRINK_S, "MPI has not shrunk the communicator"):
            comm = group.comm.Shrink()
        assert group.company is not None, "only the ranks of a job are lost"
        group = Group(comm, group.timeout_s, group.company.without_the_dead(comm, group.comm))
        try:
            _meet(group)
        except PeerLost as again:
            lost = again
        else:
            return group


def _leave(group: Group, lost: PeerLost) -> None:
    """The last that a rank does in a group with a dead rank."""
    assert group.company is not None, "only the ranks of a job are lost"
    group.note(_LEAVING)
    for mailbox in group.company.mailboxes:
        mailbox.revoke()
    for mailbox in group.company.mailboxes:
        _drain(mailbox, group)
    if not lost.agreed:
        group.agrees(False, "all who live to notice that a rank has died")


def _drain(mailbox: Mailbox, group: Group) -> None:
    """A message to a rank that lives and makes no call of MPI, in a long backward say, ends when that one makes one: so
    patience begins anew while somebody has not come here. Ends this process where MPI keeps a message all the same."""
    assert group.company is not None
    end, all_came = time.monotonic() + group.timeout_s, False
    while not mailbox.drain(_DRAIN_S):
        if all_came or time.monotonic() > end:
            _give_up(f"MPI has not let go of its messages within {_DRAIN_S:g} s of the last rank's coming")
        all_came = group.company.all_here(_LEAVING)


def _meet(group: Group) -> None:
    """A communicator for the roll, and lookouts that know who has died."""
    assert group.company is not None
    with group.mail.translated():
        comm, request = group.comm.Idup()
    group.wait(group.mail.begin(lambda: request, comm), "a communicator of those who live")
    group.company.meet(comm)
    group.look_out()


@contextmanager
def _within(limit_s: float, what: str) -> Iterator[None]:
    timer = threading.Timer(limit_s, _give_up, (f"{what} within {limit_s:g} s",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(what: str) -> None:
    """Without a word to the others: they find this rank dead, and try again without it."""
    sys.stderr.write(f"mlm-mpi: recovery: {what}: this rank gives up; start again to go on from the last checkpoint\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)
