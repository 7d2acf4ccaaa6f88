"""A model cut into the stages of a pipeline: which parts a stage has, and chains that talk to their neighbours.

Each stage has a slice of the model, or several, with others' between them. It runs its instructions (`schedules/`) and
knows of the others only what arrives: activations from the slice before, their gradients from the one behind. A table
that embedding and head share lies on the first and on the last stage. The head's sum over a lane goes to the first
stage, which adds the embedding's to it, and forms the sum over lanes; the last stage gets that, and makes the same
update.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlm_mpi.comm.group import Group
from mlm_mpi.layers.base import Context, Flow, Part, flows_into
from mlm_mpi.layers.chain import Chain, Owed, Ready, Weights, nobody_waits
from mlm_mpi.params.store import Parameter

# A tag is one of these, and of the slice that a flow goes to. What has one arrives in the order in which it was sent,
# which is that of micro-batches.
_LANE, _TOTAL, _ACTIVATIONS, _GRADIENTS = range(4)
_KINDS = 4


def cut_parts(costs: Sequence[float], stages: int) -> list[tuple[int, int]]:
    """Parts [first, stop) of each stage, or slice of one, at least one, the dearest as cheap as it can be."""
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    best: list[list[tuple[float, int]]] = [[(cost, 0) for cost in before]]  # dearest, and where the last begins
    for _ in range(1, stages):
        row = [(math.inf, 0)]
        for stop in range(1, len(before)):
            ways = ((max(best[-1][first][0] if first else math.inf, before[stop] - before[first]), first)
                    for first in range(stop))  # fmt: skip
            row.append(min(ways))
        best.append(row)
    cuts, stop = [], len(costs)
    for row in reversed(best):
        cuts.append((row[stop][1], stop))
        stop = row[stop][1]
    return cuts[::-1]


def cost_of(part: Part) -> float:
    """Weights that each token is multiplied by, which is what a part's time goes with: looking up costs nothing."""
    table = getattr(part, "table", None)  # a head's, its own or the embedding's
    weights = [p for p in part.parameters() if p.matrices is not None]
    return float(sum(math.prod(p.layout.shape) for p in [*weights, *([] if table is None else [table])]))


def in_words(cuts: Sequence[tuple[int, int]], costs: Sequence[float], stages: int) -> str:
    """Parts of each stage, by chunks, counted from the embedding, which is 0, and its part of all work."""
    whole, words = sum(costs) or 1.0, []
    for stage in range(stages):
        mine = cuts[stage::stages]
        work = sum(sum(costs[first:stop]) for first, stop in mine)
        words.append(" and ".join(f"{first}–{stop - 1}" for first, stop in mine) + f" ({work / whole:.0%})")
    return ", ".join(words)


