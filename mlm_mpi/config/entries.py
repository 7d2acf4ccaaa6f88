"""The keys of a section as their declarations say: type and bounds, read, refused and put into words."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mlm_mpi.config.keys import META, Key
from mlm_mpi.errors import ConfigError


@dataclass(frozen=True)
class Entry:
    """A key of a section: `type` is int, float, bool, str or a Literal of strings; `default` may be MISSING."""

    section: str
    name: str
    type: Any
    default: Any
    about: Key

    @property
    def full(self) -> str:
        return f"{self.section}.{self.name}"

    def read(self, value: Any, source: str) -> Any:
        """The value as this key's type and within its bounds. Raises ConfigError."""
        if self.type in (int, float) and type(value) is int:
            if not -(1 << 63) <= value < 1 << 64:
                raise ConfigError(f"{source}: {self.full} = {quoted(value)} must fit into 64 bits")
            value = self.type(value)
        if get_origin(self.type) is Literal:
            if value not in get_args(self.type):
                raise ConfigError(f"{source}: {self.full} = {quoted(value)} must be {type_name(self.type)}")
        elif type(value) is not self.type:
            raise ConfigError(
                f"{source}: {self.full} = {quoted(value)}: expected {type_name(self.type)}, got {word_of(value)}"
            )
        self._check_bounds(value)
        return value

    def _check_bounds(self, value: Any) -> None:
        if isinstance(value, str | bool):
            return
        if not math.isfinite(value):
            raise ConfigError(f"{self.full} = {value} must be a finite number")
        about = self.about
        within = (
            (about.least is None or value >= about.least)
            and (about.most is None or value <= about.most)
            and (about.above is None or value > about.above)
            and (about.below is None or value < about.below)
        )
        if not within:
            remedy = f": {about.remedy}" if about.remedy else ""
            raise ConfigError(f"{self.full} = {value} must {bounds(about)}{remedy}")


def entries(section: str, settings: Any) -> dict[str, Entry]:
    """The keys of a section by name. Raises ConfigError where one is not declared as keys.py says."""
    found = {}
    try:
        types = get_type_hints(settings)
    except NameError as error:
        raise ConfigError(f"a type in {settings.__module__}.{settings.__name__} is unknown: {error}: mend it") from None
    for field in dataclasses.fields(settings):
        kind, where = types[field.name], f"{settings.__module__}.{settings.__name__}.{field.name}"
        if META not in field.metadata:
            raise ConfigError(f"{where} is not made by key(…) of mlm_mpi.config.keys: declare it so")
        literal = get_origin(kind) is Literal and all(isinstance(option, str) for option in get_args(kind))
        if kind not in (int, float, bool, str) and not literal:
            raise ConfigError(f"{where} is a {kind}: make it int, float, bool, str or a Literal of strings")
        found[field.name] = Entry(section, field.name, kind, field.default, field.metadata[META])
    return found


def bounds(about: Key) -> str:
    """What a value must do, such as "be at least 1"; "" where every number will do."""
    low = about.least if about.least is not None else about.above
    high = about.most if about.most is not None else about.below
    if low is not None and high is not None:
        opened, closed = "(" if about.least is None else "[", ")" if about.most is None else "]"
        return f"be in {opened}{low:g}, {high:g}{closed}"
    if about.least is not None:
        return "not be negative" if about.least == 0 else f"be at least {low:g}"
    if about.above is not None:
        return "be positive" if about.above == 0 else f"be above {low:g}"
    if high is None:
        return ""
    return f"be at most {high:g}" if about.most is not None else f"be below {high:g}"


_WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a string", list: "an array", dict: "a table",
}  # fmt: skip


def type_name(kind: Any) -> str:
    """A type in words, such as "a whole number"."""
    if get_origin(kind) is not Literal:
        return _WORDS[kind]
    *before, last = (f'"{option}"' for option in get_args(kind))
    return f"{', '.join(before)} or {last}" if before else last


def word_of(value: Any) -> str:
    """The type of a TOML value in words."""
    return _WORDS.get(type(value), f"a {type(value).__name__}")


def quoted(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
