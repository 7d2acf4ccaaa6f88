"""A lookout: one process of each node that sees what no rank of it can, in a job of several nodes.

A rank that waits looks at the others of its node (`comm.company`). Where nobody of a node waits, because its only rank
is stopped or stalls, nobody looks: so each node has a lookout, a program without MPI that the lowest rank starts. Twice
a second lookouts tell each other the signs of their nodes (`comm.heartbeats`).

    a node where nobody waits, awaited by another    looks at its ranks as those do who wait, and kills who holds all up
    a node of which nothing is heard, while a        its link is cut, or its machine stands still: MPI cannot go on
    rank of mine waits and does not get on           without it (ULFM sees no death), so both sides end, to start again

It acts alone, for a rank may be in a long piece of work. It dies with the rank that started it; where others of the
node live on, the lowest of them starts another one.
"""

import contextlib
import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlm_mpi import signs
from mlm_mpi.comm.board import Board, Sign
from mlm_mpi.comm.heartbeats import MOST_S, Address, Heartbeats, Silence
from mlm_mpi.comm.neighbours import LOOK_S, Neighbours, Records, Terms
from mlm_mpi.errors import CommError

_BEAT_LOOKS = 2  # so many looks to a beat
_SILENT_S = 15.0
_RECENT_S = 2.0  # who has not been heard for longer is not believed to wait
_CONNECT_S = 60.0  # until it is said that a node is not heard
_LINGER_S = 1.0  # another lookout may say it, and the launcher ends all
_NAMED = 4  # ranks of a node, in a message
_WAITS, _WORKS = b"w", b"-"
_PR_SET_PDEATHSIG = 1  # prctl(2)
_DEAF = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # Slurm's go to all processes
_UNROUTED = "192.0.2.1"  # for documentation (RFC 5737): asks for the address of the way out, and sends nothing


def beat(here: Sequence[Sign]) -> bytes:
    """What a node tells the others: whether one of its ranks waits, and the signs of all."""
    return (_WAITS if any(sign.is_here for sign in here) else _WORKS) + json.dumps(here).encode()


def is_awaited(here: Sequence[Sign], beats: Sequence[bytes]) -> bool:
    """Whether somebody of another node waits, and nobody here, who would look at the others."""
    return not any(sign.is_here for sign in here) and any(message[:1] == _WAITS for message in beats)


class Waits:
    """Counts how long each rank of a node has waited for the same, in time in which this process ran."""

    def __init__(self) -> None:
        self._stood: dict[int, tuple[int, float]] = {}  # process -> its moves, and since when

    def passed(self, since_s: float, here: Sequence[Sign]) -> None:
        """`since_s` later these are the signs."""
        before, self._stood = self._stood, {}
        for sign in here:
            moves, stood_s = before.get(sign.process, (-1, 0.0))
            stands = sign.waits and not sign.stopped and moves == sign.moves
            self._stood[sign.process] = sign.moves, stood_s + min(since_s, MOST_S) if stands else 0.0

    def longest_s(self) -> float:
        """Of all ranks."""
        return max((stood_s for _, stood_s in self._stood.values()), default=0.0)


def silence(beats: Mapping[int, bytes], silent_s: Mapping[int, float], names: Sequence[int]) -> str:
    """What is said of nodes that are not heard: by what they told last."""
    words = []
    for node, seconds in silent_s.items():
        seen = [Sign(*sign) for sign in json.loads(beats[node][1:])]
        last = [sign._replace(rank=names[sign.rank], age_s=sign.age_s + seconds).last_seen for sign in seen[:_NAMED]]
        more = f" and {len(seen) - _NAMED} more" if len(seen) > _NAMED else ""
        words.append(f"{seen[0].host} is not heard for {seconds:.0f} s: {'; '.join(last)}{more}")
    return f"{'; '.join(words)}: its link is cut or its machine stands still: start again to go on"


