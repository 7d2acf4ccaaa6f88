"""The keys of a section as their declarations say: type and bounds, read, refused and put into words."""

import dataclasses
import json
import math
import re
import sys
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from mlm_mpi.config.keys import META, Key
from mlm_mpi.errors import ConfigError

_ARRAYS = (tuple[float, ...], tuple[str, ...])


@dataclass(frozen=True)
class Entry:
    """A key of a section: `type` is int, float, bool, str, a Literal of strings, or a tuple of any number of floats or
    strings; `default` may be MISSING.
    """

    section: str
    name: str
    type: Any
    default: Any
    about: Key

    @property
    def full(self) -> str:
        return f"{self.section}.{self.name}"

    def read(self, value: Any, where: str = "") -> Any:
        """The value as this key's type and within its bounds; `where` it comes from begins a message.

        Raises ConfigError.
        """
        if get_origin(self.type) is tuple:
            return self._read_array(value, where)
        if self.type is float and type(value) is int:
            self._check_size(value, where)
            value = float(value)
        if get_origin(self.type) is Literal:
            if value not in get_args(self.type):
                self._refuse(value, where, f"must be {type_name(self.type)}{_meant(self.type, value)}")
        elif type(value) is not self.type:
            bound = f" ({allowed(self.about)})" if allowed(self.about) else ""
            wanted = f"must be {type_name(self.type)}{bound}, not {word_of(value)}"
            self._refuse(value, where, wanted + _meant(self.type, value))
        self._check_bounds(value, where)
        return value

    def _read_array(self, value: Any, where: str) -> tuple[Any, ...]:
        if type(value) not in (list, tuple):
            meant = f": write {toml_value([value])}" if type(value) is get_args(self.type)[0] else ""
            self._refuse(value, where, f"must be {type_name(self.type)}, not {word_of(value)}{meant}")
        one = dataclasses.replace(self, type=get_args(self.type)[0])
        return tuple(one.read(item, where) for item in value)

    def _check_bounds(self, value: Any, where: str) -> None:
        if isinstance(value, str | bool):
            return
        if isinstance(value, float) and not math.isfinite(value):
            self._refuse(value, where, "must be a finite number")
        about = self.about
        within = (
            (about.least is None or value >= about.least)
            and (about.most is None or value <= about.most)
            and (about.above is None or value > about.above)
            and (about.below is None or value < about.below)
        )
        if not within:
            self._refuse(value, where, f"must {bounds(about)}" + (f": {about.remedy}" if about.remedy else ""))
        self._check_size(value, where)

    def _check_size(self, value: float, where: str) -> None:
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:  # the numbers of a manifest
            self._refuse(value, where, "must fit into 64 bits")

    def _refuse(self, value: Any, where: str, why: str) -> NoReturn:
        raise ConfigError(f"{where}{self.full} = {quoted(value)} {why}")


def _meant(kind: Any, value: Any) -> str:
    """What follows a value of another type: how to write what was meant, where there is no doubt."""
    text = str(value).strip().lower()
    if kind is bool:
        meant = "true" if text in ("yes", "true", "on", "1") else "false" if text in ("no", "false", "off", "0") else ""
    elif kind is str:  # quotes that a shell leaves are right in a file too
        meant = f"'{toml_value(str(value))}'" if type(value) in (int, float) else ""
    elif get_origin(kind) is Literal:
        meant = toml_value(text) if text in get_args(kind) else ""
    else:
        number = text.replace(",", "").removesuffix(".0")
        meant = number if re.fullmatch(r"-?[0-9]+" if kind is int else r"-?[0-9.]+(e-?[0-9]+)?", number) else ""
    return f": write {meant}" if meant else ""


def entries(section: str, settings: Any) -> dict[str, Entry]:
    """The keys of a section by name. Raises ConfigError where one is not declared as keys.py says."""
    found = {}
    place = f"{getattr(sys.modules[settings.__module__], '__file__', settings.__module__)}: {settings.__name__}"
    try:
        types = get_type_hints(settings)
    except NameError as error:
        raise ConfigError(f"{place} has an unknown type: {error}: mend it") from None
    for field in dataclasses.fields(settings):
        kind, where = types[field.name], f"{place}.{field.name}"
        if META not in field.metadata:
            raise ConfigError(f"{where} is not made by key(…) of mlm_mpi.config.keys: declare it so")
        literal = get_origin(kind) is Literal and all(isinstance(option, str) for option in get_args(kind))
        if kind not in (int, float, bool, str, *_ARRAYS) and not literal:
            raise ConfigError(
                f"{where} is a {getattr(kind, '__name__', kind)}: make it int, float, bool, str or a Literal of strings"
                ", or a tuple of any number of floats or strings"
            )
        found[field.name] = Entry(section, field.name, kind, field.default, field.metadata[META])
    return found


def bounds(about: Key) -> str:
    """What a value must do, such as "be at least 1"; "" where every number will do."""
    low = about.least if about.least is not None else about.above
    high = about.most if about.most is not None else about.below
    if low is not None and high is not None:
        opened, closed = "(" if about.least is None else "[", ")" if about.most is None else "]"
        return f"be in {opened}{_number(low)}, {_number(high)}{closed}"
    if about.least is not None:
        return "not be negative" if about.least == 0 else f"be at least {_number(low)}"
    if about.above is not None:
        return "be positive" if about.above == 0 else f"be above {_number(low)}"
    if high is None:
        return ""
    return f"be at most {_number(high)}" if about.most is not None else f"be below {_number(high)}"


def allowed(about: Key) -> str:
    """The same without its verb, such as "at least 1"."""
    return bounds(about).removeprefix("be ").replace("not be negative", "not negative")


def _number(value: float | None) -> str:
    return f"{value:g}" if value is None or value != int(value) or abs(value) < 1e6 else f"{int(value)}"


_WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a string", list: "an array", dict: "a table",
}  # fmt: skip


def type_name(kind: Any) -> str:
    """A type in words, such as "a whole number"."""
    if get_origin(kind) is tuple:
        return f"an array of {_WORDS[get_args(kind)[0]].removeprefix('a ')}s"
    if get_origin(kind) is not Literal:
        return _WORDS[kind]
    *before, last = (f'"{option}"' for option in get_args(kind))
    return f"{', '.join(before)} or {last}" if before else last


def word_of(value: Any) -> str:
    """The type of a TOML value in words."""
    return _WORDS.get(type(value), f"a {type(value).__name__}")


def quoted(value: Any) -> str:
    """A value for a message as a file would have it, cut where it is long."""
    text = toml_value(value) if isinstance(value, str | int | list | dict) else str(value)
    return text if len(text) <= 80 else text[:79] + "…"


def toml_value(value: Any) -> str:
    """JSON's strings, numbers and booleans are TOML too, but for a DEL, which TOML does not take as it is."""
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")
