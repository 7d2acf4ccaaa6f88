"""One copy of the model on one rank, and the step that keeps all copies equal.

A step: my micro-batches, lane by lane; the global sum; one exchange of losses; norm, clipping, update.
Every rank sees the same losses, the same norm and the same flags, so every rank decides alike.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil

from mlm_mpi.backend import kernels
from mlm_mpi.backend.arrays import Place, cpu, gpu, module_of, nccl
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.comm.reduction import Allreduce, Canonical, Nccl, Reduction
from mlm_mpi.comm.transport import transport
from mlm_mpi.config import Config, to_table
from mlm_mpi.data.loader import MicroBatch
from mlm_mpi.errors import ConfigError, NumericsError, agreed
from mlm_mpi.layers.base import Context
from mlm_mpi.models import gpt
from mlm_mpi.optim import make_optimizer
from mlm_mpi.optim.clip import clip_factor, norm
from mlm_mpi.optim.schedule import learning_rate
from mlm_mpi.params.layout import cut
from mlm_mpi.params.store import FlatStore
from mlm_mpi.train.assignment import Assignment
from mlm_mpi.train.captured import Captured

NextBatch = Callable[[], MicroBatch]


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


class Replica:
    """Model, flat store, optimiser and reduction of a rank."""

    def __init__(self, config: Config, vocabulary: int, mesh: Mesh, place: Place | None = None) -> None:
        self.config, self.mesh, train = config, mesh, config.train
        self.place = place or cpu(train.dtype)
        self.group = mesh.group("dp")
        self.stack = gpt.build(config.model, vocabulary, train.recompute)
        self.store = FlatStore(self.stack.parameter_blocks(), mesh, train.dtype, self.place)
        self.optimizer = make_optimizer(config.optim, self.store)
        self.assignment = Assignment(train.micro_batches, train.lanes, self.group.size)
        self.reduction = self._make_reduction()
        self.captured = Captured(self.stack, self.store) if config.backend.graphs else None
        self._most = max(len(self.assignment.of_rank(rank)) for rank in range(self.group.size))

    def _make_reduction(self) -> Reduction:
        comm, train, segments = self.config.comm, self.config.train, self.store.segments
        group = self.group.duplicate()  # tags of gradients must not meet other messages
        bucket_bytes = comm.bucket_mib * 2**20
        ways = self.place, transport(self.place, group, comm.gpu_aware)
        if comm.reduction == "allreduce":
            return Allreduce(group, segments, bucket_bytes, train.dtype, comm.overlap, *ways)
        if comm.reduction == "nccl":
            return Nccl(group, segments, bucket_bytes, train.dtype, comm.overlap, *ways)
        ranges = [self.assignment.lanes_of(rank) for rank in range(group.size)]
        return Canonical(group, train.lanes, ranges, segments, bucket_bytes, train.dtype, comm.overlap, cut, *ways)

    def state(self) -> dict[str, Any]:
        """Everything a step changes, as flat buffers by name."""
        return {"weights": self.store.data, **self.optimizer.state()}

    def plan(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """(step, micro-batch) pairs this rank runs in steps [first, stop), one after another."""
        mine = self.assignment.of_rank(self.group.rank)
        return ((step, index) for step in range(first, stop) for index in mine)

    @np.errstate(over="ignore", invalid="ignore")  # what is not finite is found and named below
    def step(self, step: int, next_batch: NextBatch, notes: tuple[float, ...] = ()) -> StepResult:
        """One update. Collective over dp. Raises NumericsError on every rank before any update."""
        began = time.perf_counter()
        batches, losses = self._run_micro_batches(step, next_batch)
        total = self.reduction.finish()
        loss, targets, all_notes = self._exchange(step, batches, losses, notes)
        rate = learning_rate(self.config.optim, self.config.train.steps, step)
        length, broken = norm(self.store, total)
        if not math.isfinite(loss) or broken is not None:
            self._blame(step, batches, losses, broken)
        self.group.note(f"the update of step {step}")
        factor = clip_factor(self.config.optim.clip, length / targets)
        self.optimizer.step(total, rate, factor / targets, step + 1)
        seconds = time.perf_counter() - began
        return StepResult(loss / targets, targets, length / targets, rate, seconds, self.reduction.exposed_s, all_notes)

    def _run_micro_batches(self, step: int, next_batch: NextBatch) -> tuple[list[MicroBatch], list[Any]]:
        batches: list[MicroBatch] = []
        losses: list[Any] = []  # a GPU's are not awaited here
        self.reduction.begin()
        first, stop = self.assignment.lanes_of(self.group.rank)
        for lane in range(first, stop):
            buffer, fresh = self.reduction.open_lane(lane)
            self.store.point_gradients(buffer)
            members = self.assignment.micro_batches_of(lane)
            for index in members:
                self.group.note(f"step {step}, waiting for the tokens of micro-batch {index}")
                batch = next_batch()
                self.group.note(f"step {step}, micro-batch {index}")
                last = lane == stop - 1 and index == members[-1]
                losses.append(self._loss_and_grad(batch, not fresh, self.reduction.block_ready if last else None))
                batches.append(batch)
                fresh = False
            self.reduction.close_lane(lane)
        return batches, losses

    def _loss_and_grad(self, batch: MicroBatch, accumulate: bool, ready: Callable[[int], None] | None) -> Any:
        ctx = Context(self.mesh, self.config.train.seed, batch.step, batch.index, True, accumulate)
        if self.captured is not None and (ready is None or self.group.size == 1):
            return self.captured.loss_and_grad(batch, ctx)
        return self.stack.loss_and_grad(*self._arrays(batch), ctx, ready)

    def _arrays(self, batch: MicroBatch) -> tuple[Any, Any, Any]:
        return self.place.put(batch.ids), self.place.put(batch.targets), self.place.put(batch.mask)

    def _exchange(
        self, step: int, batches: list[MicroBatch], losses: list[Any], notes: tuple[float, ...]
    ) -> tuple[float, int, np.ndarray]:
        """(summed loss, target count, everybody's notes): float64, added in micro-batch order."""
        row = np.zeros(2 * self._most + len(notes))
        row[: len(losses)] = [float(loss) for loss in losses]
        row[self._most : self._most + len(batches)] = [batch.targets_count for batch in batches]
        row[2 * self._most :] = notes
        table = self.group.allgather_array(row, f"the losses of step {step}")
        counts = [len(self.assignment.of_rank(rank)) for rank in range(self.group.size)]
        loss, targets = 0.0, 0.0
        for rank, count in enumerate(counts):  # ranks hold contiguous micro-batches: this is their order
            for k in range(count):
                loss += float(table[rank, k])
                targets += float(table[rank, self._most + k])
        return loss, int(targets), table[:, 2 * self._most :]

    def _blame(self, step: int, batches: list[MicroBatch], losses: list[Any], broken: str | None) -> None:
        """Runs this step's micro-batches again, one by one, and names the first that is not finite."""
        self.store.point_gradients(self.store.new_buffer())
        found = []
        for batch, loss in zip(batches, losses, strict=True):
            self._loss_and_grad(batch, False, None)
            culprits = [s.parameter.name for s in self.store.spans if not _finite(s.parameter.grad)]
            if culprits or not math.isfinite(float(loss)):
                found.append((batch.index, culprits[0] if culprits else None, str(float(loss))))
        reports = sorted(r for reports in self.group.allgather(found, "the culprit's name") for r in reports)
        if reports:
            index, name, text = reports[0]
            where = f"micro-batch {index}: loss {text}, gradient of {name or 'no parameter'} is not finite"
        else:
            where = f"gradient of {broken} overflows only in the sum over micro-batches"
        raise agreed(
            NumericsError(
                f"step {step}, {where}; weights are as step {step} found them: "
                "lower optim.learning_rate, raise optim.warmup_steps or set optim.clip"
            )
        )

    def check_weights(self, step: int) -> None:
        """Raises NumericsError, on every rank alike, if an update has made a weight that no checkpoint may hold."""
        for name, weights in self.store.named(self.store.data).items():
            if not _finite(weights):
                raise agreed(
                    NumericsError(
                        f"weights of {name} are not finite after step {step}, which is not saved: "
                        "lower optim.learning_rate, raise optim.warmup_steps or set optim.clip"
                    )
                )

    @np.errstate(over="ignore", invalid="ignore")
    def heldout_loss(self, batch_of: Callable[[int], MicroBatch], count: int) -> float:
        """Mean nats per target over `count` held-out micro-batches, added in their order on any mesh. Collective."""
        ranks, rank = self.group.size, self.group.rank
        rounds = -(-count // ranks)
        row = np.zeros((rounds, 2))
        ctx = Context(self.mesh)
        for k in range(rounds):
            number = k * ranks + rank
            if number < count:
                self.group.note(f"held-out micro-batch {number}")
                batch = batch_of(number)
                row[k] = float(self.stack.loss(*self._arrays(batch), ctx)), batch.targets_count
        table = self.group.allgather_array(row, "held-out losses")  # (R, rounds, 2)
        ordered = table.swapaxes(0, 1).reshape(-1, 2)[:count]
        loss, targets = 0.0, 0.0
        for one, n in ordered.tolist():
            loss, targets = loss + one, targets + n
        return loss / targets


def place_of(config: "Config", level: str = "auto", on_node: tuple[int, int] = (0, 1)) -> Place:
    """Where a rank of this configuration calculates; chooses the kernels for it. Raises ConfigError.

    `on_node`: this rank's number among the ranks of its node, and how many they are.
    """
    numerics, backend = config.numerics, config.backend
    if backend.device == "cpu":
        kernels.select(level, numerics.reference, numerics.products, numerics.threads)
        return cpu(config.train.dtype)
    place = gpu(config.train.dtype, numerics.products, on_node[0], backend.memory_gib)
    if config.comm.reduction == "nccl":
        _check_nccl(place, on_node[1])
    kernels.select(reference=numerics.reference, threads=numerics.threads, device="cuda")
    return place


def _check_nccl(place: Place, ranks: int) -> None:
    nccl()
    gpus = place.xp.cuda.runtime.getDeviceCount()
    if ranks > gpus:
        raise ConfigError(
            f"comm.reduction = nccl needs a GPU for each rank of a node, {ranks} ranks share {gpus}: "
            "start fewer ranks, or use canonical or allreduce"
        )


def _finite(array: Any) -> bool:
    return bool(module_of(array).isfinite(array).all())


def check_memory(config: Config, vocabulary: int, place: Place, on_node: int = 1) -> None:
    """Refuses what cannot fit where the ranks of a node calculate: a lower bound, made before anything is built.

    `on_node`: ranks that share the node. Raises ConfigError.
    """
    needed = least_bytes(config, vocabulary)
    present, where, share = psutil.virtual_memory().total, f"this machine, with {on_node} rank(s),", on_node
    if place.on_gpu:
        present, where, share = place.xp.cuda.Device().mem_info[1], "its GPU", 1
    if share * sum(needed.values()) > present:
        parts = ", ".join(f"{name} {value / 2**30:,.1f}" for name, value in needed.items())
        raise ConfigError(
            f"a rank needs at least {sum(needed.values()) / 2**30:,.1f} GiB ({parts}), {where} has "
            f"{present / 2**30:,.1f} GiB: lower {_LEVERS[max(needed, key=lambda name: needed[name])]}"
        )


_LEVERS = {
    "parameters": "model.width, model.layers or model.context", "activations": "train.rows or model.context",
    "evaluation": "eval.rows or model.context", "prefetch": "data.prefetch",
}  # fmt: skip
_BLOCK_BYTES = 10_000  # Python objects of a block and its parameters: 10,152 by tracemalloc, 1,000 blocks of width 8


def least_bytes(config: Config, vocabulary: int) -> dict[str, int]:
    """What a rank holds at least, in bytes: parameters with gradients and moments, one array of B·T·C a block, …"""
    model, train, size = config.model, config.train, np.dtype(config.train.dtype).itemsize
    shallow = replace(model, layers=1)  # blocks are alike: none but one is built
    embedding, block, head = (
        sum(math.prod(parameter.layout.shape) for parameter in part)
        for part in gpt.build(shallow, vocabulary).parameter_blocks()
    )
    copies = 3 + (config.optim.name == "adamw")
    return {
        "parameters": copies * size * (embedding + model.layers * block + head) + model.layers * _BLOCK_BYTES,
        "activations": size * train.rows * model.context * model.width * model.layers,
        "evaluation": 2 * size * config.eval.rows * model.context * model.width,
        "prefetch": 8 * config.data.prefetch * train.rows * model.context,
    }


def bytes_held(replica: Replica) -> dict[str, int]:
    """Bytes of a rank by what holds them, activations left out."""
    store = replica.store
    held = {"weights": store.data.nbytes, "gradients": replica.reduction.costs()["held_bytes"]}
    if store.working is not store.data:
        held["weights in bf16"] = store.working.nbytes
    held["optimiser"] = sum(buffer.nbytes for buffer in replica.optimizer.state().values())
    return held


def config_differences(saved: dict[str, Any], config: Config) -> list[str]:
    """`section.key: saved → now` for each key that differs from a saved configuration."""
    now = to_table(config)
    return [
        f"{section}.{key}: {saved.get(section, {}).get(key)} → {value}"
        for section, values in now.items()
        for key, value in values.items()
        if saved.get(section, {}).get(key) != value
    ]
