"""The rules that span sections. What concerns one section alone stands where it is declared."""

from math import gcd
from types import ModuleType

from mlm_mpi import order
from mlm_mpi.config.sections import Config
from mlm_mpi.errors import ConfigError
from mlm_mpi.plug import Plugins


def check(config: Config, plugins: Plugins) -> None:
    """Raises ConfigError where sections contradict each other."""
    train, optim, numerics, backend = config.train, config.optim, config.numerics, config.backend
    _require(
        numerics.products == "float32" or train.dtype == "float32",
        f'numerics.products = "bf16" needs train.dtype = "float32", not "{train.dtype}": set one of them to "float32"',
    )
    dropout = getattr(config.model, "dropout", 0.0)  # which not every kind of model has
    _require(
        not backend.graphs or (backend.device == "gpu" and dropout == 0.0),
        f"backend.graphs needs a GPU and no dropout: backend.device = {backend.device}, "
        f"model.dropout = {dropout}: set backend.graphs = false",
    )
    _require(
        not backend.graphs or not (train.rows_warmup_steps or train.context_warmup_steps),
        "backend.graphs replays micro-batches of one shape, and in a warm-up of rows or context they grow: set "
        "backend.graphs = false, or train.rows_warmup_steps and train.context_warmup_steps to 0",
    )
    _check_readable(config, plugins)
    check_sharing(config, plugins)
    if train.context_warmup_steps:
        train.check_context(config.model.context)
    _require(
        not backend.graphs or not (config.start.freeze or config.start.lora_rank),
        "backend.graphs replays the backward of all parts, and start.freeze or start.lora_rank leaves some out: set "
        "backend.graphs = false",
    )
    guard = config.guard
    _require(
        guard.spike == 0 or guard.spike > 1,
        f"guard.spike = {guard.spike:g} makes a spike of what is usual: set it above 1, or to 0 for none",
    )
    _require(
        guard.policy != "rollback" or config.checkpoint.every > 0,
        'guard.policy = "rollback" goes back to saves, and checkpoint.every = 0 makes none: set checkpoint.every',
    )
    reduction = config.comm.reduction
    device = getattr(plugins.find("reductions", reduction, "comm.reduction"), "DEVICE", backend.device)
    _require(
        device == backend.device,
        f'comm.reduction = "{reduction}" needs backend.device = "{device}", not "{backend.device}": '
        'set that, or comm.reduction = "canonical"',
    )
    _require(
        optim.warmup_steps <= train.steps,
        f"optim.warmup_steps = {optim.warmup_steps} exceeds train.steps = {train.steps}: lower it",
    )


def is_plain(config: Config) -> bool:
    """Whether every rank holds all of the model and of what its training needs, so that it can go on alone."""
    return config.mesh.pp == config.mesh.tp == 1 and not config.mesh.zero


def parted(config: Config) -> tuple[str, str]:
    """(the settings that give each rank a part of its own, those that do not), for people."""
    plain = {"pp": 1, "tp": 1, "zero": 0}
    asked = {name: getattr(config.mesh, name) for name, value in plain.items() if getattr(config.mesh, name) != value}
    told = ({name: values[name] for name in asked} for values in (asked, plain))
    there, remedy = (" and ".join(f"mesh.{name} = {value}" for name, value in some.items()) for some in told)
    return there, remedy


def check_sharing(config: Config, plugins: Plugins) -> None:
    """Raises ConfigError where a kind does not heed what is asked of it, or ranks cannot share a model as mesh says."""
    _check_heeded(config, plugins)
    _check_mesh(config)


