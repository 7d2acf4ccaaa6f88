"""What a start says of itself: the table before the first step."""

from mlm_mpi.backend import registry
from mlm_mpi.comm.company import Company
from mlm_mpi.config import Config
from mlm_mpi.config.rules import is_plain
from mlm_mpi.data.mixture import Mixture
from mlm_mpi.data.sampler import Sampler
from mlm_mpi.data.warmup import Ramp
from mlm_mpi.train import Train
from mlm_mpi.train.engine import Engine
from mlm_mpi.train.memory import bytes_held
from mlm_mpi.train.pipeline import Stage
from mlm_mpi.train.task import Task


def plan_rows(
    config: Config, task: Task, sampler: Sampler, engine: Engine, step: int, fingerprint: str, placed: str = ""
) -> list[tuple[str, str]]:
    """(name, text) of each line; `step`: so many are done; `placed`: where ranks lie that share a model."""
    train, machine = config.train, engine.machine
    ranks, costs, held = machine.mesh.world.size, machine.reduction.costs(), bytes_held(engine)
    copies, workers = machine.mesh.size("dp"), machine.assignment.ranks
    what = "rank" if machine.mesh.is_plain else "group"
    parts = ", ".join(f"{name} {value / 2**20:,.1f}" for name, value in held.items())
    steps = f"steps {step + 1} to {train.steps}" if step < train.steps else f"all {train.steps} steps are made"
    samples = train.micro_batches * train.rows
    mixture, drawn = sampler.mixture, sampler.samples(train.steps)
    epochs = drawn / sum(mixture.windows)
    read = f"{epochs:.1f} epochs of" if len(mixture.windows) == 1 else f"{drawn * task.row_tokens:,} tokens out of"
    reduction = f"{config.comm.reduction}, overlap {'on' if config.comm.overlap else 'off'}"
    if machine.place.on_gpu and config.comm.reduction != "nccl":
        reduction += f", {machine.reduction.transport.name}"
    sent = f"sends {costs['sent_bytes'] / 2**20:,.1f} MiB a step"
    size = f"{machine.store.count:,} parameters, vocabulary {task.vocabulary:,}, {train.dtype}"
    if frozen := machine.store.frozen_count:
        size += f", {frozen:,} of them frozen"
    if config.numerics.products == "bf16":
        size += ", activations in bf16"
    where = machine.place.description if machine.place.on_gpu else f"{config.numerics.threads} thread each"
    shared_out = _shared_out(config.mesh.zero, copies)
    shape = f"{train.micro_batches} micro-batches of {train.rows} × {task.row_tokens}"
    sample = getattr(task, "sample", task.unit)
    if sample != "tokens":
        shape = f"{sample}: {train.micro_batches} micro-batches of {train.rows}, up to {task.row_tokens} tokens each"
    averaged = f"held-out text is measured with the moving average of weights, decay {config.optim.average:g}"
    return [
        ("mesh", f"{machine.mesh}: {ranks} rank{'s' * (ranks > 1)}, {where}{shared_out}"),
        *([("placement", placed)] if placed else []),
        *(
            [("stages", f"parts {machine.chain.cut}, {_schedule(train.schedule)}")]
            if isinstance(machine.chain, Stage)
            else []
        ),
        ("model", f"{task.model}: {size}"),
        ("step", f"{samples * task.row_tokens:,} tokens: {shape}" if sample == "tokens" else f"{samples:,} {shape}"),
        ("run", f"{steps}, {read} {task.tokens('train'):,} tokens"),
        *task.notes(),
        *_mixture(mixture, drawn),
        *_warmups(train, task.row_tokens),
        (
            "lanes",
            f"{train.lanes} over {workers} {what}{'s' * (workers > 1)}, balance {machine.assignment.balance:.0%}",
        ),
        ("reduction", f"{reduction}, {costs['buffers']} lane buffers, {sent}"),
        ("memory of a rank", f"{sum(held.values()) / 2**20:,.1f} MiB without activations: {parts}"),
        *([("average", averaged)] if machine.average is not None else []),
        *([("if a rank dies", _after_a_death(config, engine.world.recovers, copies - workers))] if ranks > 1 else []),
        *_lookouts(engine.group.company),
        ("ops", registry.summary(train.dtype)),
        ("fingerprint", fingerprint),
    ]


def _shared_out(level: int, copies: int) -> str:
    if not level:
        return ""
    return f", ZeRO-{level}" if copies > 1 else f"; mesh.zero = {level} has nobody to share with, there is one copy"


def _schedule(name: str) -> str:
    idle = "; one works at a time: one_f_one_b overlaps them" if name == "single" else ""
    return f"train.schedule = {name}{idle}"


def _after_a_death(config: Config, recovers: bool, spares: int) -> str:
    if recovers:
        ready = f"; {spares} spare{'s' * (spares > 1)} stand{'s' * (spares == 1)} ready" if spares else ""
        return f"the others go on, to the same bits{ready}"
    why = "not started by mlm-mpi run, or not on Open MPI 5 with ULFM" if config.comm.recover else "comm.recover is off"
    if not is_plain(config):
        why = "each rank holds what no other does"
    return f"the job ends, and the same command goes on ({why})"


def _lookouts(company: Company | None) -> list[tuple[str, str]]:
    """Whether nodes watch each other, where there are several."""
    if company is None or not company.watches_nodes:
        return []
    nodes = company.post.nodes
    return [("lookouts", f"{nodes} nodes watch each other" if nodes else "none: nodes do not watch each other")]


def _mixture(mixture: Mixture, drawn: int) -> list[tuple[str, str]]:
    """A line for each corpus where there are several; `drawn`: samples of the whole run."""
    if len(mixture.windows) == 1:
        return []
    parts = zip(mixture.names, mixture.weights, mixture.counts(drawn), mixture.windows, strict=True)
    return [
        ("mixture", f"{weight / mixture.whole:.1%} {name}, {count / windows:.1f} epochs of its {windows:,} windows")
        for name, weight, count, windows in parts
    ]


def _warmups(train: Train, context: int) -> list[tuple[str, str]]:
    ramps = (("rows", train.rows_ramp()), ("context", train.context_ramp(context)))
    return [("warm-up", f"{what} {_growth(ramp)}") for what, ramp in ramps if ramp.steps]


def _growth(ramp: Ramp) -> str:
    (_, first), *later = ramp.stages()
    return ", ".join([str(first), *(f"{number} from step {step + 1}" for step, number in later)])
