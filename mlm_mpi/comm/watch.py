"""When a rank has stalled: decided from what it has shown in this very job, and from what the kernel says of it.

With each piece of steady work, one that takes about as long each time, a rank says how long that kind of work has taken
it at most. Who waits for it counts the time that it has had since: seconds on a core, and half of those in which all
its threads slept. It has stalled after ten times the longest, and not before `comm.stall_s`.

Not counted, so that no healthy rank is killed:

    work of any other kind          opening, saving, evaluating, what rank 0 does alone, all work of a GPU (a rank
                                    launches it and goes on): only `comm.timeout_s` holds
    what was not done three times   the first time of a kind is left out: kernels compile, pages are new
    ready to run, without a core    oversubscription: it is in state R, and its CPU time stands still
    D, T, t                         a disk or swap; stopped (`Company.look` sees to it); under a debugger
    more than 0.5 s between looks   a job, a container or a machine that was suspended as a whole
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from mlm_mpi.comm.processes import Effort

_FACTOR = 10.0  # a change of shape is another kind
_TIMES = 3
_MOST_S = 0.5
_ASLEEP = 0.5  # steady work does not sleep; half, for what nobody has thought of
_NUMBER = re.compile(r"\d+")


class Work(NamedTuple):
    """A piece of steady work, at a micro-batch of a step."""

    kind: str
    step: int = -1
    micro: int = -1


NO_WORK = Work("")


def wait_kind(text: str) -> str:
    """What waits have in common that differ by a step or a micro-batch."""
    return "wait " + _NUMBER.sub("#", text)


class Pace:
    """How long each kind of work has taken this rank at most."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float]] = {}  # times, longest but for the first

    def took(self, kind: str, seconds: float) -> None:
        times, longest_s = self._seen.get(kind, (0, 0.0))
        self._seen[kind] = times + 1, max(longest_s, seconds) if times else 0.0

    def longest_s(self, kind: str) -> float:
        """0 where it is not known yet."""
        times, longest_s = self._seen.get(kind, (0, 0.0))
        return longest_s if times >= _TIMES else 0.0


class Seen(NamedTuple):
    """What one look sees of a rank that works."""

    process: int
    moves: int  # one more with everything that it notes
    longest_s: float
    effort: Effort


class _Account(NamedTuple):
    seen: Seen
    spent_s: float


class Watch:
    """What one rank counts of others, from look to look."""

    def __init__(self, least_s: float) -> None:
        self._least_s = least_s
        self._accounts: dict[int, _Account] = {}
        self._stand: tuple[int, ...] = ()
        self._stood_s = 0.0

    def stalled(self, seen: Sequence[Seen], since_s: float) -> list[int]:
        """Processes that have had their time, `since_s` after the look before."""
        self._accounts = {one.process: self._counted(one, min(since_s, _MOST_S)) for one in seen}
        return [
            process
            for process, (one, spent_s) in self._accounts.items()
            if spent_s > max(self._least_s, _FACTOR * one.longest_s)
        ]

    def _counted(self, one: Seen, since_s: float) -> _Account:
        before = self._accounts.get(one.process)
        if before is None or before.seen.moves != one.moves:
            return _Account(one, 0.0)
        busy_s = max(0.0, one.effort.cpu_s - before.seen.effort.cpu_s)  # of many threads perhaps
        return _Account(one, before.spent_s + (_ASLEEP * since_s if one.effort.asleep else min(busy_s, since_s)))

    def stands_still(self, moves: Sequence[int], longest_s: float, brisk: bool, since_s: float) -> bool:
        """Whether all ranks have waited and not moved for too long. `brisk`: all have polled just now, so that
        nothing is late for want of a core. The longest wait of these kinds so far is `longest_s`."""
        if tuple(moves) != self._stand:
            self._stand, self._stood_s = tuple(moves), 0.0
        elif brisk:
            self._stood_s += _ASLEEP * min(since_s, _MOST_S)
        return self._stood_s > max(self._least_s, _FACTOR * longest_s)
