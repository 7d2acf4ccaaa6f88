"""Which file serves a kind: a room's modules are its kinds, and so are the files of the same room in `--plugins DIR`.

    models/gpt.py            is `model.kind = "gpt"`
    DIR/models/mine.py       is `model.kind = "mine"`, found nowhere but in the folder that the command names

Nobody keeps a list: `ls` of a room is its registry.
"""

import hashlib
import importlib
import pkgutil
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from mlm_mpi.errors import ConfigError, MlmError, agreed, nearest
from mlm_mpi.files import read_whole

# room -> the package that holds its kinds
ROOMS = {
    "models": "mlm_mpi.models", "tasks": "mlm_mpi.tasks", "objectives": "mlm_mpi.data.objectives",
    "optim": "mlm_mpi.optim", "rates": "mlm_mpi.rates", "schedules": "mlm_mpi.schedules",
    "reductions": "mlm_mpi.comm.reductions", "formats": "mlm_mpi.data.formats",
}  # fmt: skip
# room -> functions that a file of it has beside its settings
FUNCTIONS = {
    "models": ("build",), "tasks": ("build", "parts", "least"), "objectives": ("samples",), "optim": ("build",),
    "rates": ("rate",), "schedules": ("instructions",), "reductions": ("build",),
}  # fmt: skip
_KIND = re.compile(r"[a-z][a-z0-9_]{0,63}")
_FILE_BYTES = 1 << 20


def named(text: str | None) -> "Plugins":
    """What a command's --plugins names. Raises ConfigError."""
    if text == "":  # an unset variable; as a path it would be the current folder
        raise ConfigError("--plugins '' names no folder: give one, or leave it out")
    return Plugins(None if text is None else Path(text))


@dataclass(frozen=True)
class Plugins:
    """The kinds of every room. `used`: "models/mine.py" -> SHA-256 of each file of the folder that was loaded."""

    folder: Path | None = None
    used: dict[str, str] = field(default_factory=dict)
    _loaded: dict[str, ModuleType] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(f"--plugins {self.folder} is no folder: give one that holds models/, optim/ or others")

    def kinds(self, room: str) -> list[str]:
        """Names that `find` knows, sorted."""
        package = importlib.import_module(ROOMS[room])
        own = {module.name for module in pkgutil.iter_modules(package.__path__)}
        return sorted(own | set(self._files(room)))

    def find(self, room: str, kind: str, key: str) -> ModuleType:
        """The module of a kind; `key` is the setting that named it. Raises ConfigError with the nearest name."""
        files = self._files(room)
        if kind in files:
            return self._load(room, kind, files[kind])
        known = self.kinds(room)
        if kind not in known:
            near = nearest(kind, known, every=False)
            own = " (a file of your own: --plugins DIR)" if not near and self.folder is None else ""
            raise ConfigError(f'{key} = "{kind[:80]}" is none of {", ".join(known)}{near}{own}')
        return importlib.import_module(f"{ROOMS[room]}.{kind}")

    def _files(self, room: str) -> dict[str, Path]:
        if self.folder is None:
            return {}
        paths = sorted(path for path in (self.folder / room).glob("*.py") if not path.name.startswith((".", "_")))
        for path in paths:
            if not _KIND.fullmatch(path.stem):
                raise ConfigError(f"{path} names no kind: give it a name of a-z, 0-9 and _ that begins with a letter")
        return {path.stem: path for path in paths}

    def _load(self, room: str, kind: str, path: Path) -> ModuleType:
        name = f"{room}/{kind}.py"
        if name not in self._loaded:
            try:
                content = read_whole(path, _FILE_BYTES, self.folder)
            except OSError as error:
                raise ConfigError(f"cannot read {path}: {error.strerror}: mend it, or give another --plugins") from None
            digest = hashlib.sha256(content).hexdigest()
            module = ModuleType(f"mlm_mpi_plugins.{room}.{kind}.{digest[:16]}", f"{path}, given by --plugins")
            module.__file__ = str(path)
            sys.modules[module.__name__] = module  # dataclasses and type hints look their module up there
            try:
                exec(compile(content, path, "exec"), module.__dict__)
            except MlmError:
                raise
            except (Exception, SystemExit) as error:  # after an exit the other ranks would wait
                raise ConfigError(f"{path} does not load: {type(error).__name__}: {error}: mend it") from error
            for function in FUNCTIONS.get(room, ()):
                if not callable(getattr(module, function, None)):
                    raise ConfigError(f"{path} has no function {function}, which a file of {room}/ has: add it")
            self._loaded[name], self.used[name] = module, digest
        return self._loaded[name]


class Ranks(Protocol):
    """What `check_same` asks of a group of ranks."""

    def allgather(self, value: Any, what: str) -> list[Any]: ...


def check_same(plugins: Plugins, group: Ranks) -> None:
    """Raises ConfigError on all ranks unless all have loaded the same files. Collective."""
    first, *others = group.allgather(plugins.used, "plug-ins")
    for rank, other in enumerate(others, 1):
        for name in sorted(first.keys() | other.keys()):
            mine, found = (used[name][:12] if name in used else "none" for used in (first, other))
            if mine != found:
                raise agreed(
                    ConfigError(
                        f"--plugins differ between ranks: {name} is {mine} on rank 0 and {found} on rank {rank}: "
                        "give all ranks the same folder"
                    )
                )
