"""One copy of the model on one rank, or a part of one on each of a few, and the step that keeps all copies equal.

A step: forwards and backwards of my micro-batches in the order of the schedule, gradients lane by lane; the global sum;
one exchange of losses; norm. That is an attempt. What the guard lets pass is clipped and becomes the update. Every rank
sees the same losses, the same norm and the same notes, so every rank decides alike.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from mlm_mpi import order
from mlm_mpi.backend.arrays import Place, forget
from mlm_mpi.comm.buckets import Reduction
from mlm_mpi.comm.collectives import joined_rows
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.comm.watch import Work
from mlm_mpi.data.batch import Batch
from mlm_mpi.errors import NumericsError, agreed
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.chain import Chain, Owed, Ready, nobody_waits
from mlm_mpi.optim import Optimizer, Shared
from mlm_mpi.params.average import Average
from mlm_mpi.params.clip import Owners, clip_factor, norm
from mlm_mpi.params.ownership import Owned
from mlm_mpi.params.store import FlatStore, Parameter
from mlm_mpi.schedules import Forward, Instruction
from mlm_mpi.train.assignment import Assignment
from mlm_mpi.train.audit import Audit, Drawn
from mlm_mpi.train.captured import Captured
from mlm_mpi.train.gathering import weights_sha256
from mlm_mpi.train.guard import Attempt, Guard, Verdict, is_finite, skip

FROZEN = "frozen weights"
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
    guard: Guard = field(default_factory=Guard)  # against numbers that have gone wrong
    audit: Audit = field(default_factory=Audit)  # of ranks by each other
    owned: Owned | None = None  # what this rank alone updates; None: every rank updates all
    owners: Owners | None = None  # who has the sum of a gradient; None: every rank has all of it


@dataclass(frozen=True)
class StepResult:
    """What a step did, equal on all ranks but for this rank's times. `notes`: every rank's notes (R, k).

    `windows`: the digest of what each micro-batch read (data/sampler.py). `ranks`: (name when the job began, how many
    micro-batches it ran), in their order. `verdict`: on its numbers, with those micro-batches that are in no sum.
    """

    loss: float  # mean nats per target
    targets: int
    gradient_norm: float
    learning_rate: float
    step_s: float
    exposed_s: float
    notes: np.ndarray
    windows: tuple[int, ...] = ()
    ranks: tuple[tuple[int, int], ...] = ()
    verdict: Verdict = field(default_factory=Verdict)


@dataclass(frozen=True)
class _Load:
    """Micro-batches of a step: mine, lane by lane, and each rank's, in the order in which all are numbered."""

    lanes: list[list[int]]
    ranks: list[list[int]]

    @cached_property
    def mine(self) -> list[int]:
        return [index for lane in self.lanes for index in lane]

    @cached_property
    def closing(self) -> frozenset[int]:
        """The last of each lane of mine."""
        return frozenset(lane[-1] for lane in self.lanes if lane)

    @cached_property
    def most(self) -> int:
        """As many as a rank has at most."""
        return max(map(len, self.ranks))


@dataclass
class _Flight:
    """A micro-batch between its forward and its backward, or its halves, and then what its head tallied."""

    ctx: Context
    kept: dict[int, list[Any]] = field(default_factory=dict)  # by chunk
    owed: dict[int, Owed] = field(default_factory=dict)  # to weight halves, by chunk

    @property
    def batch(self) -> Batch:
        assert self.ctx.batch is not None
        return self.ctx.batch

    @property
    def loss(self) -> Any:
        """A GPU's is not awaited here. 0 where another stage has the head."""
        return self.ctx.tally.get("loss", 0.0)


@dataclass(frozen=True)
class _Chunk:
    """What a rank holds of the model in one piece, and what is its alone: so each goes through lanes by itself."""

    number: int
    chain: Chain
    block: int  # of the store, its first
    part: slice  # of every flat buffer
    second_sums: dict[Parameter, Any]


def _way(instruction: Instruction) -> int:
    """How an instruction goes through the parts whose weights it reads: 1 forth, -1 back, 0 it reads none."""
    return 1 if isinstance(instruction, Forward) else 0 if instruction.half == "weight" else -1


