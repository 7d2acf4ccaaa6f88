"""JSON lines: every line is an object with a document in the field that `--field` names. Empty lines are none.

A line without the field, or with null there, says that there is no text: it is skipped and counted. A number, a list
or an object says that the text is elsewhere, and is refused: skipping would lose it unseen, and how to make text of it
only its owner knows.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from mlm_mpi.data.decoding import Content, NoText, to_lines
from mlm_mpi.errors import DataError

SUFFIXES = (".jsonl", ".ndjson")
SHARED = True  # a file may hold a whole corpus
_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def documents(content: Content) -> Iterator[Callable[[], str | NoText]]:
    """One document a line, parsed by the rank that keeps it."""
    for where, line in lines(content):
        yield partial(_text, line, content.field, where)


def lines(content: Content) -> Iterator[tuple[str, str]]:
    """(place, line) of those that are not empty. Raises DataError for a file that is one JSON document."""
    if _is_one_document(content.head()):
        raise DataError(f"{content.path} is one JSON document: {to_lines(content.field)}")
    for number, line in enumerate(content.lines(), 1):
        if line.strip():
            yield f"{content.path}:{number}", line


def record(line: str, field: str, where: str) -> dict[str, Any]:
    """The object in a line. `field`: what is looked for in it. Raises DataError."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}): mend or remove the line") from None
    if not isinstance(found, dict):
        kind = _KINDS.get(type(found), "a text" if isinstance(found, str) else "null")
        raise DataError(f"{where} is {kind}, not an object with a field {field!r}: {to_lines(field)}")
    return found


def _is_one_document(head: str) -> bool:
    """Whether it begins with an array, or with an object that goes on over several lines."""
    first, end, _ = head.lstrip().partition("\n")
    return first.startswith("[") or bool(end and first.startswith("{") and not first.rstrip().endswith("}"))


def _text(line: str, field: str, where: str) -> str | NoText:
    found = record(line, field, where)
    value = found.get(field)
    if value is None:
        return NoText(where, ", ".join(sorted(found))[:200], field in found)
    if not isinstance(value, str):
        raise DataError(
            f"{where} has {_KINDS[type(value)]} in field {field!r}, not a text: mend or remove the line, or choose "
            f"another field of {', '.join(sorted(found))[:200]!r} with --field"
        )
    return value
