"""Numbers that have gone wrong: a step is judged before its update, run again, and does without what is guilty.

Wrong is a loss or a gradient that is not finite, and one that is `spike` times as large as the running level. What is
done about it is a ladder, which all ranks climb alike, because they judge by the same numbers:

    again       the same micro-batches once more: clean, and it was a fault of the machine, which changes no bit
    ask         another rank for one that is wrong by itself: sound there, and the rank that ran it is ill, and leaves
    skip        without the micro-batches that are wrong by themselves, whose samples are then never used
    roll back   policy "rollback": to weights and moments as they were at the last save, kept in memory; the steps since
                are undone, and their samples are never used (Chowdhery et al., PaLM, arXiv:2204.02311, 5.1)
    end         where numbers are not finite and nothing is left to do

No update sees what is not finite, nor do moments.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlm_mpi.backend.arrays import fill, module_of, to_host
from mlm_mpi.data.batch import Batch
from mlm_mpi.errors import NumericsError, agreed
from mlm_mpi.params.clip import norm
from mlm_mpi.train.audit import shared

if TYPE_CHECKING:
    from mlm_mpi.train.engine import Engine

_SEEN = 16  # steps before a level says anything: the first ones fall by what later ones vary by
_KEEP = 0.9  # of a level at each step
_ALIKE = 3.0  # a micro-batch is guilty of a spike where it is as many times worse than the median one
_TRIES = 3  # times that a run rolls back to the same weights
_REMEDY = "lower optim.learning_rate, raise optim.warmup_steps or set optim.clip"


@dataclass(frozen=True)
class Attempt:
    """The gradient of a step and what it says, the same on all ranks but for `batches` and `mine`.

    `total`: its flat buffer, the sum over targets, good until the next attempt. `losses`: summed over the targets of
    each micro-batch. `windows`: the digest of what each has read. `norm`: of the mean over targets. `broken`: a
    parameter whose gradient is not finite. `notes` (R, k): what each rank noted.
    """

    step: int
    left_out: frozenset[int]
    total: Any
    losses: dict[int, float]
    windows: dict[int, int]
    targets: int
    norm: float
    broken: str | None
    batches: list[Batch]
    mine: tuple[float, ...]
    notes: np.ndarray

    @property
    def loss(self) -> float:
        """Mean nats per target: losses are added in the order of micro-batches."""
        total = 0.0
        for loss in self.losses.values():
            total += loss
        return total / self.targets


class Verdict(NamedTuple):
    """What came of judging a step: micro-batches skipped, and why; the first of the steps undone with this one (0:
    none); what is to be said."""

    skipped: Mapping[int, str] = {}
    undone: int = 0
    said: tuple[str, ...] = ()

    def after(self, skipped: Mapping[int, str], said: tuple[str, ...]) -> "Verdict":
        """The same, with what was skipped and said before."""
        return self._replace(skipped={**skipped, **self.skipped}, said=said + self.said)


class _Found(NamedTuple):
    """A micro-batch by itself: mean loss and norm of its mean gradient, and a parameter that is not finite."""

    micro_batch: int
    loss: float
    norm: float
    broken: str | None


@dataclass
class _Level:
    """How large a number usually is: a moving average."""

    value: float = 0.0
    seen: int = 0

    def follow(self, value: float) -> None:
        self.value = value if self.seen == 0 else _KEEP * self.value + (1.0 - _KEEP) * value
        self.seen += 1

    def times(self, value: float) -> float:
        """So many times its level; 0 before it has one."""
        return value / self.value if self.seen >= _SEEN and self.value > 0 else 0.0


@dataclass
class _Copy:
    """Weights and moments in the CPU's memory."""

    step: int
    buffers: dict[str, np.ndarray]
    used: int = 0