class Slice(Chain):
    """A contiguous range of the model: what flows in comes from the slice before it, what flows out goes to the next.

    Of P stages slice v is stage v mod P's, its chunk v // P: its neighbours are on the stages before and behind, which
    the first and the last one are to each other. Source: Narayanan et al., arXiv:2104.04473, section 2.2.
    """

    def __init__(
        self, parts: Sequence[Part], number: int, slices: int, pp: Group, width: int, dtype: Any,
        table: Parameter | None, learns_before: bool = True, behind: Part | None = None,
    ) -> None:  # fmt: skip
        """Between slices flow arrays (B, T, `width`), as many as the part behind the cut takes, and of such lengths.

        `table`: the one that first and last slice share and train, if any. `learns_before`: whether a slice before this
        one has something to learn, and waits for gradients. `behind`: the part that what flows out goes to.
        """
        super().__init__(parts)
        self.learns_before = learns_before and number > 0
        if self.learns_before:
            self.floor = 0
        self.number, self.pp, self.width, self.dtype = number, pp, width, dtype
        self._into, self._out = flows_into(self.parts[0]), () if behind is None else flows_into(behind)
        self.first, self.last = number == 0, number == slices - 1
        self.table = table if self.first or self.last else None
        self._head_sum: Any = None  # over a lane, where input halves form the table's gradient

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, list[Any]]:
        x = () if self.first else self._received(ctx, self.number - 1, _ACTIVATIONS)
        y, kept = super().forward(x, ctx)
        if not self.last:
            self._send(y, self.number + 1, _ACTIVATIONS)
        return y, kept

    def backward(
        self, dy: Flow, kept: list[Any], ctx: Context, ready: Ready = nobody_waits, down_to: int = 0
    ) -> Flow:  # fmt: skip
        dy = self._dy(ctx)
        self._take_table(ctx)
        dx = super().backward(dy, kept, ctx, ready, down_to)
        self._give_table(ctx)
        self._give_dx(dx)
        return dx

    def backward_input(self, dy: Flow, kept: list[Any], ctx: Context) -> tuple[Flow, Owed]:
        dx, owed = super().backward_input(self._dy(ctx), kept, ctx)
        self._give_dx(dx)
        return dx, owed if self.table is None or not self.last else self._without_table(owed, self.table, ctx)

    def _without_table(self, owed: Owed, table: Parameter, ctx: Context) -> Owed:
        """The head's gradient comes with that of its input. Its sum over a lane does not wait for weight halves, which
        the first stage makes P − 1 micro-batches sooner than the last one."""
        formed = dict(owed.formed)
        gradient = formed.pop(table)
        if self._head_sum is None:
            self._head_sum = gradient
        else:
            self._head_sum += gradient
        if ctx.closes:
            self.pp.mail.send(self._head_sum, 0, _LANE)
            self._head_sum = None
        return owed._replace(formed=formed)

    def backward_weight(self, owed: Owed, ctx: Context, ready: Ready = nobody_waits) -> None:
        self._take_table(ctx)
        super().backward_weight(owed, ctx, ready)

    def settle(self, total: Mapping[Parameter, Any], whole: Callable[[Parameter, Any], None]) -> None:
        """The sum over all lanes of the shared table's gradient, from the first slice to the last."""
        if self.table is None:
            return
        if self.first:
            whole(self.table, total[self.table])
            message = self.pp.mail.send(total[self.table], self.pp.size - 1, _TOTAL)
            self.pp.wait(message, "the last stage to take the table's gradient")
        else:
            self._receive(total[self.table], 0, _TOTAL, "the gradient of the table")

    def _dy(self, ctx: Context) -> Flow:
        nobody_learns = self.floor == len(self.parts)  # here or before: no gradient comes
        return () if self.last or nobody_learns else self._received(ctx, self.number + 1, _GRADIENTS)

    def _give_dx(self, dx: Flow) -> None:
        if self.learns_before:
            self._send(dx, self.number - 1, _GRADIENTS)

    def _take_table(self, ctx: Context) -> None:
        """The head's sum over a lane, to which the embedding's will be added."""
        if self.table is not None and self.first and ctx.closes:
            self._receive(ctx.grad(self.table), self.pp.size - 1, _LANE, "the head's sum over a lane")

    def _give_table(self, ctx: Context) -> None:
        if self.table is not None and self.last and ctx.closes:
            self.pp.mail.send(ctx.grad(self.table).copy(), 0, _LANE)

    def _send(self, flow: Flow, to: int, tag: int) -> None:
        for array in flow:
            self.pp.mail.send(_bytes(np.ascontiguousarray(array)), to % self.pp.size, _KINDS * to + tag)

    def _received(self, ctx: Context, source: int, tag: int) -> Flow:
        """Activations of the slice before, or gradients of the one behind."""
        kind, flows = ("activations", self._into) if tag == _ACTIVATIONS else ("gradients", self._out)
        stage = source % self.pp.size
        what, arrays = f"the {kind} of micro-batch {ctx.micro_batch} from stage {stage}", []
        assert ctx.batch is not None
        for flow in flows if ctx.batch.source is not None else ["batch"]:
            arrays.append(self._empty(ctx.of_source() if flow == "source" else ctx))
            self._receive(_bytes(arrays[-1]), stage, _KINDS * self.number + tag, what)
        return tuple(arrays)

    def _empty(self, ctx: Context) -> np.ndarray:
        """Room for what this rank has of all positions of a batch: (B, t, C)."""
        assert ctx.batch is not None
        batch, length = ctx.batch.inputs["ids"].shape
        length //= ctx.tp.size if ctx.cuts_positions else 1
        return np.empty((batch, length, self.width), self.dtype)

    def _receive(self, array: Any, rank: int, tag: int, what: str) -> None:
        self.pp.wait(self.pp.mail.receive(array, rank, tag), what)


class Stage(Chain):
    """What a rank holds of a pipeline: chunks, which are slices of the model, with others' between them.

    It goes through them at once, as an evaluation does; a schedule takes them one by one, and only them in halves.
    """

    def __init__(self, chunks: Sequence[Slice], cut: str = "") -> None:
        """`cut`: who has which parts, for people."""
        super().__init__([part for chunk in chunks for part in chunk.parts])
        self._chunks: list[Chain] = list(chunks)
        self.floor = sum(chunk.floor for chunk in chunks)
        self.cut = cut

    @property
    def chunks(self) -> Sequence[Chain]:
        return self._chunks

    def without_last_part(self) -> Chain:
        other = copy.copy(self)
        *first, last = self._chunks
        other.parts, other._chunks = self.parts[:-1], [*first, last.without_last_part()]
        return other

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, list[Any]]:
        kept = []
        for chunk in self._chunks:
            x, some = chunk.forward((), ctx)
            kept += some
        return x, kept

    def backward(
        self, dy: Flow, kept: list[Any], ctx: Context, ready: Ready = nobody_waits, down_to: int = 0
    ) -> Flow:  # fmt: skip
        before = len(self.parts)
        for chunk in reversed(self._chunks):
            before -= len(chunk.parts)
            dy = chunk.backward((), kept, ctx, _later(ready, before), max(0, down_to - before))
        return dy

    def settle(self, total: Mapping[Parameter, Any], whole: Callable[[Parameter, Any], None]) -> None:
        for chunk in self._chunks:
            chunk.settle(total, whole)

    def bring(self, weights: Weights, first: int = 0) -> None:
        super().bring(weights, first)
        for chunk in self._chunks:
            chunk.bring(weights, first)
            first += len(chunk.parts)


def _later(ready: Ready, before: int) -> Ready:
    """For a chunk, what `ready` is for a stage that has so many parts before it."""
    return lambda part: ready(before + part)


def _bytes(array: np.ndarray) -> np.ndarray:
    """The memory of a contiguous array, whose type MPI need not know: bfloat16 say."""
    return array.reshape(-1).view(np.uint8)
