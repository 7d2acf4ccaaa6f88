"""One copy of the model on one rank, and the step that keeps all copies equal.

A step: forwards and backwards of my micro-batches in the order of the schedule, gradients lane by lane; the global sum;
one exchange of losses; norm, clipping, update. Every rank sees the same losses, the same norm and the same notes, so
every rank decides alike.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mlm_mpi import order
from mlm_mpi.backend.arrays import Place, module_of
from mlm_mpi.comm.buckets import Reduction
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.comm.watch import Work
from mlm_mpi.data.batch import Batch
from mlm_mpi.errors import NumericsError, agreed
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.chain import Chain, Ready
from mlm_mpi.optim import Optimizer, Shared
from mlm_mpi.params.average import Average
from mlm_mpi.params.clip import clip_factor, norm
from mlm_mpi.params.store import FlatStore, Parameter
from mlm_mpi.schedules import Forward, Instruction
from mlm_mpi.train.assignment import Assignment
from mlm_mpi.train.captured import Captured

NextBatch = Callable[[], Batch]


@dataclass(frozen=True)
class Machine:
    """What an engine is made of."""

    mesh: Mesh
    place: Place
    chain: Chain
    store: FlatStore
    optimizer: Optimizer
    reduction: Reduction
    assignment: Assignment
    instructions: Callable[[int, int, int], Iterator[Instruction]]  # stage, stages, micro-batches: a file of schedules/
    learning_rate: Callable[[int], float]
    clip: float = 0.0  # the largest norm of a gradient, 0: any
    seed: int = 0
    shares: int = order.MOST  # of sums over rows
    captured: Captured | None = None  # forward and backward as CUDA graphs
    average: Average | None = None  # of weights: what is measured in their place


@dataclass(frozen=True)
class StepResult:
    """What a step did, equal on all ranks but for this rank's times. `notes`: every rank's notes (R, k)."""

    loss: float  # mean nats per target
    targets: int
    gradient_norm: float
    learning_rate: float
    step_s: float
    exposed_s: float
    notes: np.ndarray


@dataclass
class _Flight:
    """A micro-batch between its forward and its backward, and then what its head tallied."""

    ctx: Context
    kept: list[Any] = field(default_factory=list)

    @property
    def batch(self) -> Batch:
        assert self.ctx.batch is not None
        return self.ctx.batch

    @property
    def loss(self) -> Any:
        """A GPU's is not awaited here."""
        return self.ctx.tally["loss"]