@dataclass
class Guard:
    """Judges the steps of a run. `policy`: skip, rollback or stop; `spike`: a factor, 0 for none.

    Levels are part of a run's state: whoever resumes it judges as if it had never stopped.
    """

    policy: str = "stop"
    spike: float = 0.0
    loss: _Level = field(default_factory=_Level)
    norm: _Level = field(default_factory=_Level)
    copy: _Copy | None = None

    def state(self) -> dict[str, float]:
        """The levels, for a manifest."""
        return {"loss": self.loss.value, "norm": self.norm.value, "seen": float(self.loss.seen)}

    def restore(self, state: Mapping[str, float]) -> None:
        """The levels of `state`; none of what is no state."""
        seen = int(state.get("seen", 0))
        self.loss, self.norm = _Level(state.get("loss", 0.0), seen), _Level(state.get("norm", 0.0), seen)

    def follow(self, found: Attempt) -> None:
        """Takes in a step that was made."""
        self.loss.follow(found.loss)
        self.norm.follow(found.norm)

    def keep(self, step: int, buffers: Mapping[str, Any]) -> None:
        """Copies weights and moments as they are after `step` steps, where the policy is to roll back to them."""
        if self.policy != "rollback":
            return
        if self.copy is None:
            self.copy = _Copy(step, {name: np.array(to_host(flat)) for name, flat in buffers.items()})
        for name, flat in buffers.items():
            self.copy.buffers[name][...] = to_host(flat)
        self.copy.step, self.copy.used = step, 0

    def roll_back(self, engine: "Engine") -> None:
        """Makes weights and moments what they were when they were kept."""
        assert self.copy is not None
        self.copy.used += 1
        for name, flat in engine.state().items():
            fill(flat, self.copy.buffers[name])
        engine.machine.store.refresh()

    def judged(self, engine: "Engine", first: Attempt) -> tuple[Attempt, Verdict]:
        """The attempt that the update is made of, and what came of those before. Collective where one is wrong.

        Raises NumericsError, agreed, where nothing is left to do.
        """
        why = self._wrong(first)
        if why is None:
            return first, Verdict()
        again = engine.again(first)
        why_again = self._wrong(again)
        where = f"step {first.step + 1}"
        if why_again is None:
            return again, Verdict(said=(f"ALARM {where}: {why}{_who(engine, first, again)}; run again it was clean",))
        alone = _each_alone(engine, again)
        guilty = self._guilty(alone)
        if guilty and engine.group.size > 1:
            self._ask_another(engine, again, alone, min(guilty))
        if self.policy != "stop" and 0 < len(guilty) < len(again.losses):
            rest = engine.again(again, frozenset(guilty))
            if self._wrong(rest) is None:
                guilty = {index: f"{why}, twice" for index, why in guilty.items()}
                return rest, Verdict(guilty, said=tuple(skip(first.step, *one) for one in guilty.items()))
            again = engine.again(again)
        if self.policy == "rollback" and self.copy is not None and self.copy.used < _TRIES:
            steps = f"steps {self.copy.step + 1} to {first.step + 1} are undone"
            return again, Verdict(undone=self.copy.step + 1, said=(f"ALARM {where}: {why_again}, twice: {steps}",))
        if self.policy == "stop" or not _finite(again):
            raise agreed(NumericsError(_told(again, alone, why_again)))
        return again, Verdict(
            said=(f"ALARM {where}: {why_again}, twice, and no micro-batch is to blame: the step is made",)
        )

    def _ask_another(self, engine: "Engine", found: Attempt, alone: Sequence[_Found], index: int) -> None:
        """Has the next rank run a micro-batch that is guilty. Where it is sound there its rank is ill, and leaves: for
        that one NumericsError is raised, for the others whatever its death raises. Collective."""
        group = engine.group
        owner = next(rank for rank, held in enumerate(engine.load.ranks) if index in held)
        batch = shared(engine, next((batch for batch in found.batches if batch.index == index), None))
        another = (owner + 1) % group.size
        mine = group.rank == another
        engine.expect_alone([int(rank == another) for rank in range(group.size)])
        told = group.allgather(_alone(engine, found.step, batch) if mine else None, "what another rank computes of it")
        one = _Found(*next(some for some in told if some is not None))
        others = [other for other in alone if other.micro_batch != index]
        if index in self._guilty(sorted([*others, one])) or group.rank != owner:
            group.barrier("another attempt")
            return
        raise NumericsError(
            f"step {found.step + 1}, micro-batch {index}: only this rank's gradient is wrong: it is ill"
        )

    def _wrong(self, found: Attempt) -> str | None:
        """What is wrong with an attempt; None: nothing."""
        if not math.isfinite(found.loss):
            return f"loss {found.loss}"
        if found.broken is not None:
            return f"the gradient of {found.broken} is not finite"
        return self._spike(found.loss, found.norm)

    def _spike(self, loss: float, length: float) -> str | None:
        for name, level, value in (("loss", self.loss, loss), ("gradient norm", self.norm, length)):
            if self.spike and (times := level.times(value)) >= self.spike:
                return f"{name} {value:.4g} is {times:.3g} times its running level"
        return None

    def _guilty(self, alone: Sequence[_Found]) -> dict[int, str]:
        """Micro-batches that are wrong by themselves, and how. Where the mean of a step is a spike, one of its
        micro-batches is one at least; where all are as bad, it is not their doing."""
        found = {one.micro_batch: text for one in alone if (text := _broken(one)) is not None}
        if found:
            return found
        usual = [
            sorted(numbers)[(len(alone) - 1) // 2] for numbers in zip(*((o.loss, o.norm) for o in alone), strict=True)
        ]
        return {
            one.micro_batch: text for one in alone
            if (text := self._spike(one.loss, one.norm)) is not None
            and (one.loss >= _ALIKE * usual[0] or one.norm >= _ALIKE * usual[1])
        }  # fmt: skip


def skip(step: int, index: int, why: str) -> str:
    """What is said of a micro-batch that a step does without."""
    return f"ALARM step {step + 1}: micro-batch {index} skipped: {why}"


def _each_alone(engine: "Engine", found: Attempt) -> list[_Found]:
    """Every micro-batch of an attempt by itself. Collective."""
    engine.expect_alone([len(held) for held in engine.load_of(found.left_out).ranks])
    mine = [_alone(engine, found.step, batch) for batch in found.batches]
    everybodys = engine.group.allgather(mine, "what is wrong with which micro-batch")
    return sorted(_Found(*one) for some in everybodys for one in some)


def _alone(engine: "Engine", step: int, batch: Batch) -> _Found:
    store = engine.machine.store
    buffer = store.new_buffer()
    loss, count = engine.alone(step, batch, buffer), max(1, batch.count)
    length, broken = norm(store, buffer, engine.across)
    if broken is not None:  # by its name's place in the alphabet; said is the first of the model
        named = store.named(buffer).items()  # another rank's part of `broken` perhaps
        broken = next((name for name, gradient in named if not is_finite(gradient)), broken)
    return _Found(batch.index, loss / count, length / count, broken)


def _broken(one: _Found) -> str | None:
    if one.broken is not None:
        return f"its gradient of {one.broken} is not finite"
    return None if math.isfinite(one.loss) else f"its loss is {one.loss}"


def _finite(found: Attempt) -> bool:
    return math.isfinite(found.loss) and found.broken is None


def _who(engine: "Engine", first: Attempt, again: Attempt) -> str:
    """Whose micro-batches were others the first time, as far as their losses say."""
    other = [index for index, loss in first.losses.items() if loss != again.losses[index]]
    if not other:
        return ""
    ranks = sorted({rank for rank, held in enumerate(engine.load.ranks) if {*held} & {*other}})
    return f" (micro-batch {other[0]}, rank {ranks[0]})"


def _told(found: Attempt, alone: Sequence[_Found], why: str) -> str:
    broken = [one for one in alone if _broken(one) is not None]
    if broken:
        one = broken[0]
        what = (
            f"micro-batch {one.micro_batch}: loss {one.loss}, gradient of {one.broken or 'no parameter'} is not finite"
        )
    elif found.broken is not None:
        what = f"gradient of {found.broken} overflows only in the sum over micro-batches"
    else:
        what = f"{why}, twice"
    return f"step {found.step + 1}, {what}; weights are as this step found them: {_REMEDY}"


def is_finite(array: Any) -> bool:
    """Whether all of an array's numbers are."""
    return bool(module_of(array).isfinite(array).all())
