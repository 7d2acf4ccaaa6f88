"""JSON lines: every line is an object with a document in the field that `--field` names. Empty lines are none."""

import json
from collections.abc import Callable, Iterator
from functools import partial

from mlm_mpi.data.decoding import TO_LINES, Content
from mlm_mpi.errors import DataError

SUFFIXES = (".jsonl", ".ndjson")
SHARED = True  # a file may hold a whole corpus


def documents(content: Content) -> Iterator[Callable[[], str]]:
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


def _text(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}): mend or remove the line") from None
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str):
        keys = ", ".join(sorted(record)) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise DataError(f"{where} has no text in field {field!r}, it has {keys[:200]!r}: choose one with --field")
    return value
