"""TOML and `--set` -> the sections of a run, each value of its type and within its bounds.

[numerics] is read first and alone: NumPy, and every room that loads it, is imported only when it is known.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, NoReturn

from mlm_mpi import __version__
from mlm_mpi.config import rules
from mlm_mpi.config.entries import Entry, entries, quoted, word_of
from mlm_mpi.config.sections import KINDS, SECTIONS, Config, declaration, kinds_of
from mlm_mpi.errors import ConfigError, nearest
from mlm_mpi.files import read_whole
from mlm_mpi.plug import Plugins

_FILE_BYTES = 1 << 14  # ten times a file with every key
_LINE = 4500  # a path and its key; tomllib takes 31 s for a key of 32,000 parts, quadratic in them
_A_FILE = ": give a TOML file such as jobs/configs/tiny.toml; `mlm-mpi config` explains what stands in one"

Pin = Callable[[Any], None]
Beneath = Callable[[], dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Source:
    """Where values come from: a file, "" for the defaults, and the keys that --set gave, which wins."""

    file: str
    overridden: frozenset[str] = frozenset()

    def of(self, full: str) -> str:
        """How a message about `section.key` begins."""
        if full in self.overridden:
            return "--set: "
        return f"{self.file}: " if self.file else ""


def load(
    path: str | Path | None, overrides: Iterable[str] = (), plugins: Plugins | None = None, pin: Pin | None = None,
    beneath: Beneath | None = None,
) -> Config:  # fmt: skip
    """The configuration in a TOML file with `section.key=value` overrides, checked.

    `pin`: is called with [numerics] before any room that loads NumPy is imported; see `prepare_environment`.
    `beneath`: is called after that, for sections whose keys hold where neither says another kind or value.
    Raises ConfigError, naming the file or --set, key, value, bound and remedy.
    """
    table = {} if path is None else _read_file(str(path))
    overridden = frozenset(_override(table, text) for text in overrides)
    try:
        return _config(table, Source("" if path is None else str(path), overridden), plugins or Plugins(), pin, beneath)
    except ConfigError as error:
        raise ConfigError(f"{error}{'' if path is None else _written_by(Path(path))}") from None


def from_table(table: dict[str, Any], source: str, plugins: Plugins | None = None, pin: Pin | None = None) -> Config:
    """The same from nested dictionaries, which a manifest holds; `source` names it."""
    return _config(table, Source(source), plugins or Plugins(), pin)


def _config(
    table: dict[str, Any], source: Source, plugins: Plugins, pin: Pin | None, beneath: Beneath | None = None
) -> Config:
    for section, values in table.items():
        if not isinstance(values, dict):
            _refuse_value(section, values, source, plugins)
        if section not in SECTIONS:
            given = any(full.startswith(f"{section}.") for full in source.overridden)
            begins = "--set" if given else source.file
            raise ConfigError(f"{begins}: unknown section [{section}]{nearest(section, SECTIONS)}")

    def read(section: str) -> Any:
        return _section(section, table.get(section, {}), source, plugins)

    numerics = read("numerics")
    if pin is not None:
        pin(numerics)
    for section, values in ({} if beneath is None else beneath()).items():
        table[section] = _over(values, table.get(section, {}), section)
    sections = {section: numerics if section == "numerics" else read(section) for section in SECTIONS}
    config = Config(**sections)
    rules.check(config, plugins)
    return config


def _over(beneath: dict[str, Any], values: dict[str, Any], section: str) -> dict[str, Any]:
    """Keys of a section over others of it, where these are not of another kind."""
    key = KINDS[section].key if section in KINDS else ""
    same = not key or values.get(key, beneath.get(key)) == beneath.get(key)
    return beneath | values if same else values


def _refuse_value(name: str, value: Any, source: Source, plugins: Plugins) -> NoReturn:
    """A value where a section should be: [[train]], train = 3, or a key above all sections."""
    if name in SECTIONS:
        raise ConfigError(
            f"{source.file}: {name} = {quoted(value)}, but {name} is a section: write [{name}] on a line of its own, "
            "and its keys below"
        )
    homes = _homes(name, plugins)
    where = f"write it below [{homes[0].partition('.')[0]}]" if homes else f"sections are {', '.join(SECTIONS)}"
    raise ConfigError(f"{source.file}: {name} = {quoted(value)} stands outside of all sections: {where}")


def _section(section: str, values: dict[str, Any], source: Source, plugins: Plugins) -> Any:
    kind = _kind(section, values, source)
    settings = declaration(section, kind, plugins, source.of)
    known = entries(section, settings)
    if section in KINDS:
        if KINDS[section].key not in known:
            raise ConfigError(f"{KINDS[section].room}/{kind}.py: Settings has no key {KINDS[section].key}: declare it")
        values = values | {KINDS[section].key: kind}
    for key in values:
        if key not in known:
            who = _who_knows(section, key, kind, known, plugins)
            raise ConfigError(f"{source.of(f'{section}.{key}')}unknown key {section}.{key}{who}")
    given = {key: _value_of(entry, values, source) for key, entry in known.items()}
    for key, entry in known.items():
        if entry.about.room:
            plugins.find(entry.about.room, given[key], source.of(entry.full) + entry.full)
    made = settings(**given)
    return made.resolved() if hasattr(made, "resolved") else made


def _kind(section: str, values: dict[str, Any], source: Source) -> str:
    """Which kind of a section is meant; "" where it has none."""
    if section not in KINDS:
        return ""
    kinds = KINDS[section]
    kind = values.get(kinds.key, kinds.default)
    if not isinstance(kind, str):
        full = f"{section}.{kinds.key}"
        raise ConfigError(f"{source.of(full)}{full} = {quoted(kind)} must be a string, not {word_of(kind)}")
    return kind


def _value_of(entry: Entry, values: dict[str, Any], source: Source) -> Any:
    value = values.get(entry.name, entry.default)
    if value is MISSING:
        raise ConfigError(f"{source.of(entry.full)}{entry.full} has no default: set it")
    return entry.read(value, source.of(entry.full))


def _is_chosen(section: str, kind: str) -> bool:
    """Whether nobody would take another kind for the sake of a key: a task that was asked for."""
    return section == "task" and kind != KINDS[section].default


def _who_knows(section: str, key: str, kind: str, known: Iterable[str], plugins: Plugins) -> str:
    """What follows "unknown key": the kinds or the section that know it, else the nearest key."""
    if section in KINDS:
        others = [kind for kind, keys in _keys_by_kind(section, plugins).items() if key in keys]
        if others:
            full, names = f"{section}.{KINDS[section].key}", " and ".join(f'"{other}"' for other in others)
            knows = "knows" if len(others) == 1 else "know"
            other_kind = "" if _is_chosen(section, kind) else f', or set {full} = "{others[0]}"'
            return f' of {full} = "{kind}"; {names} {knows} it: take it out{other_kind}'
    homes = _homes(key, plugins)
    return f"; did you mean {' or '.join(homes)}?" if homes else nearest(key, known)


def _keys_by_kind(section: str, plugins: Plugins) -> dict[str, Iterable[str]]:
    """The keys of each kind of a section; a kind that does not load is no matter here."""
    found: dict[str, Iterable[str]] = {}
    with suppress(ConfigError):
        for kind in kinds_of(section, plugins):
            found[kind] = entries(section, declaration(section, kind, plugins))
    return found


def _homes(key: str, plugins: Plugins) -> list[str]:
    """`section.key` of every section that declares the key, by its first kind at least."""
    kinds = {section: KINDS[section].default if section in KINDS else "" for section in SECTIONS}
    known = {section: entries(section, declaration(section, kind, plugins)) for section, kind in kinds.items()}
    return [f"{section}.{key}" for section in SECTIONS if key in known[section]]


def _override(table: dict[str, Any], text: str) -> str:
    """Puts the value of a --set into the table; returns `section.key`."""
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"--set {quoted(text)} is not section.key=value, for example --set train.steps=200")
    try:
        parsed = _value(value)
    except (ValueError, RecursionError):
        raise ConfigError(f"--set {quoted(text)} holds no single TOML value: one --set for each key") from None
    values = table.setdefault(section, {})
    if isinstance(values, dict):  # else the file is wrong, and will be told
        values[key] = parsed
    return f"{section}.{key}"


def _read_file(path: str) -> dict[str, Any]:
    """The table in a TOML file. Raises ConfigError."""
    if not path:
        raise ConfigError(f"CONFIG is empty{_A_FILE}")
    content = b""
    try:
        content = read_whole(Path(path), _FILE_BYTES)
        return _parse(content.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}{_instead(Path(path))}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path} is not TOML: line {line} is not UTF-8 text: save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {error}{_line_of(str(error), content.decode())}") from None


def _instead(path: Path) -> str:
    """What follows a configuration that cannot be read: the file that was meant, or what one is."""
    if (path / "config.toml").is_file():
        return f"; did you mean {path / 'config.toml'}?"
    if not path.exists() and path.parent.is_dir():
        near = difflib.get_close_matches(path.name, [found.name for found in path.parent.glob("*.toml")], n=1)
        if near:
            return f"; did you mean {path.parent / near[0]}?"
    return _A_FILE


def _line_of(error: str, text: str) -> str:
    """The line that one of tomllib's errors names."""
    found = re.search(r"at line (\d+)", error)
    line = text.split("\n")[int(found[1]) - 1] if found else ""
    return f": {line.strip()[:80]}" if found else ""


def _written_by(path: Path) -> str:
    """Which version wrote the config.toml of a run folder, where it was another one."""
    if path.name != "config.toml":
        return ""
    try:
        environment = json.loads(read_whole(path.parent / "environment.json", _FILE_BYTES))
        version = environment["fingerprint"]["mlm_mpi"]
    except (OSError, ValueError, KeyError, TypeError):  # nobody knows
        return ""
    return "" if version == __version__ else f" ({path} was written by mlm-mpi {version}, this is {__version__})"


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
