"""Which format serves a file, and how it is asked: what goes wrong in a plug-in is one line that names it."""

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from mlm_mpi.data.decoding import COMPRESSED, Content, NoText, plain_name
from mlm_mpi.errors import ConfigError, DataError, MlmError
from mlm_mpi.plug import Plugins

_ROOM = "formats"
_FALLBACK = "text"
_INTERFACE = "see mlm_mpi/data/formats/__init__.py"


@dataclass(frozen=True)
class Format:
    """A module of the room `formats`, checked. `plugin`: its file, if it is one of `--plugins`."""

    module: ModuleType
    plugin: Path | None
    suffixes: tuple[str, ...]
    is_shared: bool

    @classmethod
    def of(cls, module: ModuleType, is_plugin: bool) -> "Format":
        """Raises ConfigError for a module without what a format has."""
        path, suffixes = Path(str(module.__file__)), getattr(module, "SUFFIXES", None)
        if not isinstance(suffixes, tuple) or not suffixes or not all(isinstance(text, str) for text in suffixes):
            raise ConfigError(f'{path} needs SUFFIXES, a tuple as in (".mine",), it has {suffixes!r}: {_INTERFACE}')
        for text in suffixes:
            if len(text) < 2 or not text.startswith(".") or "/" in text:
                raise ConfigError(f"{path}: SUFFIXES has {text!r}: give the end of a name, from a dot on")
            if text.endswith(COMPRESSED):
                raise ConfigError(f"{path}: SUFFIXES has {text!r}: leave out what compression adds, it is read anyway")
        if not callable(getattr(module, "documents", None)):
            raise ConfigError(f"{path} needs a function documents(content): {_INTERFACE}")
        return cls(module, path if is_plugin else None, suffixes, bool(getattr(module, "SHARED", False)))

    def fit(self, name: str) -> int:
        """The length of the longest suffix with which a name ends; 0 where none is its end."""
        return max((len(text) for text in self.suffixes if name.endswith(text) and name != text), default=0)

    def texts(self, content: Content, rank: int, size: int) -> Iterator[tuple[int, str | NoText]]:
        """(number, text) of every size-th document. Raises DataError."""
        try:
            for number, found in enumerate(self.module.documents(content)):
                if number % size == rank:
                    text = found() if callable(found) else found
                    if not isinstance(text, str | NoText):
                        raise TypeError(f"document {number} is no str but {type(text).__name__}")
                    yield number, text
        except MlmError:
            raise
        except (Exception, SystemExit) as error:  # ranks that are left alone would wait
            if self.plugin is None:
                raise
            raise DataError(
                f"{self._place(error)} failed to read {content.path} ({type(error).__name__}: {error}): mend it"
            ) from error

    def _place(self, error: BaseException) -> str:
        """The plug-in's file, and its line if the error came from there."""
        numbers = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == str(self.plugin)]
        return f"{self.plugin}:{numbers[-1]}" if numbers else str(self.plugin)


class Formats:
    """All formats. Every file of the plug-ins' room is loaded: its suffixes are known only then."""

    def __init__(self, plugins: Plugins) -> None:
        """Raises ConfigError for a plug-in that is no format, or two that take the same suffix."""
        self.plugins = plugins
        self._all = {kind: self._load(kind) for kind in plugins.kinds(_ROOM)}
        taken: dict[tuple[str, bool], Format] = {}
        for one in self._all.values():
            for suffix in one.suffixes:
                other = taken.setdefault((suffix, one.plugin is not None), one)
                if other is not one:
                    files = f"{other.module.__file__} and {one.module.__file__}"
                    raise ConfigError(f"{files} both take {suffix!r} in their SUFFIXES: leave it to one")

    def serving(self, path: Path) -> Format:
        """The format of a file, by its name."""
        name = plain_name(path)
        best = max(self._all.values(), key=lambda one: (one.fit(name) > 0, one.plugin is not None, one.fit(name)))
        return best if best.fit(name) else self._all[_FALLBACK]

    def _load(self, kind: str) -> Format:
        module = self.plugins.find(_ROOM, kind, "format")
        return Format.of(module, f"{_ROOM}/{kind}.py" in self.plugins.used)
