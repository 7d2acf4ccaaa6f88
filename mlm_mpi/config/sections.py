"""What a run is made of, and which room declares which section.

Rooms are named here, not imported: they stand above, and some load NumPy, which must not happen before its environment
is set.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlm_mpi.errors import ConfigError
from mlm_mpi.plug import Plugins

if TYPE_CHECKING:
    from mlm_mpi.backend import Backend, Numerics
    from mlm_mpi.comm import Axes, Comm
    from mlm_mpi.data import Data
    from mlm_mpi.monitor import Log
    from mlm_mpi.train import Checkpoint, Eval, Guard, Start, Train


@dataclass(frozen=True)
class Config:
    """A whole run, in the order in which it is written. Change it by `dataclasses.replace`."""

    model: Any  # what models/<kind>.py declares
    task: Any  # what tasks/<kind>.py declares
    data: "Data"
    train: "Train"
    start: "Start"
    optim: Any  # what optim/<name>.py declares
    eval: "Eval"
    checkpoint: "Checkpoint"
    guard: "Guard"
    mesh: "Axes"
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
KINDS = {
    "model": Kinds("models", "kind", "gpt"), "task": Kinds("tasks", "kind", "language_model"),
    "optim": Kinds("optim", "name", "adamw"),
}  # fmt: skip
_DECLARED = {
    "data": ("mlm_mpi.data", "Data"), "train": ("mlm_mpi.train", "Train"),
    "start": ("mlm_mpi.train", "Start"), "eval": ("mlm_mpi.train", "Eval"),
    "checkpoint": ("mlm_mpi.train", "Checkpoint"),
    "guard": ("mlm_mpi.train", "Guard"), "mesh": ("mlm_mpi.comm", "Axes"), "comm": ("mlm_mpi.comm", "Comm"),
    "backend": ("mlm_mpi.backend", "Backend"), "numerics": ("mlm_mpi.backend", "Numerics"),
    "log": ("mlm_mpi.monitor", "Log"),
}  # fmt: skip


def declaration(section: str, kind: str, plugins: Plugins, begin: Callable[[str], str] = lambda _: "") -> Any:
    """The dataclass of a section; `kind` counts where a section has kinds. `begin`: of a message about a key.

    Raises ConfigError.
    """
    if section not in KINDS:
        module, name = _DECLARED[section]
        return getattr(importlib.import_module(module), name)
    room, full = KINDS[section].room, f"{section}.{KINDS[section].key}"
    key = begin(full) + full
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