class Engine:
    """Runs steps. They are counted from 0 here, as randomness and schedules are, and from 1 in whatever is printed."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.group = machine, machine.mesh.group("dp")
        self.at = 0, 0  # step and micro-batch that this rank is at
        self._plan_lanes()

    def regroup(self, mesh: Mesh, reduction: Callable[[Assignment], Reduction]) -> None:
        """Goes on with the ranks of another mesh, and the weights and moments as they are. Collective over it."""
        nothing: Any = None  # its memory is free before the next one takes as much
        assignment = replace(self.machine.assignment, ranks=mesh.size("dp"))
        self.machine = replace(self.machine, mesh=mesh, assignment=assignment, reduction=nothing)
        self.group = mesh.group("dp")
        self.machine.store.grid = mesh
        if isinstance(self.machine.optimizer, Shared):
            self.machine.optimizer.regroup(mesh)
        self.machine = replace(self.machine, reduction=reduction(assignment))
        self._plan_lanes()

    def _plan_lanes(self) -> None:
        assignment, ranks = self.machine.assignment, range(self.group.size)
        self.lanes = [assignment.micro_batches_of(lane) for lane in range(*assignment.lanes_of(self.group.rank))]
        self.mine = [index for lane in self.lanes for index in lane]
        self._counts = [len(assignment.of_rank(rank)) for rank in ranks]
        self.second_sums = self._second_sums()

    def _second_sums(self) -> dict[Parameter, Any]:
        """A buffer for each tied parameter, reused lane after lane; none where a micro-batch is all of its lane."""
        if not any(len(lane) > 1 for lane in self.lanes):
            return {}
        store, tied = self.machine.store, [span for span in self.machine.store.spans if span.parameter.tied]
        return {span.parameter: store.xp.empty(span.shape, store.dtype) for span in tied}

    def state(self) -> dict[str, Any]:
        """Everything a step changes, as flat buffers by name."""
        m = self.machine
        averaged = {} if m.average is None else m.average.state()
        return {"weights": m.store.data, **m.optimizer.state(), **averaged}

    def measured(self) -> AbstractContextManager[None]:
        """Inside of it layers see the weights that are measured: their average, where there is one."""
        m = self.machine
        return nullcontext() if m.average is None else m.store.showing(m.average.flat)

    def plan(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """(step, micro-batch) pairs this rank runs in steps [first, stop), one after another."""
        return ((step, index) for step in range(first, stop) for index in self.mine)

    @np.errstate(over="ignore", invalid="ignore")  # what is not finite is found and named below
    def step(self, step: int, next_batch: NextBatch, notes: tuple[float, ...] = ()) -> StepResult:
        """One update. Collective over dp. Raises, before any update, NumericsError on every rank, and PeerLost where a
        rank has died: all that live make a step, or none does."""
        began, m = time.perf_counter(), self.machine
        flights = self._run(step, next_batch)
        self.group.note(f"step {step + 1}, through with its micro-batches")
        total = m.reduction.finish()
        loss, targets, all_notes = self._exchange(step, flights, notes)
        rate = m.learning_rate(step)
        length, broken = norm(m.store, total)
        if not math.isfinite(loss) or broken is not None:
            self._blame(step, flights, broken)
        self._note(f"the update of step {step + 1}", Work("update"))
        update = total, rate, clip_factor(m.clip, length / targets) / targets, step + 1
        if isinstance(m.optimizer, Shared):
            m.optimizer.prepare(*update)
        self.group.agree(f"step {step + 1} to be made by all")
        self._note(f"the new weights of step {step + 1}", Work("new weights"))
        m.optimizer.step(*update)
        if m.average is not None:
            m.average.follow(step + 1)
        self.group.note(f"what follows step {step + 1}")
        seconds = time.perf_counter() - began
        return StepResult(loss / targets, targets, length / targets, rate, seconds, m.reduction.exposed_s, all_notes)

    def _run(self, step: int, next_batch: NextBatch) -> list[_Flight]:
        """Forward and backward of my micro-batches; gradients leave in their order, whatever the schedule."""
        self.machine.reduction.begin()
        flights: list[_Flight] = []
        backwards = self._backwards(flights)
        for instruction in self.machine.instructions(0, 1, len(self.mine)):
            if isinstance(instruction, Forward):
                flights.append(self._forward(step, self.mine[instruction.micro], next_batch))
            else:
                next(backwards)
        return flights

    def _forward(self, step: int, index: int, next_batch: NextBatch) -> _Flight:
        self.at = step, index
        self.group.note(f"step {step + 1}, waiting for the tokens of micro-batch {index}")
        batch = next_batch()
        self._note_micro_batch(batch, "forward")
        m = self.machine
        ctx = Context(m.mesh, m.seed, step, index, training=True, batch=batch, shares=m.shares)
        if self.machine.captured is not None:  # a graph holds both ways
            return _Flight(ctx)
        return self._flown(ctx)

    def _note_micro_batch(self, batch: Batch, way: str) -> None:
        shapes = [array.shape for array in batch.arrays()]  # which ramps change, and with them how long it takes
        work = Work(f"{way} of {shapes}", batch.step, batch.index)
        self._note(f"step {batch.step + 1}, micro-batch {batch.index}, {way}", work)

    def _note(self, text: str, work: Work) -> None:
        """Steady work, but on a GPU: there kernels are launched, which says nothing of how long they take."""
        self.group.note(text, work._replace(kind="") if self.machine.place.on_gpu else work)

    def _flown(self, ctx: Context) -> _Flight:
        assert ctx.batch is not None
        ctx = replace(ctx, batch=ctx.batch.map(self.machine.place.put))
        _, kept = self.machine.chain.forward((), ctx)
        return _Flight(ctx, kept)

    def _backwards(self, flights: list[_Flight]) -> Iterator[None]:
        """The backward of one micro-batch after the other. A lane opens before its first, and closes after its last."""
        reduction, number = self.machine.reduction, 0
        first, stop = self.machine.assignment.lanes_of(self.group.rank)
        for lane, members in zip(range(first, stop), self.lanes, strict=True):
            buffer, fresh = reduction.open_lane(lane)
            gradients = self.machine.store.by_parameter(buffer)
            for second in self.second_sums.values():
                second[...] = -0.0  # which addition leaves alone, where 0 would turn -0 into 0
            for index in members:
                flight, closes = flights[number], index == members[-1]
                ctx = replace(
                    flight.ctx, gradients=gradients, accumulate=not fresh, lane=self.second_sums, closes=closes
                )
                self._backward(flight, ctx, reduction.block_ready if closes and lane == stop - 1 else None)
                number, fresh = number + 1, False
                if closes:
                    reduction.close_lane(lane)
                yield

    def _backward(self, flight: _Flight, ctx: Context, ready: Ready | None = None) -> None:
        self._note_micro_batch(flight.batch, "backward")
        captured = self.machine.captured
        if captured is not None and (ready is None or self.group.size == 1):
            captured.forward_backward(ctx)
            return
        if captured is not None:  # buckets leave while this backward runs, which no graph can do
            flight.kept = self._flown(ctx).kept
            ctx = replace(ctx, batch=flight.batch.map(self.machine.place.put))
        self.machine.chain.backward((), flight.kept, ctx, *(() if ready is None else (ready,)))

    def _exchange(self, step: int, flights: list[_Flight], notes: tuple[float, ...]) -> tuple[float, int, np.ndarray]:
        """(summed loss, target count, everybody's notes): float64, added in micro-batch order."""
        most = max(self._counts)
        row = np.zeros(2 * most + len(notes))
        row[: len(flights)] = [float(flight.loss) for flight in flights]
        row[most : most + len(flights)] = [flight.batch.count for flight in flights]
        row[2 * most :] = notes
        table = self.group.allgather_array(row, f"the losses of step {step + 1}")
        loss, targets = 0.0, 0.0
        for rank, count in enumerate(self._counts):  # ranks hold contiguous micro-batches: this is their order
            for k in range(count):
                loss += float(table[rank, k])
                targets += float(table[rank, most + k])
        return loss, int(targets), table[:, 2 * most :]

    def _blame(self, step: int, flights: list[_Flight], broken: str | None) -> None:
        """Runs this step's micro-batches again, one by one, and names the first that is not finite."""
        gradients = self.machine.store.by_parameter(self.machine.store.new_buffer())
        found = []
        for flight in flights:
            again = self._flown(replace(flight.ctx, gradients=gradients, accumulate=False, tally={}))
            self.machine.chain.backward((), again.kept, again.ctx)
            culprits = [parameter.name for parameter, gradient in gradients.items() if not _finite(gradient)]
            if culprits or not math.isfinite(float(flight.loss)):
                name = culprits[0] if culprits else None
                found.append((again.batch.index, name, str(float(flight.loss))))
        reports = sorted(r for reports in self.group.allgather(found, "the culprit's name") for r in reports)
        if reports:
            index, name, text = reports[0]
            where = f"micro-batch {index}: loss {text}, gradient of {name or 'no parameter'} is not finite"
        else:
            where = f"gradient of {broken} overflows only in the sum over micro-batches"
        raise agreed(
            NumericsError(
                f"step {step + 1}, {where}; weights are as this step found them: "
                "lower optim.learning_rate, raise optim.warmup_steps or set optim.clip"
            )
        )

    def check_weights(self, step: int) -> None:
        """Raises NumericsError, on every rank alike, if an update has made a weight that no checkpoint may hold."""
        store = self.machine.store
        for name, weights in store.named(store.data).items():
            if not _finite(weights):
                raise agreed(
                    NumericsError(
                        f"weights of {name} are not finite after step {step}, which is not saved: "
                        "lower optim.learning_rate, raise optim.warmup_steps or set optim.clip"
                    )
                )


def _finite(array: Any) -> bool:
    return bool(module_of(array).isfinite(array).all())
