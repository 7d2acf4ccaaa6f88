"""Parts one after another: a model, or the stage of a pipeline."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from mlm_mpi.backend.arrays import deposit
from mlm_mpi.layers.base import Array, Context, Flow, Part, flows_into
from mlm_mpi.params.store import Parameter

Ready = Callable[[int], None]


def nobody_waits(part: int) -> None:
    """No gradient leaves before all are final."""


class Owed(NamedTuple):
    """What the input half of a backward leaves to the weight half."""

    formed: Mapping[Parameter, Array]  # gradients that came with those of inputs, each complete
    later: list[list[Callable[[Context], None]]]  # what forms the others, by part, the last first


class Weights:
    """Where the weights are that a chain's parts read: here. Others may bring them when they are needed."""

    @property
    def waited_s(self) -> float:
        """Seconds in which nothing was done but wait for them."""
        return 0.0

    def expect(self, walks: Sequence[Sequence[int]]) -> None:
        """`walks`: the parts that each rank of dp is about to run, one after another."""

    def need(self, part: int) -> None:
        """Returns when those of a part are here."""

    def done(self, part: int) -> None:
        """They are not read any more."""

    def updated(self) -> None:
        """Those that this rank updates have changed."""

    def complete(self) -> None:
        """Returns when nobody reads those that this rank updates."""


class Chain:
    """The parts in the order of a forward."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self.weights, self._first = Weights(), 0
        self.floor = self._untrained()

    def _untrained(self) -> int:
        """So many parts in front have nothing to learn: a backward ends behind them."""
        trains = (any(not p.frozen for p in part.parameters()) for part in self.parts)
        return next((number for number, learns in enumerate(trains) if learns), len(self.parts))

    def bring(self, weights: Weights, first: int = 0) -> None:
        """From now on these are its parts' weights, and its first part is known to them by that number."""
        self.weights, self._first = weights, first

    @property
    def chunks(self) -> Sequence["Chain"]:
        """What a schedule's chunks are of it, in forward order: it is one."""
        return [self]

    def without_last_part(self) -> "Chain":
        """The same weights: what flows into the last part."""
        other = copy.copy(self)
        other.parts = self.parts[:-1]
        return other

    def parameter_blocks(self) -> list[list[Parameter]]:
        """Parameters by part, in forward order: the segments of the flat store."""
        return [part.parameters() for part in self.parts]

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, list[Any]]:
        """What leaves the last part, and what each backward needs; outside training nothing is kept."""
        kept = []
        for number, part in enumerate(self.parts):
            self.weights.need(self._first + number)
            x, saved = part.forward(x, ctx)
            self.weights.done(self._first + number)
            if ctx.training:
                kept.append(saved if number >= self.floor else None)
        return x, kept

    def backward(self, dy: Flow, kept: list[Any], ctx: Context, ready: Ready = nobody_waits, down_to: int = 0) -> Flow:
        """Writes or adds every gradient of parts [down_to, …), the last first; empties `kept` as it goes.

        `ready(i)` is called as soon as those of part i are final. Parts below `floor` have none.
        """
        for number in range(len(self.parts) - 1, down_to - 1, -1):
            saved = kept.pop()
            if number >= self.floor:
                self.weights.need(self._first + number)
                dy = self.parts[number].backward(dy, saved, ctx)
                self.weights.done(self._first + number)
            ready(number)
        return dy

    def walk(self, forwards: int, backwards: int = 0) -> list[int]:
        """The parts that are run by so many forwards alone, or each with its backward behind it."""
        forth = list(range(len(self.parts)))
        return (forth + forth[self.floor :][::-1]) * backwards + forth * (forwards - backwards)

    def settle(self, total: Mapping[Parameter, Any], whole: Callable[[Parameter, Any], None]) -> None:
        """After a step's gradients have been summed over all lanes: what stages owe each other. `whole` completes a sum
        of which ranks of dp have parts."""

    def backward_input(self, dy: Flow, kept: list[Any], ctx: Context) -> tuple[Flow, Owed]:
        """The half of a backward that an earlier stage waits for; the other is owed. Empties `kept` as it goes.

        `ctx.gradients` belong to no lane: `FlatStore.apart`. Products, half of the arithmetic, are owed, and keep their
        operands; gains come with their input's gradient, and the head's table, whose logits nobody keeps. Source: Qi et
        al., arXiv:2401.10241.
        """
        later: list[list[Callable[[Context], None]]] = []
        for number in reversed(range(len(self.parts))):
            later.append([])
            saved = kept.pop()
            if number >= self.floor:
                self.weights.need(self._first + number)
                dy = self.parts[number].backward(dy, saved, replace(ctx, later=later[-1]))
                self.weights.done(self._first + number)
        return dy, Owed(ctx.gradients, later)

    def backward_weight(self, owed: Owed, ctx: Context, ready: Ready = nobody_waits) -> None:
        """Writes or adds every gradient, with the bits of `backward`; empties what is owed as it goes."""
        for parameter, gradient in owed.formed.items():
            if not parameter.frozen:
                deposit(gradient, ctx.grad(parameter), ctx.accumulate)
        for number in reversed(range(len(self.parts))):
            for work in owed.later.pop(0):
                work(ctx)
            ready(number)


class Recomputed:
    """A part that keeps only what flows in, and runs its forward a second time before its backward.

    The same bits for a third more arithmetic. Source: Chen et al., arXiv:1604.06174.
    """

    def __init__(self, part: Part) -> None:
        self.part, self.INTO = part, flows_into(part)

    def parameters(self) -> list[Parameter]:
        return self.part.parameters()

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, Any]:
        y, _ = self.part.forward(x, ctx)
        return y, x

    def backward(self, dy: Flow, saved: Flow, ctx: Context) -> Flow:
        _, again = self.part.forward(saved, ctx)
        return self.part.backward(dy, again, ctx)
