"""Rows of a user's table, one after another with their place: CSV, TSV or JSON lines, compressed or not.

    .csv      RFC 4180: fields with commas, newlines or doubled quotes stand in quotes
    .tsv      a row a line, fields between tabs; quotes are plain characters, as in GLUE's files
    .jsonl    an object a line (.ndjson too); numbers, true and false become their JSON text

`prepare --label` and `--target` read these, and so does who predicts labels of new texts. Empty lines are no rows. Two
files whose lines belong together (`aligned`) are a table of two columns.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import ClassVar

from mlm_mpi.data.decoding import Content, Told, check_repaired, plain_name
from mlm_mpi.data.formats import jsonl
from mlm_mpi.data.text import clean
from mlm_mpi.errors import ConfigError, DataError, nearest

LONGEST_LABEL = 200  # characters
_LONGEST_FIELD = 1 << 24  # characters of CSV; a quote that is never closed would swallow the file
NO_LABEL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_NOTHING = clean("")
_MARKED = "\udfff"  # what is not of its encoding is decoded to (`text.MARK`)
_MOST_NAMES = 200  # characters of a list of columns
_LOOKED_AT = 1000  # JSON lines: a field that none of them has is taken for a name that is wrong

Values = tuple[str, list[str | None]]  # place, and what stands in each of the columns asked for


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read.

    `pair`: a second text; `target`: one that is to be made of the text; `split`: the side that a row is on; `source`:
    what may not stand on two sides. `has_header`: otherwise columns are called "1", "2", ….
    """

    text: str = "text"
    pair: str | None = None
    label: str | None = None
    split: str | None = None
    source: str | None = None
    has_header: bool = True
    target: str | None = None

    def wanted(self) -> dict[str, str]:
        """Option -> column, of those that are read."""
        given = {
            "--text": self.text, "--pair": self.pair, "--target": self.target, "--label": self.label,
            "--split": self.split, "--source": self.source,
        }  # fmt: skip
        return {option: column for option, column in given.items() if column is not None}

    def check(self) -> None:
        """Raises ConfigError for a column that no table has."""
        for option, column in self.wanted().items():
            if not column:
                raise ConfigError(f"{option} '' names no column: give one")
            if not self.has_header and not re.fullmatch("[1-9][0-9]{0,5}", column):
                raise ConfigError(
                    f"{option} {column!r} is no number of a column, and with --no-header columns have no names: "
                    f"give {option} 1, 2, …"
                )
        texts = [(option, column) for option, column in self.wanted().items() if option not in ("--split", "--source")]
        for (option, column), (other, same) in pairwise(sorted(texts, key=lambda pair: pair[1])):
            if column == same:
                raise ConfigError(f"{option} and {other} are both column {column!r}: name another for one of them")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table. Texts are cleaned (`text.clean`), blanks at their ends are gone; `text` may be empty.

    `place`: file:line. `second`: "" without a pair or target. `label`, `split`, `source`: None where the row has none.
    `replaced`, `controls`: what cleaning found.
    """

    place: str
    text: str
    second: str
    label: str | None
    split: str | None
    source: str | None
    replaced: int
    controls: int

    words: ClassVar[tuple[str, ...]] = ()
    answers: ClassVar[tuple[()]] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The label, if there is one."""
        return () if self.label is None else (self.label,)


def _unheard(size: int) -> None:
    """Nobody wants to know."""


def read(path: Path, columns: Columns, encoding: str = "utf-8", told: Told = _unheard) -> Iterator[Row]:
    """The rows of a file in their order, in bounded memory; `told` hears of bytes that were read.

    Raises DataError in one line with the place: no such column, a row of another width, no table, no rows, not text,
    a label too long or with control characters. An encoding that is wrong is known at the end only.
    """
    suffix = Path(plain_name(path)).suffix.lower()
    if suffix not in _READERS:
        raise DataError(f"{path} is no table by its name: rename it to end in .csv, .tsv or .jsonl, or leave it out")
    rows = replaced = characters = 0
    for place, values in _READERS[suffix](Content(path, encoding, columns.text, told), columns):
        row = _row(place, dict(zip(columns.wanted(), values, strict=True)))
        rows, replaced = rows + 1, replaced + row.replaced
        characters += len(row.text) + len(row.second)
        yield row
    check_repaired(path, replaced, characters)
    if not rows:
        raise DataError(f"{path} has no rows: fill it, or leave it out")


def aligned(source: Path, target: Path, encoding: str = "utf-8", told: Told = _unheard) -> Iterator[Row]:
    """A row for each line of a file, and for the line of the same number of another, which is to be made of it.

    Raises DataError: the first line that has no partner, and as `read` does.
    """
    lines = [Content(path, encoding, told=told).lines() for path in (source, target)]
    number, replaced, characters = 0, [0, 0], [0, 0]
    for number, (text, other) in enumerate(zip_longest(*lines), 1):
        if text is None or other is None:
            longer, shorter = (target, source) if text is None else (source, target)
            raise DataError(
                f"{longer}:{number} has no partner, {shorter} ends with line {number - 1:,}: mend the files, in which "
                "lines of one number belong together"
            )
        row = _row(f"{source}:{number}", {"--text": text, "--target": other})
        for place, raw in enumerate((text, other)):
            replaced[place] += raw.count(_MARKED)
            characters[place] += len(raw)
        yield row
    for place, path in enumerate((source, target)):
        check_repaired(path, replaced[place], characters[place])
    if not number:
        raise DataError(f"{source} has no lines: fill it, or leave it out")


