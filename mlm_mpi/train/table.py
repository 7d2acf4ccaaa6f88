"""What a start says of itself: the table before the first step."""

from mlm_mpi.backend import registry
from mlm_mpi.config import Config
from mlm_mpi.train.engine import Engine
from mlm_mpi.train.memory import bytes_held
from mlm_mpi.train.task import Task


def plan_rows(config: Config, task: Task, engine: Engine, step: int, fingerprint: str) -> list[tuple[str, str]]:
    """(name, text) of each line; `step`: so many are done."""
    train, machine = config.train, engine.machine
    ranks, costs, held = machine.mesh.size("dp"), machine.reduction.costs(), bytes_held(engine)
    parts = ", ".join(f"{name} {value / 2**20:,.1f}" for name, value in held.items())
    steps = f"steps {step + 1} to {train.steps}" if step < train.steps else f"all {train.steps} steps are made"
    samples = train.micro_batches * train.rows
    tokens = task.tokens("train")
    epochs = train.steps * samples / len(task.samples("train"))
    reduction = f"{config.comm.reduction}, overlap {'on' if config.comm.overlap else 'off'}"
    if machine.place.on_gpu and config.comm.reduction != "nccl":
        reduction += f", {machine.reduction.transport.name}"
    sent = f"sends {costs['sent_bytes'] / 2**20:,.1f} MiB a step"
    size = f"{machine.store.count:,} parameters, vocabulary {task.vocabulary:,}, {train.dtype}"
    if config.numerics.products != train.dtype:
        size += f", products in {config.numerics.products}"
    where = machine.place.description if machine.place.on_gpu else f"{config.numerics.threads} thread each"
    shape = f"{train.micro_batches} micro-batches of {train.rows} × {task.row_tokens}"
    averaged = f"held-out text is measured with the moving average of weights, decay {config.optim.average:g}"
    return [
        ("mesh", f"{machine.mesh}: {ranks} rank{'s' * (ranks > 1)}, {where}"),
        ("model", f"{task.model}: {size}"),
        ("step", f"{samples * task.row_tokens:,} tokens: {shape}"),
        ("run", f"{steps}, {epochs:.1f} epochs of {tokens:,} tokens"),
        ("lanes", f"{train.lanes} over {ranks} rank{'s' * (ranks > 1)}, balance {machine.assignment.balance:.0%}"),
        ("reduction", f"{reduction}, {costs['buffers']} lane buffers, {sent}"),
        ("memory of a rank", f"{sum(held.values()) / 2**20:,.1f} MiB without activations: {parts}"),
        *([("average", averaged)] if machine.average is not None else []),
        ("ops", registry.summary(train.dtype)),
        ("fingerprint", fingerprint),
    ]