class Engine:
    """Runs steps. They are counted from 0 here, as randomness and schedules are, and from 1 in whatever is printed."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.group = machine, machine.mesh.group("dp")
        self.world = machine.mesh.world
        self.at = 0, 0  # step and micro-batch that this rank is at
        self.workers = machine.assignment.ranks  # all but spares, as long as there are so many
        self.quarantine: dict[tuple[int, int], str] = {}  # (step, micro-batch) that are never run, and why
        self.skipped = 0  # micro-batches, in this start
        self._plan_lanes()

    def regroup(self, mesh: Mesh, reduction: Callable[[Assignment], Reduction]) -> None:
        """Goes on with the ranks of another mesh, and the weights and moments as they are. Collective over it."""
        nothing: Any = None  # its memory is free before the next one takes as much
        assignment = replace(self.machine.assignment, ranks=min(self.workers, mesh.size("dp")))
        self.machine = replace(self.machine, mesh=mesh, assignment=assignment, reduction=nothing)
        self.group, self.world = mesh.group("dp"), mesh.world
        for store in self.machine.store.stores:
            store.grid = mesh
        if isinstance(self.machine.optimizer, Shared):
            self.machine.optimizer.regroup(mesh)
        self.machine = replace(self.machine, reduction=reduction(assignment))
        self._plan_lanes()

    def _plan_lanes(self) -> None:
        self.load = self._load()
        firsts = self.machine.mesh.column(0, 0)  # a copy of the model is called by its first rank
        counted = ((self.world.name(rank), len(held)) for rank, held in zip(firsts, self.load.ranks, strict=True))
        self.ranks = tuple((name, count) for name, count in counted if count)
        self.second_sums = self._second_sums()
        self.chunks = list(self._chunks())

    def _chunks(self) -> Iterator[_Chunk]:
        block = 0
        for number, chain in enumerate(self.machine.chain.chunks):
            mine = self.machine.store.segments[block : block + len(chain.parts)]
            held = {parameter for part in chain.parts for parameter in part.parameters()}
            seconds = {parameter: second for parameter, second in self.second_sums.items() if parameter in held}
            yield _Chunk(number, chain, block, slice(mine[0][0], mine[-1][1]), seconds)
            block += len(mine)

    def load_of(self, left_out: frozenset[int]) -> _Load:
        """All micro-batches of a step but for some."""
        return self._load(left_out) if left_out else self.load

    def _load(self, left_out: frozenset[int] = frozenset()) -> _Load:
        assignment, ranks = self.machine.assignment, range(self.group.size)
        lanes = [assignment.micro_batches_of(lane) for lane in range(*assignment.lanes_of(self.group.rank))]
        return _Load(
            [[index for index in lane if index not in left_out] for lane in lanes],
            [[index for index in assignment.of_rank(rank) if index not in left_out] for rank in ranks],
        )

    def _second_sums(self) -> dict[Parameter, Any]:
        """A buffer for each tied parameter, reused lane after lane; none where a micro-batch is all of its lane."""
        if self.machine.assignment.micro_batches == self.machine.assignment.lanes:
            return {}
        store, tied = self.machine.store, [span for span in self.machine.store.spans if span.parameter.tied]
        return {span.parameter: store.xp.empty(span.shape, store.dtype) for span in tied}

    def state(self) -> dict[str, Any]:
        """Everything a step changes, as flat buffers by name."""
        m = self.machine
        averaged = {} if m.average is None else m.average.state()
        m.chain.weights.complete()
        kept = m.store.data[m.store.kept]
        return {"weights": kept, **m.optimizer.state(), **averaged}

    def held(self) -> dict[str, Any]:
        """The same, with the weights that no step changes; a stage that has none of these has an empty array."""
        store = self.machine.store
        if not store.frozen_count:
            return self.state()
        return self.state() | {FROZEN: store.data[:0] if store.still is None else store.still.data}

    def measured(self) -> AbstractContextManager[None]:
        """Inside of it layers see the weights that are measured: their average, where there is one. Collective."""
        m = self.machine
        if m.average is None or m.owned is None:
            return nullcontext() if m.average is None else m.store.showing(m.average.flat)
        flat = m.store.new_buffer()
        forget(flat)  # of its pages, others' weights need none yet
        m.owned.part(flat)[...] = m.average.flat
        if m.store.kept == slice(0, m.store.size):
            counts = [stop - start for start, stop in m.owned.every]
            self.group.gather_parts(flat, counts, "the average of the weights")
        return m.store.showing(flat)

    def plan(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """(step, micro-batch) pairs this rank runs in steps [first, stop), one after another."""
        every = ((step, index) for step in range(first, stop) for index in [*self.load.mine, *self._audited(step)])
        return (pair for pair in every if pair not in self.quarantine)

    def _drawn(self, step: int) -> Drawn | None:
        return self.machine.audit.drawn(step, self.machine.assignment, self.group.size)

    def _audited(self, step: int) -> list[int]:
        """The micro-batch of another rank that I run too, if any."""
        drawn = self._drawn(step)
        return [drawn.micro_batch] if drawn is not None and drawn.second == self.group.rank else []

    @np.errstate(over="ignore", invalid="ignore")  # what is not finite is found and named by the guard
    def step(self, step: int, next_batch: NextBatch, notes: tuple[float, ...] = ()) -> StepResult:
        """One update. Collective over dp. Raises, before any update, NumericsError on every rank, and PeerLost where a
        rank has died: all that live make a step, or none does."""
        began, m = time.perf_counter(), self.machine
        inside = self._waited_inside()
        ill = {index: why for (at, index), why in self.quarantine.items() if at == step}
        found, audited = self._checked(self.attempt(step, next_batch, notes, frozenset(ill)), next_batch)
        found, verdict = m.guard.judged(self, found)
        verdict = verdict.after(ill, tuple(skip(step, *one) for one in ill.items()) + audited)
        rate = m.learning_rate(step)
        self._note(f"the update of step {step + 1}", Work("update"))
        m.chain.weights.complete()
        mine = found.total if m.owned is None else m.owned.part(found.total)
        update = mine, rate, clip_factor(m.clip, found.norm) / found.targets, step + 1
        if isinstance(m.optimizer, Shared) and not verdict.undone:
            m.optimizer.prepare(*update)
        self.world.agree(f"step {step + 1} to be made by all")
        self._note(f"the new weights of step {step + 1}", Work("new weights"))
        if verdict.undone:
            m.guard.roll_back(self)
        else:
            m.optimizer.step(*update)
            m.chain.weights.updated()
            if m.average is not None:
                m.average.follow(step + 1)
            m.guard.follow(found)
        self.skipped += len(verdict.skipped)
        self.group.note(f"what follows step {step + 1}")
        seconds = time.perf_counter() - began
        windows = tuple(found.windows.get(index, 0) for index in range(m.assignment.micro_batches))
        return StepResult(
            found.loss, found.targets, found.norm, rate, seconds,
            m.reduction.exposed_s + self._waited_inside() - inside, found.notes, windows, self.ranks, verdict,
        )  # fmt: skip

    def _waited_inside(self) -> float:
        """Seconds that I have waited for those who share a copy of the model with me, or its weights."""
        m = self.machine
        return m.mesh.group("pp").waited_s + m.mesh.group("tp").waited_s + m.chain.weights.waited_s

    def _checked(self, found: Attempt, next_batch: NextBatch) -> tuple[Attempt, tuple[str, ...]]:
        """An attempt that the audit has passed, and what is to be said of it. Collective in a step that is audited."""
        drawn = self._drawn(found.step)
        if drawn is None or drawn.micro_batch in found.left_out:
            return found, ()
        batch = next_batch() if drawn.second == self.group.rank else None
        found, said = self.machine.audit.passed(self, found, drawn, batch)
        return found, (said,) if said else ()

    def attempt(
        self, step: int, next_batch: NextBatch, notes: tuple[float, ...] = (), left_out: frozenset[int] = frozenset()
    ) -> Attempt:
        """The gradient of a step, but for micro-batches left out; changes no weight. Collective over dp."""
        load = self.load_of(left_out)
        self.machine.chain.weights.expect([self._walk(len(held)) for held in load.ranks])
        flights = self._run(step, load, next_batch)
        self.group.note(f"step {step + 1}, through with its micro-batches")
        total = self.machine.reduction.finish()
        self.machine.chain.settle(self.machine.store.by_parameter(total), self._made_whole)
        losses, windows, targets, everybodys = self._exchange(step, load, flights, notes)
        length, broken = norm(self.machine.store, total, self.across, self.machine.owners)
        batches = [flight.batch for flight in flights]
        return Attempt(
            step, left_out, total, losses, windows, targets, length / targets, broken, batches, notes, everybodys
        )

    def _walk(self, micros: int) -> list[int]:
        """The parts that a rank with so many micro-batches runs, one after another."""
        forth = [range(chunk.block, chunk.block + len(chunk.chain.parts)) for chunk in self.chunks]
        ways = {
            1: forth,
            -1: [parts[chunk.chain.floor :][::-1] for parts, chunk in zip(forth, self.chunks, strict=True)],
        }
        every = self.machine.instructions(*self.stage, micros)
        return [part for one in every if (way := _way(one)) for part in ways[way][one.chunk]]

    def _made_whole(self, parameter: Parameter, total: Any) -> None:
        """A parameter's gradient, of whose sum each rank of dp may have a part."""
        m = self.machine
        if m.owners is not None:
            span = next(span for span in m.store.spans if span.parameter is parameter)
            held = [[min(max(edge, span.start), span.stop) for edge in one] for one in m.owners.every]
            m.owners.gather(total.reshape(-1), [stop - start for start, stop in held])

    def again(self, found: Attempt, left_out: frozenset[int] = frozenset()) -> Attempt:
        """Another attempt at the same step, but for more micro-batches left out. Collective over dp."""
        batches = iter([batch for batch in found.batches if batch.index not in left_out])
        return self.attempt(found.step, batches.__next__, found.mine, found.left_out | left_out)

    def expect_alone(self, counts: list[int]) -> None:
        """Says how many micro-batches each rank of dp is about to run by itself. Collective over dp."""
        chain = self.machine.chain
        chain.weights.expect([chain.walk(count, count) for count in counts])

    def alone(
        self, step: int, batch: Batch, buffer: Any, lane: Mapping[Parameter, Any] | None = None, closes: bool = True
    ) -> float:
        """Forward and backward of one micro-batch, its gradient over what a flat buffer holds; its summed loss.

        `lane` and `closes`, as a context has them: where it stands for the first of a lane.
        """
        self.group.note(f"step {step + 1}, micro-batch {batch.index} by itself")
        gradients = self.machine.store.by_parameter(buffer)
        ctx = replace(self._context(step, batch), gradients=gradients, lane=lane or {}, closes=closes)
        flight = _Flight(self._there(ctx))
        _, kept = self.machine.chain.forward((), flight.ctx)
        self.machine.chain.backward((), kept, flight.ctx)
        return float(self.machine.mesh.group("pp").allgather(float(flight.loss), "the loss of one micro-batch")[-1])

    def _run(self, step: int, load: _Load, next_batch: NextBatch) -> list[_Flight]:
        """Forward and backward of my micro-batches; gradients leave in their order, whatever the schedule."""
        self.machine.reduction.begin()
        flights: list[_Flight] = []
        backwards = [self._backwards(load, flights, chunk) for chunk in self.chunks]
        for instruction in self.machine.instructions(*self.stage, len(load.mine)):
            micro, chunk = instruction.micro, self.chunks[instruction.chunk]
            if isinstance(instruction, Forward):
                if micro == len(flights):
                    flights.append(self._begun(step, load.mine[micro], load.closing, next_batch))
                self._forward(flights[micro], chunk)
            elif instruction.half == "input":
                self._backward_input(flights[micro], chunk)
            else:
                next(backwards[chunk.number])
        for rest in backwards:
            next(rest, None)  # closes lanes of which everything is left out
        return flights

    def _begun(self, step: int, index: int, closing: frozenset[int], next_batch: NextBatch) -> _Flight:
        self.at = step, index
        self.group.note(f"step {step + 1}, waiting for the tokens of micro-batch {index}")
        ctx = replace(self._context(step, next_batch()), closes=index in closing)
        return _Flight(ctx if self.machine.captured is not None else self._there(ctx))

    def _forward(self, flight: _Flight, chunk: _Chunk) -> None:
        self._note_micro_batch(flight.batch, "forward")
        if self.machine.captured is None:  # a graph holds both ways
            _, flight.kept[chunk.number] = chunk.chain.forward((), flight.ctx)

    def _context(self, step: int, batch: Batch) -> Context:
        m = self.machine
        return Context(m.mesh, m.seed, step, batch.index, training=True, batch=batch, shares=m.shares)

    def _note_micro_batch(self, batch: Batch, way: str) -> None:
        shapes = [array.shape for array in batch.arrays()]  # which ramps change, and with them how long it takes
        work = Work(f"{way} of {shapes}", batch.step, batch.index)
        self._note(f"step {batch.step + 1}, micro-batch {batch.index}, {way}", work)

    def _note(self, text: str, work: Work) -> None:
        """Steady work, but on a GPU: there kernels are launched, which says nothing of how long they take."""
        self.group.note(text, work._replace(kind="") if self.machine.place.on_gpu else work)

    def _there(self, ctx: Context) -> Context:
        """With its batch where the rank computes."""
        assert ctx.batch is not None
        return replace(ctx, batch=ctx.batch.map(self.machine.place.put))

    def _backwards(self, load: _Load, flights: list[_Flight], chunk: _Chunk) -> Iterator[None]:
        """A chunk's backward of one micro-batch after the other. A lane opens before its first, closes after its last.

        A lane without any holds −0, which an addition leaves alone. Chunks may have different lanes open.
        """
        reduction, audit, number = self.machine.reduction, self.machine.audit, 0
        drawn = self._drawn(self.at[0])
        first, stop = self.machine.assignment.lanes_of(self.group.rank)
        for lane, members in zip(range(first, stop), load.lanes, strict=True):
            buffer, fresh = reduction.open_lane(lane)
            if not members:
                if fresh:
                    buffer[chunk.part] = -0.0
                reduction.close_lane(lane, chunk.part)
            gradients = self.machine.store.by_parameter(buffer)
            for second in chunk.second_sums.values():
                second[...] = -0.0  # which addition leaves alone, where 0 would turn -0 into 0
            for index in members:
                flight, closes = flights[number], index in load.closing
                ctx = replace(flight.ctx, gradients=gradients, accumulate=not fresh, lane=chunk.second_sums)
                self._backward(flight, chunk, ctx, leaves=closes and lane == stop - 1)
                if drawn is not None and index == drawn.micro_batch:
                    audit.witness = {index: audit.testimony(buffer, self.second_sums)}
                number, fresh = number + 1, False
                if closes:
                    reduction.close_lane(lane, chunk.part)
                yield

    def _backward_input(self, flight: _Flight, chunk: _Chunk) -> None:
        """No lane need be open: what belongs to one is kept apart. A graph holds both halves, and runs as the other."""
        if self.machine.captured is None:
            self._note_micro_batch(flight.batch, "input half of the backward")
            ctx = replace(flight.ctx, gradients=self.machine.store.apart())
            kept = flight.kept.pop(chunk.number)
            _, flight.owed[chunk.number] = chunk.chain.backward_input((), kept, ctx)

    def _backward(self, flight: _Flight, chunk: _Chunk, ctx: Context, leaves: bool) -> None:
        """`leaves`: gradients are final, block by block."""
        ready = self._leaving(chunk) if leaves else nobody_waits
        owed = flight.owed.pop(chunk.number, None)
        if owed is not None:
            self._note_micro_batch(flight.batch, "weight half of the backward")
            chunk.chain.backward_weight(owed, ctx, ready)
            return
        self._note_micro_batch(flight.batch, "backward")
        captured = self.machine.captured
        if captured is not None and (not leaves or self.group.size == 1):
            captured.forward_backward(ctx)
            return
        if captured is not None:  # buckets leave while this backward runs, which no graph can do
            ctx = self._there(ctx)
            _, flight.kept[chunk.number] = chunk.chain.forward((), ctx)
        chunk.chain.backward((), flight.kept.pop(chunk.number), ctx, ready)

    def _leaving(self, chunk: _Chunk) -> Ready:
        return lambda part: self.machine.reduction.block_ready(chunk.block + part)

    def _exchange(
        self, step: int, load: _Load, flights: list[_Flight], notes: tuple[float, ...]
    ) -> tuple[dict[int, float], dict[int, int], int, np.ndarray]:
        """(summed loss and digest of each micro-batch, in their order; target count; everybody's notes)."""
        most = load.most
        row = np.zeros(3 * most + len(notes))
        row[: len(flights)] = [float(flight.loss) for flight in flights]
        row[most : most + len(flights)] = [flight.batch.count for flight in flights]
        row[2 * most : 2 * most + len(flights)] = [flight.batch.digest for flight in flights]
        row[3 * most :] = notes
        everybodys = self.world.allgather_array(row, f"the losses of step {step + 1}")
        mesh = self.machine.mesh  # of each copy the last stage has losses, and all its ranks of tp the same
        table = everybodys[mesh.column(mesh.size("pp") - 1, mesh.coord("tp"))]
        losses, windows, targets = dict[int, float](), dict[int, int](), 0.0
        for rank, indices in enumerate(load.ranks):
            for k, index in enumerate(indices):
                losses[index] = float(table[rank, k])
                windows[index] = int(table[rank, 2 * most + k])
                targets += float(table[rank, most + k])
        return losses, windows, int(targets), everybodys[:, 3 * most :]

    @property
    def stage(self) -> tuple[int, int]:
        """(which stage I am of a pipeline, of how many)."""
        return self.machine.mesh.coord("pp"), self.machine.mesh.size("pp")

    def across(self, mine: dict[str, float]) -> dict[str, float]:
        """Sums over each parameter that I hold -> over all of the model's, whole. Collective over tp and pp."""
        mesh, spans = self.machine.mesh, self.machine.store.own
        cut = [span.parameter.name for span in spans if "tp" in span.parameter.layout.axes]
        joined = joined_rows(mesh.group("tp"), np.array([mine[name] for name in cut]), "sums over cut parameters")
        mine = mine | dict(zip(cut, joined.tolist(), strict=True))
        every = mesh.group("pp").allgather(mine, "sums over the parameters of other stages")
        return {name: value for some in every for name, value in some.items()}

    def weights_sha256(self) -> str:
        """The hash of the weights, which is that of any other mesh. Collective over it."""
        self.machine.chain.weights.complete()
        return weights_sha256(self.machine.store, self.machine.mesh)

    def keep(self, step: int) -> None:
        """What the guard may roll back to: weights and moments after `step` steps."""
        self.machine.guard.keep(step, self.state())

    def check_weights(self, step: int) -> None:
        """Raises NumericsError, on every rank alike, if an update has made a weight that no checkpoint may hold."""
        m, mesh, what = self.machine, self.machine.mesh, "a look at the weights"
        named = m.store.named(m.store.data)
        if m.owned is not None:
            named = {name: weights for name, (_, weights) in m.owned.named(m.owned.data).items()}
        broken = [name for name, weights in named.items() if not is_finite(weights)]
        everybodys = [name for some in mesh.group("tp").allgather(broken[:1], what) for name in some]
        if m.owned is not None:
            everybodys = [name for some in self.group.allgather(everybodys, what) for name in some]
        everybodys = mesh.group("pp").allgather(everybodys, what)
        if first := [name for some in everybodys for name in some]:
            raise agreed(
                NumericsError(
                    f"weights of {first[0]} are not finite after step {step}, which is not saved: "
                    "lower optim.learning_rate, raise optim.warmup_steps or set optim.clip"
                )
            )
