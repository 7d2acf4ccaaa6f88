"""The ranks of a node as another process of it sees them: who of them holds all up, where it was, and its end.

Whoever waits looks at its neighbours (`comm.company`); where nobody of a node does, its lookout (`comm.lookout`).
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from mlm_mpi.comm import stacks
from mlm_mpi.comm.board import Board, Sign
from mlm_mpi.comm.processes import effort
from mlm_mpi.comm.watch import Seen, Watch

LOOK_S = 0.25  # between two looks
_AT_WORK_S = 1.0  # who has noted something since has not stalled, and costs no look into /proc
_LOOKS = 5  # one after another: a job that is suspended and continued as a whole shows a stopped rank once or twice
_FAILURE_BYTES = 500  # of an error's text: the rank has said all of it


class Records(NamedTuple):
    """Where to write down what was found."""

    stacks: Path  # a folder
    failures: Path  # a line for each rank that failed at a micro-batch, or was killed at one

    def failed(self, step: int, micro: int, text: str) -> None:
        """Notes that a rank failed at a micro-batch, and how. A disk that does not take it must not hide the error."""
        line = json.dumps([step, micro, text[:_FAILURE_BYTES]]) + "\n"
        with contextlib.suppress(OSError), open(self.failures, "a", encoding="utf-8") as file:
            file.write(line)


class Terms(NamedTuple):
    """What all ranks of a job know alike until the next one dies."""

    generation: int
    names: list[int]  # what each rank was called when the job began
    recovers: bool
    stall_s: float = 0.0  # 0: nobody looks for those who stall
    records: Records | None = None


class Neighbours:
    """The ranks of a node, and what is counted of them from look to look."""

    def __init__(self, board: Board, terms: Terms) -> None:
        self.board, self.terms = board, terms
        self.watch = Watch(terms.stall_s)
        self._looked, self._stopped = 0.0, dict[int, int]()  # process -> so many looks in a row found it stopped

    def signs(self) -> list[Sign]:
        """Those of the ranks of my node: not of ranks that were lost before."""
        return self.board.signs(self.terms.generation)

    def is_time(self) -> bool:
        """Whether the last look is some time ago."""
        return time.monotonic() - self._looked >= LOOK_S

    def look(self) -> float:
        """Begins a look; the seconds since the last one."""
        now = time.monotonic()
        since_s, self._looked = now - self._looked, now
        return since_s

    def long_stopped(self, signs: Sequence[Sign]) -> list[Sign]:
        """Who was stopped each time I looked for a while. Not where the job would have to end: it may be continued."""
        found = [sign for sign in signs if sign.stopped and self.terms.recovers]
        self._stopped = {sign.process: self._stopped.get(sign.process, 0) + 1 for sign in found}
        return [sign for sign in found if self._stopped[sign.process] >= _LOOKS]

    def stalled(self, signs: Sequence[Sign], since_s: float) -> list[Sign]:
        """Who is at steady work for many times as long as ever."""
        slow = [sign for sign in signs if not sign.waits and sign.longest_s and sign.age_s > _AT_WORK_S]
        seen = [Seen(sign.process, sign.moves, sign.longest_s, effort(sign.process)) for sign in slow]
        late = self.watch.stalled(seen, since_s)
        return [sign._replace(stalled=True) for sign in slow if sign.process in late]

    def words(self, signs: Sequence[Sign]) -> str:
        """What is said of ranks, which are called as when the job began."""
        return "; ".join(str(sign._replace(rank=self.terms.names[sign.rank])) for sign in signs)

    def stacks(self, culprits: Sequence[Sign]) -> str:
        """Writes down the stacks of all ranks of my node; for a message, where they are and what culprits were in."""
        if self.terms.records is None or not self.board.has_processes:
            return ""
        signs = [sign for sign in self.signs() if sign.stacks >= 0 and not sign.stopped]
        found = stacks.of({sign.process: sign.stacks for sign in signs})
        folder = self.terms.records.stacks
        try:
            folder.mkdir(exist_ok=True)
            for sign in signs:
                head = f"{datetime.now().astimezone().isoformat(' ', 'seconds')}  {sign}\n\n"
                text = found.get(sign.process, "It did not answer.\n")
                (folder / f"rank-{self.terms.names[sign.rank]}.txt").write_text(head + text)
            where = f"; the stacks of all: {folder}"
        except OSError as error:
            where = f"; {folder} takes no stacks: {error.strerror}"
        inner = [stacks.innermost(found[sign.process]) for sign in culprits if sign.process in found]
        return "".join(f"; it was in {text}" for text in inner) + where

    def unmoved(self, culprits: Sequence[Sign]) -> list[Sign]:
        """Those who are still where they were seen. They begin anew: who is stopped is to be seen so for a while."""
        self._stopped = {}
        now = {sign.rank: sign.moves for sign in self.signs()}
        return [sign for sign in culprits if now.get(sign.rank) == sign.moves]

    def kill(self, culprits: Sequence[Sign], where: str) -> None:
        """So that the others can go on without them. `where`, as `stacks` gave it, is written down."""
        for sign in culprits:
            if self.terms.records is not None and where and sign.step >= 0:
                self.terms.records.failed(sign.step, sign.micro, f"it held up the others{where}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(sign.process, signal.SIGKILL)
