"""JSON lines: every line is an object with a document in the field that `--field` names. Empty lines are none.

A line without the field, or with null there, says that there is no text: it is skipped and counted. A number, a list
or an object says that the text is elsewhere, and is refused: skipping would lose it unseen, and how to make text of it
only its owner knows.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial

from mlm_mpi.data.decoding import TO_LINES, Content, NoText
from mlm_mpi.errors import DataError

SUFFIXES = (".jsonl", ".ndjson")
SHARED = True  # a file may hold a whole corpus
_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def documents(content: Content) -> Iterator[Callable[[], str | NoText]]:
    """One document a line, parsed by the rank that keeps it."""
    if _is_one_document(content.head()):
        raise DataError(f"{content.path} is one JSON document: {TO_LINES}")
    for number, line in enumerate(content.lines(), 1):
        if line.strip():
            yield partial(_text, line, content.field, f"{content.path}:{number}")


def _is_one_document(head: str) -> bool:
    """Whether it begins with an array, or with an object that goes on over several lines."""
    first, end, _ = head.lstrip().partition("\n")
    return first.startswith("[") or bool(end and first.startswith("{") and not first.rstrip().endswith("}"))


def _text(line: str, field: str, where: str) -> str | NoText:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}): mend or remove the line") from None
    if not isinstance(record, dict):
        kind = _KINDS.get(type(record), "a text" if isinstance(record, str) else "null")
        raise DataError(f"{where} is {kind}, not an object with a field {field!r}: {TO_LINES}")
    value = record.get(field)
    if value is None:
        return NoText(where, ", ".join(sorted(record))[:200], field in record)
    if not isinstance(value, str):
        raise DataError(
            f"{where} has {_KINDS[type(value)]} in field {field!r}, not a text: mend or remove the line, or choose "
            f"another field of {', '.join(sorted(record))[:200]!r} with --field"
        )
    return value