def _check_mesh(config: Config) -> None:
    """What ranks that share a copy of the model cannot do yet."""
    _require(
        config.mesh.chunks == 1 or config.mesh.pp > 1,
        f"mesh.chunks = {config.mesh.chunks} are pieces that each of several stages holds, and mesh.pp = 1 makes one: "
        "set mesh.pp = 2 or more, or mesh.chunks = 1",
    )
    pp, tp, device, products = config.mesh.pp, config.mesh.tp, config.backend.device, config.numerics.products
    _require(
        pp * tp == 1 or device == "cpu",
        f'mesh.pp = {pp}, mesh.tp = {tp} need backend.device = "cpu", not "{device}": set it, or mesh.pp = 1 and '
        "mesh.tp = 1",
    )
    _require(
        tp == 1 or not config.start.lora_rank,
        f"start.lora_rank = {config.start.lora_rank} sets adapters beside maps that mesh.tp = {tp} cuts: set mesh.tp = "
        "1 (mlm-mpi merge makes a model without them)",
    )
    _require(
        tp == 1 or products == "float32",
        f'mesh.tp = {tp} needs numerics.products = "float32", not "{products}": set it, or mesh.tp = 1',
    )
    most = int(config.numerics.shares)
    fits = order.shares(order.MOST, min(tp, most))
    _require(
        tp <= most and order.MOST % tp == 0,
        f"mesh.tp = {tp} must be a power of two, at most numerics.shares = {most} (of {order.MOST}): set mesh.tp = "
        f"{fits}",
    )
    if config.mesh.sequence and tp > 1:
        length = getattr(config.model, "context", 0)
        parts = order.shares(length, int(config.numerics.shares))
        _require(
            parts % tp == 0 and not config.train.context_warmup_steps,
            f"mesh.sequence cuts model.context = {length}, whose sums have {parts} shares, in mesh.tp = {tp} parts, "
            "and no context that grows: make it a multiple of mesh.tp, set train.context_warmup_steps = 0, or "
            "mesh.sequence = false",
        )
    _require(
        not config.mesh.zero or device == "cpu",
        f'mesh.zero = {config.mesh.zero} needs backend.device = "cpu", not "{device}": set it, or mesh.zero = 0',
    )
    _require(
        pp == 1 or config.comm.reduction in ("canonical", "naive"),
        f'mesh.pp = {pp} needs comm.reduction = "canonical", not "{config.comm.reduction}", which adds all lanes of a '
        "rank in one buffer: set it, or mesh.pp = 1",
    )


def _check_heeded(config: Config, plugins: Plugins) -> None:
    """Some keys only some kinds heed, whose files name them in HEEDS; others refuse them."""
    kinds = {
        "tasks": ("task.kind", config.task.kind), "models": ("model.kind", config.model.kind),
        "objectives": ("task.objective", getattr(config.task, "objective", "")),
        "schedules": ("train.schedule", config.train.schedule),
    }  # fmt: skip
    asked = (
        ("data.mixture", bool(config.data.mixture), ("tasks",)),
        ("data.documents", config.data.documents != "joined", ("tasks", "models")),
        ("train.context_warmup_steps", config.train.context_warmup_steps > 0, ("tasks", "objectives")),
        ("mesh.pp", config.mesh.pp > 1, ("models",)),
        ("mesh.chunks", config.mesh.chunks > 1, ("schedules",)),
        ("mesh.tp", config.mesh.tp > 1, ("models",)),
    )
    remedies = {"mesh.chunks": 'set train.schedule = "interleaved", or mesh.chunks = 1'}
    for full, is_asked, rooms in asked:
        remedy = remedies.get(full, "take that out, or give a kind whose file names it in HEEDS")
        for room in rooms if is_asked else ():
            key, kind = kinds[room]
            _require(
                bool(kind) and full in getattr(plugins.find(room, kind, key), "HEEDS", ()),
                f'{key} = "{kind}" does not heed {full}: {remedy}',
            )


