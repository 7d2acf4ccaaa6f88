"""A configuration -> an engine."""

import math

from mlm_mpi import schedules
from mlm_mpi.backend.arrays import Place
from mlm_mpi.comm.buckets import Reduction, Setup
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.comm.transport import transport
from mlm_mpi.config import Config
from mlm_mpi.config.rules import shares
from mlm_mpi.errors import ConfigError, agreed
from mlm_mpi.layers.base import Part
from mlm_mpi.layers.chain import Chain, Recomputed
from mlm_mpi.params.average import Average
from mlm_mpi.params.store import FlatStore
from mlm_mpi.plug import Plugins
from mlm_mpi.rates import learning_rate
from mlm_mpi.train.assignment import Assignment
from mlm_mpi.train.audit import Audit
from mlm_mpi.train.captured import Captured
from mlm_mpi.train.engine import Engine, Machine
from mlm_mpi.train.guard import Guard


def build(config: Config, plugins: Plugins, parts: list[Part], mesh: Mesh, place: Place) -> Engine:
    """The engine of a run on this rank, its weights not yet drawn or read. Collective over dp."""
    train, optim = config.train, config.optim
    if train.recompute:
        parts = [parts[0], *map(Recomputed, parts[1:-1]), parts[-1]]
    chain = Chain(parts)
    _check_cuts(chain, mesh)
    store = FlatStore(chain.parameter_blocks(), mesh, train.dtype, place)
    assignment = Assignment(train.micro_batches, train.lanes, mesh.size("dp") - config.comm.spares)
    instructions = plugins.find("schedules", train.schedule, "train.schedule").instructions
    for rank in range(assignment.ranks):
        micros = len(assignment.of_rank(rank))
        schedules.check(instructions(0, 1, micros), micros, train.schedule)
    summed = reduction(config, plugins, store, assignment, mesh, place)
    # a buffer may take in all lanes of a rank; and ranks that share a model compute a gradient together
    audits = config.guard.audit_every if summed.stable and mesh.is_plain else 0
    rate = plugins.find("rates", optim.schedule, "optim.schedule").rate
    return Engine(
        Machine(
            mesh, place, chain, store,
            plugins.find("optim", optim.name, "optim.name").build(optim, store, mesh),
            summed,
            assignment,
            instructions,
            lambda step: learning_rate(
                optim.learning_rate, optim.warmup_steps, optim.final_fraction, rate, train.steps, step,
                optim.decay_fraction,
            ),
            optim.clip, train.seed, shares(config),
            Captured(chain, place) if config.backend.graphs else None,
            Average(store, optim.average) if optim.average else None,
            Guard(config.guard.policy, config.guard.spike), Audit(audits, train.seed),
        )
    )  # fmt: skip


def _check_cuts(chain: Chain, mesh: Mesh) -> None:
    """Raises ConfigError, agreed, where tp does not divide the shares of a sum."""
    tp = mesh.size("tp")
    for parameter in (parameter for block in chain.parameter_blocks() for parameter in block):
        layout = parameter.layout
        if "tp" in layout.axes and layout.shares % tp:
            dim = layout.axes.index("tp")
            units = layout.shape[dim] // (layout.units or (1,) * len(layout.shape))[dim]
            raise agreed(
                ConfigError(
                    f"mesh.tp = {tp} does not divide the {layout.shares} shares of {parameter.name}, which are as many "
                    f"as a power of two divides its {units} (heads, features or tokens; at most numerics.shares): set "
                    f"mesh.tp = {math.gcd(tp, layout.shares)}, or make them a multiple of {tp}"
                )
            )


def reduction(
    config: Config, plugins: Plugins, store: FlatStore, assignment: Assignment, mesh: Mesh, place: Place
) -> Reduction:
    """That of a mesh's data-parallel ranks. Collective over them."""
    comm = config.comm
    group = mesh.group("dp").duplicate()  # tags of gradients must not meet other messages
    setup = Setup(
        group, config.train.lanes, [assignment.lanes_of(rank) for rank in range(group.size)], store.segments,
        comm.bucket_mib * 2**20, config.train.dtype, comm.overlap, place, transport(place, group, comm.gpu_aware),
    )  # fmt: skip
    made: Reduction = plugins.find("reductions", comm.reduction, "comm.reduction").build(setup)
    return made
