"""What ranks know of each other while they wait: who does not, and what that one did last.

Each rank keeps a sign of what it is doing in memory that the ranks of its node share; it can be read even when its
rank is stopped. Between nodes signs travel on request: the rank whose patience ends first calls the roll, and every
rank that waits answers with the signs of its node. Whoever waits also looks at the others of its node four times a
second, and finds who is stopped, has stalled (`comm.watch`) or is out of step long before its patience ends. Where no
rank of a node waits, its lookout does that for those of other nodes (`comm.lookout`).
"""

import contextlib
import copy
import json
import os
import struct
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mlm_mpi.comm import stacks
from mlm_mpi.comm.board import Board, Sign
from mlm_mpi.comm.lookout import Post
from mlm_mpi.comm.mailbox import Mailbox
from mlm_mpi.comm.neighbours import LOOK_S, Neighbours, Records, Terms
from mlm_mpi.comm.processes import is_gone
from mlm_mpi.comm.watch import NO_WORK, Pace, Work, wait_kind
from mlm_mpi.errors import CommError, PeerLost, ranges

_CALL, _ANSWER = 1, 2  # tags
_ROLL_S = 1.0
_RENEW_S = 0.1
_TURN_S = 0.002  # the lowest of the ranks whose patience ends together calls; the others hear it before their turn
_LEAVE_S = 2.0  # until all have read that they wait in vain
_GONE_LOOKS = 12  # of a death that MPI tells of, all know within a second even on a machine that is overloaded


class Absence(NamedTuple):
    """Who has not come: the rank that is to tell it, in which words, and their signs."""

    teller: int
    text: str
    culprits: list[Sign]