def _check_readable(config: Config, plugins: Plugins) -> None:
    """A model reads what the batches of a task are made of, and does not see what it has to tell."""
    model, task = _model(plugins, config.model.kind), plugins.find("tasks", config.task.kind, "task.kind")
    needs = tuple(getattr(task, "NEEDS", ()))
    lacks = [need for need in needs if need not in getattr(model, "HEEDS", ())]
    able = (kind for kind in plugins.kinds("models") if {*needs} <= {*getattr(_model(plugins, kind), "HEEDS", ())})
    _require(
        not lacks,
        f'model.kind = "{config.model.kind}" does not read {" and ".join(lacks)}, which task.kind = '
        f'"{config.task.kind}" gives it: set model.kind = "{next(able, "?") if lacks else ""}", or another task.kind',
    )
    unread = [need for need in getattr(model, "READS", ()) if need not in needs]
    _require(
        not unread,
        f'model.kind = "{config.model.kind}" reads {" and ".join(unread)}, which task.kind = "{config.task.kind}" does '
        'not give it: set task.kind = "translation", or another model.kind',
    )
    _require(
        not getattr(model, "BOTH_WAYS", False) or getattr(task, "BOTH_WAYS", False),
        f'model.kind = "{config.model.kind}" sees the tokens that task.kind = "{config.task.kind}" predicts: set '
        'task.kind = "masked_language_model", or another model.kind',
    )
    _require(
        not (config.backend.graphs and needs),
        f'backend.graphs replays micro-batches of one shape, and those of task.kind = "{config.task.kind}" differ: '
        "set backend.graphs = false",
    )


def _model(plugins: Plugins, kind: str) -> ModuleType:
    return plugins.find("models", kind, "model.kind")


def shares(config: Config) -> int:
    """At most so many shares has a sum that a mesh may cut. On a GPU one: there tp would decide bits."""
    return int(config.numerics.shares) if config.backend.device == "cpu" else 1


def check_ranks(config: Config, ranks: int) -> None:
    """pp · dp · tp is the number of ranks but for spares, and 1 <= dp <= J: a copy without a lane has nothing to do.

    Raises ConfigError.
    """
    lanes, spares, axes = config.train.lanes, config.comm.spares, config.mesh
    each = axes.pp * axes.tp  # ranks that share a copy of the model
    _require(
        spares < ranks,
        f"comm.spares = {spares} leaves none of {ranks} ranks to work: start more ranks, or lower comm.spares",
    )
    _require(
        not spares or (config.comm.recover and config.comm.reduction != "nccl"),
        f"comm.spares = {spares} are for a job that goes on when a rank dies: set comm.recover = true and "
        'comm.reduction = "canonical", or comm.spares = 0',
    )
    there, remedy = parted(config)
    _require(
        not spares or is_plain(config),
        f"comm.spares = {spares} hold all, and with {there} each rank holds a part: set comm.spares = 0, or {remedy}",
    )
    copies, left = divmod(ranks - spares, each)
    dp = axes.dp or max(1, copies)
    spared = f", {spares} of them spares" if spares else ""
    remedy = f"start {dp * each + spares} ranks, or set {_nearest(config, ranks - spares)}"
    if not left and copies:
        remedy = f"set mesh.dp = {copies}"
    _require(
        dp * each == ranks - spares,
        f"mesh.pp = {axes.pp}, mesh.dp = {dp}, mesh.tp = {axes.tp} need {dp * each} ranks, the launcher gave "
        f"{ranks}{spared}: {remedy}",
    )
    _require(
        dp <= lanes,
        f"the launcher gave {ranks} ranks, but train.lanes = {lanes} allows at most {lanes * each + spares}: "
        f"start {lanes * each + spares} ranks, or set {_more_lanes(config, dp)} (it changes the bits)",
    )


def _more_lanes(config: Config, copies: int) -> str:
    """What gives so many copies of the model a lane each."""
    micros = config.train.micro_batches
    fitting = next((lanes for lanes in range(copies, micros + 1) if micros % lanes == 0), 0)
    if fitting:
        return f"train.lanes = {fitting}, which divides train.micro_batches = {micros}"
    return f"train.micro_batches = {copies} and train.lanes = {copies}"


def _nearest(config: Config, ranks: int) -> str:
    """A mesh near to the one asked for that fits so many ranks."""
    tp = gcd(ranks, config.mesh.tp)
    free = "mesh.dp = 0, " if config.mesh.dp else ""
    return f"{free}mesh.pp = {gcd(ranks // tp, config.mesh.pp)} and mesh.tp = {tp}"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
