"""The configuration: typed TOML, and every rule that spans fields, in one place.

A run is `load(path, overrides)` -> `Config`, which is frozen and complete: no default is decided later,
except those that need the catalog (the vocabulary). Nothing here imports NumPy, so that
`prepare_environment` can pin libraries before they load.
"""

import difflib
import math
import os
import threading
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from mlm_mpi.errors import ConfigError
from mlm_mpi.files import read_whole

_FILE_BYTES = 1 << 14  # ten times a file with every key
_LINE = 4500  # a path and its key; tomllib takes 31 s for a key of 32,000 parts, quadratic in them


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the TOML file."""


class Model(Section, frozen=True):
    """What is trained. `feed_forward = 0` means 4 · width."""

    kind: Literal["gpt"] = "gpt"
    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 128
    feed_forward: int = 0
    dropout: float = 0.0
    init_std: float = 0.02
    norm_epsilon: float = 1e-5


class Data(Section, frozen=True):
    """Where tokens come from. `prefetch`: micro-batches held ready, at most."""

    dir: str = "corpus"
    prefetch: int = 4


class Train(Section, frozen=True):
    """The work of a step: M micro-batches of B rows, summed in J lanes.

    `lanes = 0`: the largest divisor of M up to 8. `recompute`: blocks keep only their inputs and run their forward
    twice: less memory, the same bits.
    """

    steps: int = 100
    micro_batches: int = 8
    rows: int = 8
    lanes: int = 0
    seed: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    recompute: bool = False


class Optim(Section, frozen=True):
    """AdamW or SGD with momentum, schedule and clipping. `clip = 0`: none."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.1
    clip: float = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.0


class Eval(Section, frozen=True):
    """Held-out loss every `every` steps (0: only at the end) over at most `windows` windows (0: all)."""

    every: int = 0
    windows: int = 0
    rows: int = 8


class Checkpoint(Section, frozen=True):
    """A checkpoint every `every` steps (0: only at the end); the newest `keep` stay."""

    every: int = 0
    keep: int = 2
    background: bool = True


class Comm(Section, frozen=True):
    """How gradients are summed. `bucket_mib`: what one message round carries, in MiB.

    `gpu_aware`: whether MPI reads a GPU's memory itself; "auto" asks the library, "no" copies through host memory.
    """

    reduction: Literal["canonical", "allreduce", "nccl"] = "canonical"
    overlap: bool = True
    bucket_mib: float = 4.0
    gpu_aware: Literal["auto", "yes", "no"] = "auto"
    timeout_s: float = 600.0


class Backend(Section, frozen=True):
    """Where ranks calculate. `memory_gib`: the most a rank may take of its GPU's memory (0: no limit).

    `graphs`: a GPU replays forward and backward as CUDA graphs; off by default (LOG.md, 2026-11-27).
    """

    device: Literal["cpu", "gpu"] = "cpu"
    memory_gib: float = 0.0
    graphs: bool = False


class Numerics(Section, frozen=True):
    """What else decides bits. `threads` per rank share a matrix product, ours or BLAS's. `level`: instruction set of
    kernels, BLAS and NumPy.

    `products`: "bf16" rounds the operands of matrix products to bf16 and sums in float32. On a CPU, which needs
    AVX512-BF16, all else stays float32; a GPU keeps activations in bf16 too. `reference`: ops that NumPy (CuPy)
    computes instead of a kernel, "gelu,attention" or "all", to find who spoils a loss.
    """

    threads: int = 1
    level: Literal["auto", "base", "avx2"] = "auto"
    products: Literal["float32", "bf16"] = "float32"
    reference: str = ""


class Log(Section, frozen=True):
    """A line every `every` steps where there is no terminal."""

    every: int = 10


class Config(Section, frozen=True):
    """A whole run."""

    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    optim: Optim = Optim()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    comm: Comm = Comm()
    backend: Backend = Backend()
    numerics: Numerics = Numerics()
    log: Log = Log()