class Lookout:
    """That of one node."""

    def __init__(self, near: Neighbours, hearts: Heartbeats) -> None:
        self._near, self._hearts = near, hearts
        self._silence, self._waits, self._beats = Silence(), Waits(), dict[int, bytes]()
        self._turns, self._unconnected = 0, True

    def turn(self) -> None:
        """One look."""
        heard = self._hearts.turn()
        self._beats |= heard
        since_s, here = self._near.look(), self._near.signs()
        self._silence.passed(since_s, heard, self._hearts.gone)
        self._waits.passed(since_s, here)
        if self._turns % _BEAT_LOOKS == 0:
            self._hearts.send(beat(here))
        self._turns += 1
        silent_s = self._silence.longer_than(_SILENT_S)
        if silent_s and self._waits.longest_s() > _SILENT_S:  # else MPI gets on, perhaps by another network
            self._end_without(silent_s, here)
        awaiting = [self._beats[node] for node in self._silence.heard_within(_RECENT_S)]
        if self._near.terms.stall_s and is_awaited(here, awaiting):
            found = self._near.long_stopped(here) + self._near.stalled(here, since_s)
            if found:
                self._put_down(found)
        if self._unconnected and self._turns * LOOK_S > _CONNECT_S:
            self._say_who_is_not_heard()

    def _put_down(self, culprits: Sequence[Sign]) -> None:
        """Kills those who hold all up, so that the others go on; where they cannot, the job ends."""
        why = self._near.words(culprits)
        where = self._near.stacks(culprits) if any(not sign.stopped for sign in culprits) else ""
        unmoved = self._near.unmoved(culprits)
        if not unmoved:
            return
        if self._near.terms.recovers:
            _say(f"{why}{where}: killed, and the others go on")
        else:
            _say(f"{why}{where}: start again to go on")
            _end_job()
        self._near.kill(_parent_last(unmoved), where)

    def _end_without(self, silent_s: Mapping[int, float], here: Sequence[Sign]) -> None:
        """Says which nodes are not heard, and ends the ranks of mine: by the lowest of those that still hear each other
        where its launcher lives, else by each."""
        if any(node < self._hearts.node for node in self._silence.known() if node not in silent_s):
            time.sleep(_LINGER_S)
        _say(silence(self._beats, silent_s, self._near.terms.names))
        _end_job()
        self._near.kill(_parent_last(here), "")
        raise SystemExit

    def _say_who_is_not_heard(self) -> None:
        self._unconnected = False
        if nodes := self._hearts.unconnected():
            _say(
                f"warning: the lookout on {os.uname().nodename} does not reach {len(nodes)} of the other nodes "
                "(a firewall?): a rank that is stopped or stalls alone on its node is found after comm.timeout_s"
            )


def _parent_last(found: Sequence[Sign]) -> list[Sign]:
    """With its end comes mine."""
    return sorted(found, key=lambda sign: sign.process == os.getppid())


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, f"mlm-mpi: {text}\n".encode())


def _end_job() -> None:
    """Tells the launcher that the job is over for all, also for whom it cannot reach."""
    if signs.is_heard():
        with contextlib.suppress(OSError):
            os.write(2, signs.sign("end", f"over {CommError.exit_code}"))


class Post:
    """The lookout of a node, as the rank holds it that has started it; and on every rank, how many nodes have one."""

    def __init__(self, nodes: int = 0, process: "subprocess.Popen[bytes] | None" = None) -> None:
        self.nodes, self._process = nodes, process

    @classmethod
    def taken(cls, near: Neighbours, node: int, token: str, addresses: list[Address | None], mine: Any) -> "Post":
        """Starts the lookout of node `node`, which listens at the socket `mine`; None: where another rank does."""
        nodes = sum(address is not None for address in addresses)
        if nodes < 2 or mine is None:
            return cls(nodes if nodes > 1 else 0)
        orders = {
            "parent": os.getpid(), "board": near.board.descriptor, "members": near.board.members,
            "listener": mine.fileno(), "node": node, "token": token, "addresses": addresses,
            "terms": near.terms,
        }  # fmt: skip
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mlm_mpi.comm.lookout"],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=(near.board.descriptor, mine.fileno()),
                start_new_session=True,  # else signals to a rank's process group would reach it
            )  # fmt: skip
            assert process.stdin is not None
            with process.stdin as orders_to:
                orders_to.write(json.dumps(orders, default=str).encode())  # not on the command line, which all can read
        except OSError as error:
            _say(_no_lookout(error))
            return cls(nodes)
        return cls(nodes, process)

    def close(self) -> None:
        """Ends it."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_LINGER_S)
            self._process = None


def _no_lookout(error: OSError) -> str:
    host = os.uname().nodename
    return (
        f"warning: no lookout on {host} ({error.strerror or error}): a rank that is stopped or stalls where nobody of "
        "its node waits is found after comm.timeout_s"
    )


def listening() -> socket.socket | None:
    """A socket at this node's own address, for the lookouts of others; where there is none one line says so."""
    try:
        host = _own_address()
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        _say(_no_lookout(error))
        return None
    return listener


def _own_address() -> str:
    """What others know this node by, if that is not its loopback (as Debian has it), else its address on the way out.

    Raises OSError where there is none.
    """
    with contextlib.suppress(socket.gaierror):
        for family, _, _, _, address in socket.getaddrinfo(os.uname().nodename, None, type=socket.SOCK_STREAM):
            host = str(address[0])
            if family == socket.AF_INET and not host.startswith("127."):
                return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((_UNROUTED, 9))
        return str(way.getsockname()[0])


def token() -> str:
    """A secret of this job, of the length that `heartbeats` wants."""
    return secrets.token_hex(16)


def main() -> None:
    """Looks out until the rank dies that has started this process."""
    for number in _DEAF:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    orders = json.loads(sys.stdin.buffer.read() or b"{}")
    if not orders:  # it died before it could give any
        return
    terms = Terms(*orders["terms"])
    terms = terms._replace(records=terms.records and Records(*map(Path, terms.records)))
    near = Neighbours(Board(orders["board"], orders["members"]), terms)
    addresses = [tuple(address) if address else None for address in orders["addresses"]]
    hearts = Heartbeats(orders["node"], orders["token"], socket.socket(fileno=orders["listener"]), addresses)
    lookout = Lookout(near, hearts)
    while os.getppid() == orders["parent"]:  # it may have died before the kernel was told
        lookout.turn()
        time.sleep(LOOK_S)


if __name__ == "__main__":
    main()
