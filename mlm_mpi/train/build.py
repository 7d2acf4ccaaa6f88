"""A configuration -> an engine."""

import math
from functools import partial

from mlm_mpi import schedules
from mlm_mpi.backend.arrays import Place
from mlm_mpi.comm.buckets import Reduction, Setup
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.comm.transport import transport
from mlm_mpi.config import Config
from mlm_mpi.config.rules import shares
from mlm_mpi.errors import ConfigError, agreed
from mlm_mpi.layers.base import Part
from mlm_mpi.layers.chain import Chain, Recomputed, Weights
from mlm_mpi.params.average import Average
from mlm_mpi.params.clip import Owners
from mlm_mpi.params.ownership import Owned, ranges
from mlm_mpi.params.store import FlatStore, Parameter
from mlm_mpi.plug import Plugins
from mlm_mpi.rates import learning_rate
from mlm_mpi.train.assignment import Assignment
from mlm_mpi.train.audit import Audit
from mlm_mpi.train.captured import Captured
from mlm_mpi.train.engine import Engine, Machine
from mlm_mpi.train.guard import Guard
from mlm_mpi.train.pipeline import Slice, Stage, cost_of, cut_parts, in_words
from mlm_mpi.train.sharing import Gathered, Lent


def build(
    config: Config, plugins: Plugins, parts: list[Part], mesh: Mesh, place: Place, width: int = 0
) -> Engine:  # fmt: skip
    """The engine of a run on this rank, its weights not yet drawn or read. `parts`: of the whole model; between them
    flow arrays (B, T, `width`), which a pipeline must know. Collective over dp.
    """
    train, optim = config.train, config.optim
    if train.recompute:
        parts = [parts[0], *map(Recomputed, parts[1:-1]), parts[-1]]
    chunks = config.mesh.chunks
    check_cuts(parts, mesh, chunks)
    chain, borrowed = stage_of(parts, mesh, width, place, chunks)
    model = [parameter for part in parts for parameter in part.parameters()]
    store = FlatStore(chain.parameter_blocks(), mesh, train.dtype, place, model, borrowed)
    assignment = Assignment(train.micro_batches, train.lanes, mesh.size("dp") - config.comm.spares)
    instructions = plugins.find("schedules", train.schedule, "train.schedule").instructions
    if chunks > 1:
        instructions = partial(instructions, chunks=chunks)
    for rank in range(assignment.ranks):
        micros = len(assignment.of_rank(rank))
        stage, stages = mesh.coord("pp"), mesh.size("pp")
        schedules.check(instructions(stage, stages, micros), micros, train.schedule, chunks)
    optimizer = plugins.find("optim", optim.name, "optim.name")
    whole_matrices = getattr(optimizer, "WHOLE_MATRICES", False)
    if whole_matrices:
        _check_matrices(optim.name, model, mesh)
    owned = _owned(config, store, mesh, whole_matrices)
    summed = reduction(config, plugins, store, assignment, mesh, place, owned)
    # a buffer may take in all lanes of a rank; and ranks that share a model compute a gradient together
    alone = mesh.is_plain and config.mesh.zero < 3
    audits = config.guard.audit_every if summed.stable and alone else 0
    chain.bring(_weights(config, chain, store, owned, mesh))
    rate = plugins.find("rates", optim.schedule, "optim.schedule").rate
    return Engine(
        Machine(
            mesh, place, chain, store,
            # of its own range each rank updates all, and shares nothing out
            optimizer.build(optim, store, mesh) if owned is None else optimizer.build(optim, owned, Mesh()),
            summed,
            assignment,
            instructions,
            lambda step: learning_rate(
                optim.learning_rate, optim.warmup_steps, optim.final_fraction, rate, train.steps, step,
                optim.decay_fraction,
            ),
            optim.clip, train.seed, shares(config),
            Captured(chain, place) if config.backend.graphs else None,
            Average(owned or store, optim.average) if optim.average else None,
            Guard(config.guard.policy, _spike(config, plugins)), Audit(audits, train.seed),
            owned, _owners(config, owned, mesh),
        )
    )  # fmt: skip


def _spike(config: Config, plugins: Plugins) -> float:
    """What is a spike, of a task whose losses have a level: a classifier's fall to nothing, but for some texts."""
    steady = getattr(plugins.find("tasks", config.task.kind, "task.kind"), "STEADY", True)
    return config.guard.spike if steady else 0.0


def _owned(config: Config, store: FlatStore, mesh: Mesh, whole_matrices: bool) -> Owned | None:
    """What of a store a rank updates alone, if the ranks of dp share that out."""
    dp, level = mesh.group("dp"), config.mesh.zero
    if not level:
        return None
    owned = Owned(store, ranges(store, dp.size, whole_matrices, whole_blocks=level > 1), dp.rank)
    if level == 3:
        store.kept = slice(owned.start, owned.stop)
    return owned


def _owners(config: Config, owned: Owned | None, mesh: Mesh) -> Owners | None:
    """Who has the sum of a gradient, where a rank has a part of it."""
    dp = mesh.group("dp")
    if owned is None or config.mesh.zero < 2 or dp.size == 1:
        return None
    return Owners(owned.every, dp.rank, partial(dp.gather_parts, what="parts of a gradient and its norm"))


