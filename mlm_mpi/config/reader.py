"""TOML and `--set` -> the sections of a run, each value of its type and within its bounds.

[numerics] is read first and alone: NumPy, and every room that loads it, is imported only when it is known.
"""

import difflib
import tomllib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from mlm_mpi.config import rules
from mlm_mpi.config.entries import Entry, entries, quoted, word_of
from mlm_mpi.config.sections import KINDS, SECTIONS, Config, declaration, kinds_of
from mlm_mpi.errors import ConfigError
from mlm_mpi.files import read_whole
from mlm_mpi.plug import Plugins

_FILE_BYTES = 1 << 14  # ten times a file with every key
_LINE = 4500  # a path and its key; tomllib takes 31 s for a key of 32,000 parts, quadratic in them

Pin = Callable[[Any], None]


def load(
    path: str | Path | None, overrides: Iterable[str] = (), plugins: Plugins | None = None, pin: Pin | None = None
) -> Config:
    """The configuration in a TOML file with `section.key=value` overrides, checked.

    `pin`: is called with [numerics] before any room that loads NumPy is imported; see `prepare_environment`.
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
    return from_table(table, str(path) if path is not None else "the defaults", plugins, pin)


def from_table(table: dict[str, Any], source: str, plugins: Plugins | None = None, pin: Pin | None = None) -> Config:
    """The same from nested dictionaries (a run folder's saved configuration)."""
    plugins = plugins or Plugins()
    for section, values in table.items():
        if section not in SECTIONS:
            raise ConfigError(f"{source}: unknown section [{section}]{nearest(section, SECTIONS)}")
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: [{section}] is a section, {values!r} is a value: write [{section}] key = …")

    def read(section: str) -> Any:
        return _section(section, table.get(section, {}), source, plugins)

    numerics = read("numerics")
    if pin is not None:
        pin(numerics)
    sections = {section: numerics if section == "numerics" else read(section) for section in SECTIONS}
    config = Config(**sections)
    rules.check(config)
    return config


def _section(section: str, values: dict[str, Any], source: str, plugins: Plugins) -> Any:
    kind = _kind(section, values, source)
    settings = declaration(section, kind, plugins)
    known = entries(section, settings)
    if section in KINDS:
        if KINDS[section].key not in known:
            raise ConfigError(f"{KINDS[section].room}/{kind}.py: Settings has no key {KINDS[section].key}: declare it")
        values = values | {KINDS[section].key: kind}
    for key in values:
        if key not in known:
            raise ConfigError(f"{source}: unknown key {section}.{key}{_who_knows(section, key, kind, known, plugins)}")
    given = {key: _value_of(entry, values, source) for key, entry in known.items()}
    for key, entry in known.items():
        if entry.about.room:
            plugins.find(entry.about.room, given[key], entry.full)
    made = settings(**given)
    return made.resolved() if hasattr(made, "resolved") else made


def _kind(section: str, values: dict[str, Any], source: str) -> str:
    """Which kind of a section is meant; "" where it has none."""
    if section not in KINDS:
        return ""
    kinds = KINDS[section]
    kind = values.get(kinds.key, kinds.default)
    if not isinstance(kind, str):
        raise ConfigError(f"{source}: {section}.{kinds.key} = {quoted(kind)}: expected a string, got {word_of(kind)}")
    return kind


def _value_of(entry: Entry, values: dict[str, Any], source: str) -> Any:
    value = values.get(entry.name, entry.default)
    if value is MISSING:
        raise ConfigError(f"{source}: {entry.full} has no default: set it")
    return entry.read(value, source)


def _who_knows(section: str, key: str, kind: str, known: Iterable[str], plugins: Plugins) -> str:
    """What follows "unknown key": the kinds that know it, else the nearest key."""
    others = []
    if section in KINDS:
        with suppress(ConfigError):  # a kind that does not load is no matter here
            for other in kinds_of(section, plugins):
                if key in entries(section, declaration(section, other, plugins)):
                    others.append(f'"{other}"')
    if not others:
        return nearest(key, known)
    who = f"{', '.join(others)} know{'s' if len(others) == 1 else ''} it"
    return f' of {section}.{KINDS[section].key} = "{kind}"; {who}'


def nearest(name: str, known: Iterable[str]) -> str:
    """What follows an unknown name: the nearest one that is known, else all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"


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
