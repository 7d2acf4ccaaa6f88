"""Now and then a micro-batch is computed on a second rank: the same bits, or one of the two computes wrongly.

Which micro-batch of which step, and on whom, is drawn from the seed: every rank knows, and nobody decides. It is the
first of its lane, whose gradient the lane's buffer holds alone for a moment. Where two ranks disagree all of them
compute it: the majority says who was wrong. Wrong once is a fault that the step is run again for; wrong twice ends that
rank, and the others go on without it (`comm.recover`).
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlm_mpi.data.batch import Batch
from mlm_mpi.errors import NumericsError, agreed
from mlm_mpi.params.digest import digest
from mlm_mpi.rng import key_of, words
from mlm_mpi.train.assignment import Assignment

if TYPE_CHECKING:
    from mlm_mpi.train.engine import Engine
    from mlm_mpi.train.guard import Attempt


class Drawn(NamedTuple):
    """A micro-batch, the rank that runs it in its step, and the one that runs it too."""

    micro_batch: int
    owner: int
    second: int


@dataclass
class Audit:
    """Of every `every`-th step; 0: of none."""

    every: int = 0
    seed: int = 0
    witness: dict[int, int] = field(default_factory=dict)  # micro-batch -> digest of its gradient, on its owner

    def drawn(self, step: int, assignment: Assignment, ranks: int) -> Drawn | None:
        """What is audited in a step by one of so many ranks, some of them spares maybe; None: nothing."""
        if not self.every or (step + 1) % self.every or ranks < 2:
            return None
        lane, more = words(key_of(self.seed, "audit"), 0, 2, step=step).tolist()
        lane %= assignment.lanes
        owner = next(r for r in range(assignment.ranks) if lane in range(*assignment.lanes_of(r)))
        second = (owner + 1 + more % (ranks - 1)) % ranks
        return Drawn(assignment.micro_batches_of(lane)[0], owner, second)

    def passed(self, engine: "Engine", found: "Attempt", drawn: Drawn, batch: Batch | None) -> tuple["Attempt", str]:
        """The attempt that can be believed, and what is to be said. `batch`: on the second rank. Collective.

        Raises NumericsError: agreed, where nobody can say who is wrong; alone, on a rank that is wrong twice.
        """
        group = engine.group
        mine = self._again(engine, found.step, batch) if batch is not None else self.witness.get(drawn.micro_batch, 0)
        first = self._told(engine, mine)
        if first[drawn.owner] == first[drawn.second]:
            return found, ""
        everybodys = self._told(engine, self._again(engine, found.step, shared(engine, batch)))
        votes = Counter([*everybodys, first[drawn.owner], first[drawn.second]]).most_common(2)
        where = f"step {found.step + 1}, micro-batch {drawn.micro_batch}"
        names = f"rank {group.name(drawn.owner)} and rank {group.name(drawn.second)}"
        if len(votes) > 1 and votes[0][1] == votes[1][1]:
            raise agreed(NumericsError(f"{where}: {names} compute different gradients: start again on other machines"))
        right = votes[0][0]
        wrong = [rank for rank in (drawn.owner, drawn.second) if first[rank] != right]
        lasting = [rank for rank, told in enumerate(everybodys) if told != right]
        if group.rank in lasting:
            raise NumericsError(f"{where}: this rank computes another gradient than the others, twice: its CPU is ill")
        said = f"ALARM {where}: rank {group.name(wrong[0])} computed another gradient than the others" if wrong else ""
        return (engine.again(found) if drawn.owner in wrong or lasting else found), said

    def _again(self, engine: "Engine", step: int, batch: Batch) -> int:
        buffer = engine.machine.store.new_buffer()
        lane = engine.second_sums
        for second in lane.values():
            second[...] = -0.0
        engine.alone(step, batch, buffer, lane, closes=not lane)
        return self.testimony(buffer, lane)

    def testimony(self, buffer: Any, lane: dict[Any, Any]) -> int:
        """The digest of a micro-batch's gradient, with the second sums of tied parameters."""
        parts = [digest(buffer), *(digest(second.reshape(-1)) for second in lane.values())]
        return sum((2 * k + 1) * part for k, part in enumerate(parts)) % 2**64

    def _told(self, engine: "Engine", mine: int) -> list[int]:
        row = np.array([mine], np.uint64)
        return [int(told) for told in engine.group.allgather_array(row, "an audited gradient")[:, 0]]


def shared(engine: "Engine", batch: Batch | None) -> Batch:
    """The batch that one rank has. Collective."""
    every = engine.group.allgather(None if batch is None else _plain(batch), "an audited micro-batch")
    return _batch(next(one for one in every if one is not None))


def _plain(batch: Batch) -> list[Any]:
    """Lists and numbers, which a message may hold."""
    kinds = [
        {name: [str(array.dtype), array.shape, array.reshape(-1).tolist()] for name, array in arrays.items()}
        for arrays in (batch.inputs, batch.targets)
    ]
    source = None if batch.source is None else _plain(batch.source)
    return [batch.step, batch.index, *kinds, batch.count, list(batch.texts), source]


def _batch(plain: list[Any]) -> Batch:
    step, index, inputs, targets, count, texts, source = plain
    return Batch(
        step, index, _arrays(inputs), _arrays(targets), count, texts=tuple(texts),
        source=None if source is None else _batch(source),
    )  # fmt: skip


def _arrays(plain: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.array(values, dtype).reshape(shape) for name, (dtype, shape, values) in plain.items()}