def load(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """The configuration in a TOML file with `section.key=value` overrides, checked.

    Raises ConfigError, naming file, key, value, bound and remedy.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = _parse(read_whole(Path(path), _FILE_BYTES).decode("utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from None
    for text in overrides:
        _override(table, text)
    return from_table(table, str(path) if path is not None else "the defaults")


def from_table(table: dict[str, Any], source: str) -> Config:
    """The same from nested dictionaries (a run folder's saved configuration)."""
    _refuse_unknown(table, source)
    try:
        config = msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {error}") from None
    config = _resolve(config)
    check(config)
    return config


def to_table(config: Config) -> dict[str, Any]:
    """Nested dictionaries of plain values; `from_table` gives the same Config back."""
    table: dict[str, Any] = msgspec.to_builtins(config)
    return table


def to_toml(config: Config) -> str:
    """The configuration as TOML text."""
    lines = []
    for section, values in to_table(config).items():
        lines += [f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items()), ""]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    # JSON strings, numbers and booleans are TOML too
    return msgspec.json.encode(value).decode()


def _override(table: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"--set {text!r} is not section.key=value, for example --set train.steps=200")
    try:
        parsed = _value(value)
    except (ValueError, RecursionError):
        raise ConfigError(f"--set {text[:200]!r} holds no single TOML value: one --set for each key") from None
    if not isinstance(table.setdefault(section, {}), dict):
        raise ConfigError(f"--set {text!r}: {section} is not a section")
    table[section][key] = parsed


def _parse(text: str) -> dict[str, Any]:
    """A TOML table. Raises ValueError, RecursionError."""
    if len(max(text.split("\n"), key=len)) > _LINE:
        raise ValueError(f"a line has more than {_LINE} characters")
    return tomllib.loads(text)


def _value(text: str) -> Any:
    """One TOML value; a bare word is a string. Raises ValueError where there is more than one value."""
    try:
        table = _parse(f"value = {text}")
    except tomllib.TOMLDecodeError:
        if not text.isprintable():
            raise
        return text.strip()
    if len(table) > 1:
        raise ValueError(text)
    return table["value"]


def _refuse_unknown(table: dict[str, Any], source: str) -> None:
    sections = {field.name: field.type for field in msgspec.structs.fields(Config)}
    for section, values in table.items():
        if section not in sections:
            raise ConfigError(f"{source}: unknown section [{section}]{_nearest(section, sections)}")
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: [{section}] is a section, {values!r} is a value: write [{section}] key = …")
        known = [field.name for field in msgspec.structs.fields(sections[section])]
        for key in values:
            if key not in known:
                raise ConfigError(f"{source}: unknown key {section}.{key}{_nearest(key, known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"


def _resolve(config: Config) -> Config:
    replace = msgspec.structs.replace
    model, train = config.model, config.train
    if model.feed_forward == 0:
        model = replace(model, feed_forward=4 * model.width)
    if train.lanes == 0:
        lanes = max((j for j in range(1, 9) if train.micro_batches % j == 0), default=1)
        train = replace(train, lanes=lanes)
    return replace(config, model=model, train=train)


def check(config: Config) -> None:
    """Every bound on one field and every rule that spans fields. Raises ConfigError."""
    model, train, optim = config.model, config.train, config.optim
    for section, values in to_table(config).items():
        for key, value in values.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            _require(finite, f"{section}.{key} = {value} must be a finite number")
    at_least_one = {
        "model.layers": model.layers, "model.width": model.width, "model.heads": model.heads,
        "model.context": model.context, "model.feed_forward": model.feed_forward,
        "train.steps": train.steps, "train.micro_batches": train.micro_batches, "train.rows": train.rows,
        "train.lanes": train.lanes, "data.prefetch": config.data.prefetch, "eval.rows": config.eval.rows,
        "checkpoint.keep": config.checkpoint.keep, "numerics.threads": config.numerics.threads,
        "log.every": config.log.every,
    }  # fmt: skip
    for name, value in at_least_one.items():
        _require(value >= 1, f"{name} = {value} must be at least 1")
    not_negative = {
        "eval.every": config.eval.every, "eval.windows": config.eval.windows,
        "checkpoint.every": config.checkpoint.every, "optim.warmup_steps": optim.warmup_steps,
        "optim.weight_decay": optim.weight_decay, "optim.clip": optim.clip, "train.seed": train.seed,
        "optim.learning_rate": optim.learning_rate, "model.init_std": model.init_std,
        "backend.memory_gib": config.backend.memory_gib,
    }  # fmt: skip
    for name, number in not_negative.items():
        _require(number >= 0, f"{name} = {number} must not be negative")
    below_one = {
        "model.dropout": model.dropout, "optim.beta1": optim.beta1, "optim.beta2": optim.beta2,
        "optim.momentum": optim.momentum,
    }  # fmt: skip
    for name, fraction in below_one.items():
        _require(0 <= fraction < 1, f"{name} = {fraction} must be in [0, 1)")
    _require(model.init_std <= 1, f"model.init_std = {model.init_std} must be at most 1, a standard normal")
    _require(0 <= optim.final_fraction <= 1, f"optim.final_fraction = {optim.final_fraction} must be in [0, 1]")
    _require(optim.epsilon > 0, f"optim.epsilon = {optim.epsilon} must be positive")
    _require(model.norm_epsilon > 0, f"model.norm_epsilon = {model.norm_epsilon} must be positive")
    _require(
        config.comm.bucket_mib >= 0.001,
        f"comm.bucket_mib = {config.comm.bucket_mib} must be at least 0.001: every bucket is a message to each rank",
    )
    _require(
        config.numerics.threads <= 1024,  # CPU_SETSIZE of Linux
        f"numerics.threads = {config.numerics.threads} must be at most 1024, the CPUs a process can be bound to",
    )
    _require(
        0 < config.comm.timeout_s <= threading.TIMEOUT_MAX,
        f"comm.timeout_s = {config.comm.timeout_s} must be positive and at most {threading.TIMEOUT_MAX:g}",
    )
    _require(
        model.width % model.heads == 0,
        f"model.width = {model.width} is not a multiple of model.heads = {model.heads}: "
        f"set model.width = {-(-model.width // model.heads) * model.heads}",
    )
    _require(
        train.micro_batches % train.lanes == 0,
        f"train.micro_batches = {train.micro_batches} is not a multiple of train.lanes = {train.lanes}: "
        f"set train.micro_batches = {-(-train.micro_batches // train.lanes) * train.lanes}",
    )
    _require(
        config.numerics.products == "float32" or train.dtype == "float32",
        f'numerics.products = "bf16" needs train.dtype = "float32", not "{train.dtype}": set one of them to "float32"',
    )
    handed_back = {op.strip() for op in config.numerics.reference.split(",")} & {"matmul", "linear", "all"}
    _require(
        config.numerics.products == "float32" or not handed_back or config.backend.device == "gpu",
        f'numerics.products = "bf16" and numerics.reference = "{config.numerics.reference}": NumPy has no bf16 '
        'products; set numerics.products = "float32"',
    )
    _require(
        not config.backend.graphs or (config.backend.device == "gpu" and model.dropout == 0.0),
        f"backend.graphs needs a GPU and no dropout: backend.device = {config.backend.device}, "
        f"model.dropout = {model.dropout}: set backend.graphs = false",
    )
    _require(
        config.comm.reduction != "nccl" or config.backend.device == "gpu",
        "comm.reduction = nccl sums between GPUs: set backend.device = gpu, or choose canonical or allreduce",
    )
    _require(
        optim.warmup_steps <= train.steps,
        f"optim.warmup_steps = {optim.warmup_steps} exceeds train.steps = {train.steps}: lower it",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_ranks(config: Config, ranks: int) -> None:
    """1 <= ranks <= J: a rank without a lane has nothing to do. Raises ConfigError."""
    lanes = config.train.lanes
    _require(
        ranks <= lanes,
        f"the launcher gave {ranks} ranks, but train.lanes = {lanes} allows at most {lanes}: "
        f"start {lanes} ranks, or set train.lanes to {ranks} or more (it changes the bits)",
    )


# OpenBLAS and NumPy choose kernels by what the CPU can do, and other kernels give other bits. Pinning
# them, with our kernels, to AVX2 lets nodes with and without AVX-512 share a run.
# NumPy names its features since 2.4 by level (X86_V4), before one by one, and ignores names it does not know.
_AVX512 = "X86_V4 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR"
_PINNED = {
    "base": {
        "OPENBLAS_CORETYPE": "Nehalem",
        "NPY_DISABLE_CPU_FEATURES": f"X86_V3 F16C FMA3 AVX2 {_AVX512}",
    },
    "avx2": {
        "OPENBLAS_CORETYPE": "Haswell",
        "NPY_DISABLE_CPU_FEATURES": _AVX512,
    },
}


def prepare_environment(config: Config) -> None:
    """Sets what BLAS and NumPy read when they load; called before either is imported."""
    os.environ["OPENBLAS_NUM_THREADS"] = str(config.numerics.threads)
    os.environ["OMP_NUM_THREADS"] = str(config.numerics.threads)
    os.environ.update(_PINNED.get(config.numerics.level, {}))