def _weights(config: Config, chain: Chain, store: FlatStore, owned: Owned | None, mesh: Mesh) -> Weights:
    """How weights come to where they are read."""
    if owned is None or mesh.size("dp") == 1:
        return Weights()
    kind = Lent if config.mesh.zero == 3 else Gathered
    return kind(chain.parts, store, owned, mesh.group("dp").duplicate())  # tags must not meet


def stage_of(
    parts: list[Part], mesh: Mesh, width: int, place: Place, chunks: int = 1
) -> tuple[Chain, list[Parameter]]:  # fmt: skip
    """(the parts of my stage, what it holds of another stage's parameters: the head its embedding's table).

    `width`: as in `build`. Where pp is 1 the stage is all of the model.
    """
    pp = mesh.group("pp")
    if pp.size == 1:
        return Chain(parts), []
    costs = [cost_of(part) for part in parts]
    cuts = cut_parts(costs, pp.size * chunks)
    shared = [parameter for parameter in parts[0].parameters() if parameter.tied]
    table = shared[0] if shared and not shared[0].frozen else None
    learning = next(n for n, part in enumerate(parts) if any(not p.frozen for p in part.parameters()))
    borrowed = shared if pp.rank == pp.size - 1 else []
    mine = [
        Slice(
            parts[first:stop], number, len(cuts), pp, width, place.compute, table, learning < first,
            parts[stop] if stop < len(parts) else None,
        )
        for number, (first, stop) in enumerate(cuts)
        if number % pp.size == pp.rank
    ]  # fmt: skip
    return Stage(mine, in_words(cuts, costs, pp.size)), borrowed


def _check_matrices(name: str, model: list[Parameter], mesh: Mesh) -> None:
    """Raises ConfigError, agreed, where tp goes through a matrix that an optimiser updates as one."""
    tp = mesh.size("tp")
    for parameter in model if tp > 1 else ():
        if parameter.frozen:
            continue
        cut = [dim for dim, axis in enumerate(parameter.layout.axes) if axis == "tp"]
        between = [dim for dim, _ in parameter.matrices or ()]
        if parameter.matrices is not None and not {*cut} <= {*between}:
            raise agreed(
                ConfigError(
                    f'optim.name = "{name}" updates whole matrices, and mesh.tp = {tp} cuts those of {parameter.name}: '
                    'set optim.name = "adamw", or mesh.tp = 1'
                )
            )


def check_cuts(parts: list[Part], mesh: Mesh, chunks: int = 1, trained: bool = False) -> None:
    """Raises ConfigError, agreed, where tp does not divide the shares of a sum, or a stage or chunk had no part.

    `trained`: the model is what it is.
    """
    pp, tp = mesh.size("pp"), mesh.size("tp")
    if pp > len(parts):
        raise agreed(
            ConfigError(
                f"mesh.pp = {pp} needs as many parts, and the model has {len(parts)} (embedding, head, blocks: "
                f"{len(parts) - 2}): set mesh.pp = {len(parts)} or less"
            )
        )
    if pp * chunks > len(parts):
        raise agreed(
            ConfigError(
                f"mesh.chunks = {chunks} of mesh.pp = {pp} stages need {pp * chunks} parts, and the model has "
                f"{len(parts)} (embedding, head, blocks: {len(parts) - 2}): set mesh.chunks = {len(parts) // pp} or "
                "less"
            )
        )
    for parameter in (parameter for part in parts for parameter in part.parameters()):
        layout = parameter.layout
        if "tp" in layout.axes and layout.shares % tp:
            dim = layout.axes.index("tp")
            units = layout.shape[dim] // (layout.units or (1,) * len(layout.shape))[dim]
            change = f", or make them a multiple of {tp} (heads and feed_forward of [model], --vocab of prepare)"
            raise agreed(
                ConfigError(
                    f"mesh.tp = {tp} does not divide the {units} heads, features or tokens of {parameter.name}: set "
                    f"mesh.tp = {math.gcd(tp, layout.shares)}{'' if trained else change}"
                )
            )


def reduction(
    config: Config, plugins: Plugins, store: FlatStore, assignment: Assignment, mesh: Mesh, place: Place,
    owned: Owned | None = None,
) -> Reduction:  # fmt: skip
    """That of a mesh's data-parallel ranks. Collective over them."""
    comm = config.comm
    group = mesh.group("dp").duplicate()  # tags of gradients must not meet other messages
    segments = store.segments[:-1] if store.borrowed else store.segments
    setup = Setup(
        group, config.train.lanes, [assignment.lanes_of(rank) for rank in range(group.size)], segments,
        comm.bucket_mib * 2**20, config.train.dtype, comm.overlap, place, transport(place, group, comm.gpu_aware),
        store.size, owned.every if owned is not None and config.mesh.zero > 1 else None,
    )  # fmt: skip
    made: Reduction = plugins.find("reductions", comm.reduction, "comm.reduction").build(setup)
    return made
