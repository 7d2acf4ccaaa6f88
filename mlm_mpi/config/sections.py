"""What a run is made of, and which room declares which section.

Rooms are named here, not imported: they stand above, and some load NumPy, which must not happen before its environment
is set.
"""

import dataclasses
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlm_mpi.errors import ConfigError
from mlm_mpi.plug import Plugins

if TYPE_CHECKING:
    from mlm_mpi.backend import Backend, Numerics
    from mlm_mpi.comm import Comm
    from mlm_mpi.data import Data
    from mlm_mpi.monitor import Log
    from mlm_mpi.train import Checkpoint, Eval, Train


@dataclass(frozen=True)
class Config:
    """A whole run, in the order in which it is written. Change it by `dataclasses.replace`."""

    model: Any  # what models/<kind>.py declares
    task: Any
    data: "Data"
    train: "Train"
    optim: Any  # what optim/<name>.py declares
    eval: "Eval"
    checkpoint: "Checkpoint"
    comm: "Comm"
    backend: "Backend"
    numerics: "Numerics"
    log: "Log"


@dataclass(frozen=True)
class Kinds:
    """A section that every kind of a room declares anew, as `Settings`; `key` says which kind is meant."""

    room: str
    key: str
    default: str


SECTIONS = tuple(field.name for field in dataclasses.fields(Config))
KINDS = {"model": Kinds("models", "kind", "gpt"), "optim": Kinds("optim", "name", "adamw")}
_DECLARED = {
    "task": ("mlm_mpi.tasks", "Settings"), "data": ("mlm_mpi.data", "Data"), "train": ("mlm_mpi.train", "Train"),
    "eval": ("mlm_mpi.train", "Eval"), "checkpoint": ("mlm_mpi.train", "Checkpoint"), "comm": ("mlm_mpi.comm", "Comm"),
    "backend": ("mlm_mpi.backend", "Backend"), "numerics": ("mlm_mpi.backend", "Numerics"),
    "log": ("mlm_mpi.monitor", "Log"),
}  # fmt: skip

# Rooms whose kinds are not files yet. A room that has become files is taken out here, and is open from then on.
_CLOSED = {
    "tasks": ("language_model",), "objectives": ("causal",), "rates": ("constant", "cosine", "linear"),
    "schedules": ("single",), "reductions": ("allreduce", "canonical", "nccl"),
}  # fmt: skip


def declaration(section: str, kind: str, plugins: Plugins) -> Any:
    """The dataclass of a section; `kind` counts where a section has kinds. Raises ConfigError."""
    if section not in KINDS:
        module, name = _DECLARED[section]
        return getattr(importlib.import_module(module), name)
    room, key = KINDS[section].room, f"{section}.{KINDS[section].key}"
    found = plugins.find(room, kind, key)
    settings = getattr(found, "Settings", None)
    if not dataclasses.is_dataclass(settings):
        raise ConfigError(f"{key} = {kind!r} is no kind: {room}/{kind}.py has no dataclass Settings; give another")
    return settings


def kinds_of(section: str, plugins: Plugins) -> Iterator[str]:
    """Kinds that a section may be of, sorted; files without Settings are none."""
    for kind in plugins.kinds(KINDS[section].room):
        if hasattr(plugins.find(KINDS[section].room, kind, section), "Settings"):
            yield kind


def names_of(room: str, plugins: Plugins) -> list[str]:
    """Names that a key with a room may have."""
    return list(_CLOSED[room]) if room in _CLOSED else plugins.kinds(room)


def check_name(room: str, name: str, key: str, plugins: Plugins) -> None:
    """Raises ConfigError where no file of the room has this name, or where the file does not load."""
    if room not in _CLOSED:
        plugins.find(room, name, key)
    elif name not in _CLOSED[room]:
        raise ConfigError(f"{key} = {name!r} is none of {room}; known: {', '.join(_CLOSED[room])}")
