"""How a room declares its section of the configuration: a frozen dataclass whose fields are made by `key`.

    @dataclass(frozen=True)
    class Settings:
        '''One sentence on the section.'''
        rows: int = key(8, says="A micro-batch holds this many windows of text.", least=1)

        def resolved(self) -> "Settings": ...  # may be left out: rules among these keys, defaults that need another

Types: int, float, bool, str, Literal["one", "other"], tuple[float, ...] or tuple[str, ...]. The reader checks type and
bounds (of an array those of each element), the reference prints them.
"""

from dataclasses import MISSING, dataclass, field
from typing import Any

META = "key"  # where a dataclass field holds its Key


@dataclass(frozen=True)
class Key:
    """What a key says of itself. Bounds that are None do not hold; `least` and `most` are allowed values."""

    says: str
    unit: str = ""
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    remedy: str = ""  # what follows a refusal, for example why the bound is there
    room: str = ""  # the value is the name of a kind, a file of this room (plug.py)


def key(default: Any = MISSING, says: str = "", **about: Any) -> Any:
    """A field of a section, given by name: its default (none: it must be set), one sentence, what else `Key` knows."""
    return field(default=default, kw_only=True, metadata={META: Key(says, **about)})