def lines(path: Path, encoding: str = "utf-8", told: Told = _unheard) -> Iterator[Row]:
    """A row for each line of a file of plain text, empty ones too. Raises DataError as `read` does."""
    number = replaced = characters = 0
    for number, line in enumerate(Content(path, encoding, told=told).lines(), 1):
        row = _row(f"{path}:{number}", {"--text": line})
        replaced, characters = replaced + row.replaced, characters + len(row.text)
        yield row
    check_repaired(path, replaced, characters)
    if not number:
        raise DataError(f"{path} has no lines: fill it, or leave it out")


def is_lines(path: Path) -> bool:
    """Whether a file is plain text by its name, compressed or not."""
    return Path(plain_name(path)).suffix.lower() == ".txt"


def _row(place: str, values: dict[str, str | None]) -> Row:
    text = clean(values["--text"] or "")
    second = clean(other) if (other := values.get("--pair") or values.get("--target")) else _NOTHING
    source, label = values.get("--source"), cleaned_label(values.get("--label"), place)
    return Row(
        place, text.text.strip(), second.text.strip(), label, values.get("--split"),
        None if source is None else clean(source).text.strip() or None, text.replaced + second.replaced,
        text.controls + second.controls,
    )  # fmt: skip


def cleaned_label(value: str | None, place: str) -> str | None:
    """A label as it is stored, None for an empty one. Raises DataError."""
    raw = (value or "").strip()
    if NO_LABEL.search(raw):
        raise DataError(f"{place} has control characters in its label {raw[:LONGEST_LABEL]!r}: mend it")
    cleaned = clean(raw)
    if cleaned.replaced:
        raise DataError(f"{place} has a label that is not of its encoding: name that with --encoding, or mend it")
    label = cleaned.text.strip()
    if len(label) > LONGEST_LABEL:
        raise DataError(
            f"{place} has a label of {len(label):,} characters, at most {LONGEST_LABEL} are read: is --label the right "
            "column?"
        )
    return label or None


def _csv(content: Content, columns: Columns) -> Iterator[Values]:
    return _separated(content.path, _quoted_fields(content), columns)


def _tsv(content: Content, columns: Columns) -> Iterator[Values]:
    lines = enumerate((line.rstrip("\r\n") for line in content.lines()), 1)
    return _separated(content.path, ((number, line.split("\t")) for number, line in lines if line), columns)


def _quoted_fields(content: Content) -> Iterator[tuple[int, list[str]]]:
    """(line in which it begins, fields) of each row."""
    csv.field_size_limit(_LONGEST_FIELD)  # the module has no other way to say so
    reader = csv.reader(content.lines(), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{content.path}:{line} is not CSV ({error}): put fields with commas, quotes or newlines in quotes, "
                "and double the quotes in them"
            ) from None
        if fields:
            yield line, fields


def _separated(path: Path, rows: Iterator[tuple[int, list[str]]], columns: Columns) -> Iterator[Values]:
    """The columns asked for, of rows of one width."""
    number, first = next(rows, (0, []))
    if not first:
        return
    header = [clean(name).text.strip() for name in first]
    if not columns.has_header:
        header, rows = [str(place + 1) for place in range(len(first))], chain([(number, first)], rows)
    _check_has(path, header, columns)
    places = [header.index(name) for name in columns.wanted().values()]
    for number, fields in rows:
        if len(fields) != len(header):
            raise DataError(
                f"{path}:{number} has {len(fields)} fields, the first row has {len(header)}: mend or remove it"
            )
        yield f"{path}:{number}", [fields[place] for place in places]


def _check_has(path: Path, header: list[str], columns: Columns) -> None:
    """Raises DataError for a column that is missing or there twice."""
    for option, name in columns.wanted().items():
        if name not in header:
            raise missing(path, option, name, header, "column")
        if header.count(name) > 1:
            raise DataError(f"{path} has {header.count(name)} columns {name!r} ({option}): rename all but one")


def missing(path: Path | str, option: str, name: str, header: list[str], what: str = "field") -> DataError:
    """What to raise where `header` has no field, or column, `name`, which `option` gave."""
    near = nearest(name, header, every=False) or (
        "; without a header, give --no-header and numbers" if name.isdecimal() and header[:1] != ["1"] else ""
    )
    return DataError(
        f"{path} has no {what} {name!r}, it has {', '.join(header)[:_MOST_NAMES]!r}{near or ''}: name one with {option}"
    )


def _json_lines(content: Content, columns: Columns) -> Iterator[Values]:
    """A field that a line lacks is null there; one that no line has, or none of the first so many, is missing. Until
    each field has come up lines are held back, so that who reads hears of it before the first."""
    if not columns.has_header:
        raise DataError(f"{content.path} holds JSON lines, whose fields have names: leave out --no-header")
    unseen, names = columns.wanted(), [*columns.wanted().values()]
    first: list[str] = []
    held: list[Values] = []
    for place, line in jsonl.lines(content):
        record = jsonl.record(line, columns.text, place)
        first = first or sorted(record)
        unseen = {option: name for option, name in unseen.items() if name not in record} if unseen else unseen
        held.append((place, [plain(record.get(name), name, place) for name in names]))
        if unseen and len(held) == _LOOKED_AT:
            break
        if not unseen:
            yield from held
            held.clear()
    for option, name in unseen.items() if first else ():
        raise missing(content.path, option, name, first)


def plain(value: object, name: str, place: str) -> str | None:
    """A value of JSON as text. Raises DataError for a list or an object."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):  # bool is an int
        return json.dumps(value)
    kind = "a list" if isinstance(value, list) else "an object"
    raise DataError(f"{place} has {kind} in field {name!r}: give a text or a number, or another column")


_READERS: dict[str, Callable[[Content, Columns], Iterator[Values]]] = {
    ".csv": _csv, ".tsv": _tsv, ".jsonl": _json_lines, ".ndjson": _json_lines,
}  # fmt: skip
