"""The manual of all keys, printed from their declarations: as text for a terminal, as Markdown for docs/."""

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass
from typing import Any, get_args, get_origin

from mlm_mpi.config.entries import Entry, allowed, entries, toml_value, type_name
from mlm_mpi.config.sections import KINDS, SECTIONS, declaration, kinds_of
from mlm_mpi.errors import ConfigError, nearest
from mlm_mpi.plug import Plugins

_WIDTH = 110
_COLUMN = 32  # where sentences begin


@dataclass(frozen=True)
class Declared:
    """A section as one class declares it: `kind` is "" where there is only one."""

    section: str
    kind: str
    says: str
    entries: dict[str, Entry]

    @property
    def title(self) -> str:
        return f"[{self.section}]" + (f"  {self.condition}" if self.kind else "")

    @property
    def condition(self) -> str:
        """For which kind it holds, as it is written in a file."""
        return f'{KINDS[self.section].key} = "{self.kind}"' if self.kind else ""


def declared(plugins: Plugins, sections: Iterable[str] = SECTIONS) -> Iterator[Declared]:
    """Every section of every kind, in the order given; the default kind is the first of its section."""
    for section in sections:
        default = KINDS[section].default if section in KINDS else ""
        kinds = kinds_of(section, plugins) if section in KINDS else [""]
        for kind in sorted(kinds, key=lambda kind: (kind != default, kind)):
            settings = declaration(section, kind, plugins)
            says = " ".join((settings.__doc__ or "").split("\n\n")[0].split())
            yield Declared(section, kind, says, entries(section, settings))


def overview(plugins: Plugins, only: str = "") -> str:
    """All sections, or one, with the default and the sentence of each key."""
    blocks = []
    for found in declared(plugins):
        if only in ("", found.section):
            lines = [found.title, *textwrap.wrap(found.says, _WIDTH)]
            for entry in found.entries.values():
                head = f"  {entry.name} = {_default(entry)}"
                lines += textwrap.wrap(
                    f"{head:<{_COLUMN - 1}} {entry.about.says}", _WIDTH, subsequent_indent=" " * _COLUMN,
                    drop_whitespace=True, break_long_words=False,
                )  # fmt: skip
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def explain(name: str, plugins: Plugins) -> str:
    """One key as `section.key`, of every kind that has it, or a whole section. Raises ConfigError."""
    section, _, key = name.partition(".")
    if section not in SECTIONS:
        raise ConfigError(f"unknown section [{section}]{nearest(section, SECTIONS)}")
    if not key:
        return overview(plugins, section)
    sections = [found for found in declared(plugins) if found.section == section]
    if section in KINDS and key == KINDS[section].key:
        return _about(sections[0].entries[key], plugins)
    texts: dict[str, list[str]] = {}
    for found in sections:
        if key in found.entries:
            texts.setdefault(_about(found.entries[key], plugins), []).append(found.condition)
    if not texts:
        raise ConfigError(
            f"unknown key {section}.{key}{nearest(key, {k for found in sections for k in found.entries})}"
        )
    whole = len(texts) == 1 and len(next(iter(texts.values()))) == len(sections)
    return "\n\n".join(text if whole else f"{text}\n  where  {' or '.join(kinds)}" for text, kinds in texts.items())


def completions(prefix: str, ending: str, plugins: Plugins) -> dict[str, str]:
    """What may follow: `section.key` with `ending`, and its sentence; behind a `=` the values of a key that has few."""
    name, equals, _ = prefix.partition("=")
    section, dot, _ = name.partition(".")
    wanted = [known for known in SECTIONS if known == section or (not dot and known.startswith(section))]
    found = {}
    for entry in (entry for one in declared(plugins, wanted) for entry in one.entries.values()):
        if not equals:
            found[entry.full + ending] = entry.about.says
        elif entry.full == name:
            found |= dict.fromkeys((f"{name}={value}" for value in _listed(entry, plugins)), "")
    return found


def _listed(entry: Entry, plugins: Plugins) -> list[str]:
    """The values of a key that has a few."""
    if entry.type is bool:
        return ["true", "false"]
    if get_origin(entry.type) is tuple:
        return []
    return _names(entry, plugins) if entry.about.room else list(get_args(entry.type))


def _about(entry: Entry, plugins: Plugins) -> str:
    facts = {"type": type_name(entry.type), "bounds": allowed(entry.about), "unit": entry.about.unit}
    if entry.about.room:
        facts["one of"] = ", ".join(_names(entry, plugins))
    lines = [f"{entry.full} = {_default(entry)}"]
    lines += textwrap.wrap(entry.about.says, _WIDTH, initial_indent="  ", subsequent_indent="  ")
    lines += [f"  {name:<6} {fact}" for name, fact in facts.items() if fact]
    return "\n".join(lines)


def markdown(plugins: Plugins) -> str:
    """docs/configuration.md."""
    blocks = [
        "# Configuration\n\n"
        "All keys of a run, as `mlm-mpi config --markdown` prints them from the code: do not edit this file.\n"
        "A run reads a TOML file, where `rows = 8` stands below `[train]`, and then `--set train.rows=8`, which wins.\n"
        "`mlm-mpi config train.rows` explains one key, and `mlm-mpi config --plugins DIR` shows your own kinds too."
    ]
    for found in declared(plugins):
        lines = [f"## [{found.section}]" + (f" with `{found.condition}`" if found.kind else ""), "", found.says, ""]
        lines += ["| key | default | value | meaning |", "|---|---|---|---|"]
        for entry in found.entries.values():
            cells = f"`{entry.name}`", f"`{_default(entry)}`", _value(entry, plugins), entry.about.says
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _value(entry: Entry, plugins: Plugins) -> str:
    if entry.about.room:
        return ", ".join(f"`{name}`" for name in _names(entry, plugins))
    return ", ".join(text for text in (type_name(entry.type), allowed(entry.about), entry.about.unit) if text)


def _names(entry: Entry, plugins: Plugins) -> list[str]:
    kinds: Any = KINDS.get(entry.section)
    if kinds is not None and kinds.key == entry.name:
        return list(kinds_of(entry.section, plugins))
    return plugins.kinds(entry.about.room)


def _default(entry: Entry) -> str:
    return "(must be set)" if entry.default is MISSING else toml_value(entry.default)
