"""A text file is one document. Every file that no other format takes is read as one."""

import json
import re
from collections.abc import Iterator

from mlm_mpi.data.decoding import Content, plain_name, to_lines
from mlm_mpi.errors import DataError

SUFFIXES = (".txt",)
_HEAD = 1 << 16  # characters
_JSON = re.compile(r'\s*(?:\[\s*)?\{\s*"(?:[^"\\\n]|\\.)*"\s*:|\s*\[\s*"(?:[^"\\\n]|\\.)*"\s*[,\]]')


def documents(content: Content) -> Iterator[str]:
    """The file as a whole. JSON is refused: its braces are nothing that a model should learn."""
    text = content.text()
    if _JSON.match(text[:_HEAD]) or plain_name(content.path).endswith(".json"):
        raise _json_in(content, text[:_HEAD])
    yield text


def _json_in(content: Content, head: str) -> DataError:
    try:
        is_lines = isinstance(json.loads(head.lstrip().partition("\n")[0]), dict)
    except (ValueError, RecursionError):
        is_lines = False
    if is_lines:
        return DataError(
            f"{content.path} holds JSON lines, not text: rename it to end in .jsonl, or in .jsonl.gz and the like"
        )
    return DataError(f"{content.path} is one JSON document: {to_lines(content.field)}")