class Company:
    """All ranks of the job, as seen by one of them."""

    def __init__(self, comm: Any, node: Any = None, recovers: bool = False) -> None:
        """Collective over `comm`, an mpi4py communicator. `node`: its ranks that share memory (my machine's)."""
        from mpi4py import MPI

        node = node or comm.Split_type(MPI.COMM_TYPE_SHARED)
        board = Board.of_node(node)
        node.Free()
        self.highest_tag: int = comm.Get_attr(MPI.TAG_UB)
        self.lost: list[str] = []  # who has died, and what it did last
        self.post = Post()
        self._moves, self._stacks = 0, -1
        self._begin(comm, Neighbours(board, Terms(0, list(range(comm.Get_size())), recovers)))
        self.meet(comm.Dup())
        self.note("the start of the job")

    def _begin(self, comm: Any, near: Neighbours) -> None:
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.near = near
        self.mailboxes: list[Mailbox] = []
        self._calls = 0
        self._heard: dict[int, float] = {}  # when which rank has called the roll
        self._gone = 0  # looks in a row found somebody gone
        self._pace = Pace()  # others than before: each has more to do
        self._kind, self._noted = "", time.monotonic()

    def meet(self, comm: Any) -> None:
        """The communicator by which the roll is called."""
        self._comm, self._mail = comm, self.mailbox(comm)

    def watch(self, stall_s: float, records: Records) -> None:
        """From now on those who stall are found too (`comm.stall_s`; 0: not)."""
        self.near = Neighbours(self.near.board, self.near.terms._replace(stall_s=stall_s, records=records))
        self._stacks = stacks.register()

    @property
    def recovers(self) -> bool:
        """Whether the others can go on when one dies."""
        return self.near.terms.recovers

    @property
    def names(self) -> list[int]:
        """What each rank was called when the job began."""
        return self.near.terms.names

    @property
    def watches_nodes(self) -> bool:
        """Whether there are several, and somebody looks for those who stall: the same on all ranks."""
        return self.near.terms.stall_s > 0 and len(self.here()) < self.size

    def mailbox(self, comm: Any) -> Mailbox:
        """That of a communicator between these ranks."""
        made = Mailbox(comm, self.recovers)
        self.mailboxes.append(made)
        return made

    def without_the_dead(self, comm: Any, before: Any) -> "Company":
        """The company of those who live, on the communicator that MPI made of `before`. They have yet to `meet`."""
        made, living = copy.copy(self), comm.Get_group()
        alive = living.Translate_ranks(range(comm.Get_size()), before.Get_group())
        names = [self.names[rank] for rank in alive]
        signs = {sign.rank: sign._replace(rank=self.names[sign.rank]) for sign in self.here()}
        dead = sorted({*range(self.size)} - {*alive})
        made.lost = self.lost + [
            signs[rank].last_seen if rank in signs else f"rank {self.names[rank]} of another node" for rank in dead
        ]
        terms = self.near.terms._replace(generation=self.near.terms.generation + 1, names=names)
        made._begin(comm, Neighbours(self.near.board, terms))
        made.note(f"recovery number {terms.generation}")
        return made

    def note(self, text: str, waits: bool = False, work: Work = NO_WORK) -> None:
        """Says what this rank does from now on."""
        now = time.monotonic()
        if self._kind:
            self._pace.took(self._kind, now - self._noted)
        self._kind = wait_kind(text) if waits else work.kind
        self._noted, self._moves = now, self._moves + 1
        self._text, self._waits, self._work = text, waits, work
        self._show()

    def _show(self, gives_up: bool = False) -> None:
        """Renews my sign."""
        self._renewed = time.monotonic()
        self.near.board.show(
            self.near.terms.generation, self._text, self.rank, os.getpid(), self._waits, self._moves,
            self._pace.longest_s(self._kind), self._work.step, self._work.micro, self._stacks, gives_up,
        )  # fmt: skip

    def here(self) -> list[Sign]:
        """The signs of the ranks of my node: not those of ranks that were lost before."""
        return self.near.signs()

    def all_here(self, text: str) -> bool:
        """Whether all ranks that live do this, as far as I can know: a rank of another node may not."""
        living = [sign for sign in self.here() if not (self.near.board.has_processes and is_gone(sign.process))]
        return len(self.here()) == self.size and all(sign.text == text for sign in living)

    def answer(self) -> None:
        """Renews my sign and answers ranks that call the roll; whoever waits calls this now and then."""
        if time.monotonic() - self._renewed > _RENEW_S:
            self._show()
        for source, number in self._arrived(_CALL):
            self._heard[source] = time.monotonic()
            signs = json.dumps([number[0], *self.here()]).encode()
            self._send(np.frombuffer(signs, np.uint8), source, _ANSWER)

    def absent(self, what: str, waited_s: float) -> Absence:
        """Who did not arrive and what it did last. Called when patience has ended."""
        self._linger(min(self.rank * _TURN_S, _ROLL_S))
        if callers := self._callers():
            self._linger(_ROLL_S)  # my answer may still be on its way
            culprits = [sign for sign in self.here() if not sign.is_here]
            return Absence(min(callers), f"rank {self.rank} waited {waited_s:.0f} s for {what}", culprits)
        signs = self._roll()
        missing = [rank for rank in range(self.size) if rank not in signs or not signs[rank].is_here]
        teller = min([self.rank, *self._callers()])
        if not missing:
            return Absence(teller, f"all {self.size} ranks wait: {_by_text(signs)}", [])
        waiting = f"{self.size - len(missing)} of {self.size} ranks wait for {what} since {waited_s:.0f} s"
        last = [str(signs[rank]) for rank in missing if rank in signs][:4]
        silent = [] if last else ["no rank of its node answers"]
        text = f"rank {ranges(missing)} did not arrive, {waiting}; {'; '.join(last + silent)}"
        return Absence(teller, text, [signs[rank] for rank in missing if rank in signs])

    def look(self) -> list[Sign]:
        """Ranks of my node that hold all up, for me to act on: of those that wait here the lowest does it.

        Raises CommError, on every rank, where all wait in vain, or for one who has left.
        """
        since_s, signs = self.near.look(), self.here()
        self._leave_with_others(signs)
        if not self.near.board.has_processes:
            return []
        found = self.near.long_stopped(signs)
        self._end_if_left(signs)
        if self.near.terms.stall_s:
            found += self.near.stalled(signs, since_s)
            self._end_if_in_vain(signs, since_s)
        return found if self._acts(signs) else []

    def _acts(self, signs: Sequence[Sign]) -> bool:
        """Whether I am the lowest of those that wait on this node."""
        return not any(sign.is_here and sign.rank < self.rank for sign in signs)

    def _end_if_in_vain(self, signs: Sequence[Sign], since_s: float) -> None:
        """Raises CommError where all ranks wait, not for the same, and nothing moves."""
        if len(signs) < self.size or not all(sign.is_here and sign.longest_s for sign in signs):
            return
        if len({sign.text for sign in signs}) == 1:
            return
        moves, brisk = [sign.moves for sign in signs], all(sign.age_s < LOOK_S for sign in signs)
        stands = self.near.watch.stands_still(moves, max(sign.longest_s for sign in signs), brisk, since_s)
        if stands and self._acts(signs):
            where = self.near.stacks([])
            if [sign.moves for sign in self.here()] != moves:
                return
            self._give_up()
            groups = _by_text({sign.rank: sign for sign in signs})
            raise CommError(f"all {self.size} ranks wait in vain: {groups}{where}: report this as a bug", self.rank)

    def _end_if_left(self, signs: Sequence[Sign]) -> None:
        """Raises CommError where a rank of my node has ended and MPI says nothing of it, as it does of an exit code."""
        gone = [sign for sign in signs if sign.process != os.getpid() and is_gone(sign.process)]
        self._gone = self._gone + 1 if gone else 0
        if self._gone >= _GONE_LOOKS and self._acts([sign for sign in signs if sign not in gone]):
            self._give_up()
            how = "by an exit code or MPI_Abort, of which MPI tells nobody: start again to go on"
            raise CommError(f"{self.near.words(gone)} has left {how}", self.rank)

    def _leave_with_others(self, signs: Sequence[Sign]) -> None:
        """Raises CommError where a rank of my node gives up. If one after another did, each would be a death that the
        others recover from: so the lowest says it in its sign, and leaves last."""
        if told := [sign.rank for sign in signs if sign.gives_up]:
            self._show(gives_up=True)
            raise CommError(f"rank {self.rank} waited for {self._text}", min(told))

    def _give_up(self) -> None:
        """Lets the others of my node read that all wait in vain, and leave their waits."""
        self._show(gives_up=True)
        end = time.monotonic() + _LEAVE_S
        while any(sign.waits and not sign.gives_up for sign in self.here()) and time.monotonic() < end:
            time.sleep(_TURN_S)

    def put_down(self, culprits: Sequence[Sign], why: str, teller: int | None) -> bool:
        """Kills those of my node who do not come, so that the others can go on without them. Whether one of all
        culprits is still where it was seen."""
        mine = [sign for sign in culprits if sign.host == os.uname().nodename and sign.process != os.getpid()]
        mine = mine if self.near.board.has_processes else []
        where = self._witness([sign for sign in mine if not sign.stopped])
        unmoved = self.near.unmoved(mine)
        if len(mine) - len(unmoved) == len(culprits):
            return False
        if teller == self.rank:
            sys.stderr.write(f"mlm-mpi: {why}{where}: killed, and the others go on\n")
            sys.stderr.flush()
        self.near.kill(unmoved, where)
        return True

    def _witness(self, culprits: Sequence[Sign]) -> str:
        """The stacks, as in `stacks`: gathered by one rank of a node, while the others wait."""
        if not culprits:
            return ""
        if self._acts(self.here()):
            return self.near.stacks(culprits)
        self._linger(_ROLL_S)
        return ""

    def _roll(self) -> dict[int, Sign]:
        """Calls all other ranks and gathers signs for a while."""
        self._calls += 1
        for other in range(self.size):
            if other != self.rank:
                self._send(np.array([self._calls], np.int64).view(np.uint8), other, _CALL)
        signs: dict[int, Sign] = {}
        end = time.monotonic() + _ROLL_S
        while time.monotonic() < end:
            self.answer()
            for _, found in self._arrived(_ANSWER):
                if found[0] == self._calls:  # not the answer to an earlier call
                    signs |= {sign[0]: Sign(*sign) for sign in found[1:]}
            time.sleep(_TURN_S)
        return signs | {sign.rank: sign for sign in self.here()}

    def _callers(self) -> list[int]:
        """Who calls the roll besides me, now; an older call was answered by whoever was awaited."""
        return [rank for rank, then in self._heard.items() if time.monotonic() - then < 2 * _ROLL_S]

    def _linger(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.answer()
            time.sleep(_TURN_S)

    def _arrived(self, tag: int) -> list[tuple[int, Any]]:
        """(source, content) of the messages with a tag that are here."""
        from mpi4py import MPI

        found = []
        status = MPI.Status()
        while self._probe(tag, status):
            content = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            source = status.Get_source()
            try:
                message = self._mail.receive(content, source, tag)
                while not message.done():  # it is here, or on its way from a rank that polls
                    time.sleep(0)
            except PeerLost:
                break
            data = content.tobytes()
            found.append((source, [struct.unpack("=q", data)[0]] if tag == _CALL else json.loads(data)))
        return found

    def _probe(self, tag: int, status: Any) -> bool:
        """Whether something is here; nothing is once a rank has died, which whoever waits hears elsewhere."""
        from mpi4py import MPI

        with contextlib.suppress(PeerLost), self._mail.translated():
            return bool(self._comm.Iprobe(MPI.ANY_SOURCE, tag, status))
        return False

    def _send(self, content: Any, other: int, tag: int) -> None:
        with contextlib.suppress(PeerLost):
            self._mail.send(content, other, tag)


def _by_text(signs: dict[int, Sign]) -> str:
    groups: dict[str, list[int]] = {}
    for rank, sign in sorted(signs.items()):
        groups.setdefault(sign.text, []).append(rank)
    return "; ".join(f"rank {ranges(members)} for {text}" for text, members in groups.items())
