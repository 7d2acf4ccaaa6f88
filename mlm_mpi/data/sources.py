"""Where documents come from: text files, folders, globs, JSON lines, and Python's own documentation.

A list of sources is a pure function of the inputs, and so is the number of a document in its source.
Ranks share the work by these numbers: a file as a whole, JSON lines line by line.
"""

import ast
import glob
import gzip
import inspect
import json
import sysconfig
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from mlm_mpi.data.text import decode
from mlm_mpi.errors import DataError

# No prose of the library's users there, or not the same on every machine.
_SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "lib-dynload",
    "ensurepip", "pydoc_data", "turtledemo",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A file (or Python's topics) that holds one or more documents."""

    kind: Literal["text", "jsonl", "docstrings", "topics"]
    path: Path


@dataclass(frozen=True)
class Raw:
    """A document as it was found: number in its source, content, damage already repaired."""

    number: int
    content: bytes | str
    replaced: int = 0


def find(inputs: Sequence[str], builtin: bool, out: Path) -> list[Source]:
    """The sources behind the command line, in a fixed order, each once.

    Files below `out` are no input, so that `prepare . --out corpus` can run twice.
    Raises DataError for an input that does not exist or matches nothing.
    """
    skipped = out.resolve()
    paths = [path for text in inputs for path in _expand(text)]
    files = [path for path in dict.fromkeys(paths) if not path.resolve().is_relative_to(skipped)]
    sources = [Source("jsonl" if _is_jsonl(path) else "text", path) for path in files]
    return sources + (_builtin() if builtin else [])


def read(source: Source, field: str, rank: int, size: int) -> Iterator[Raw]:
    """Documents of a source that rank `rank` of `size` is to read (JSON lines: every size-th).

    Raises DataError naming file (and line): unreadable, not JSON, or without the field.
    """
    try:
        if source.kind == "topics":
            yield from _topics()
        elif source.kind == "docstrings":
            yield from _docstrings(source.path)
        elif source.kind == "jsonl":
            yield from _lines(source.path, field, rank, size)
        else:
            with _open(source.path) as file:
                yield Raw(0, file.read())
    except (OSError, EOFError, zlib.error) as error:  # gzip raises all three for damaged files
        raise DataError(f"cannot read {source.path}: {getattr(error, 'strerror', None) or error}") from None


def is_shared(source: Source) -> bool:
    """Whether all ranks read parts of it; otherwise one rank reads it as a whole."""
    return source.kind == "jsonl"


def _expand(text: str) -> list[Path]:
    path = Path(text)
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if not _is_hidden(p.relative_to(path)))
        return [p for p in inside if p.is_file()]
    if path.exists():
        return [path]
    matches = sorted(glob.glob(text, recursive=True))  # noqa: PTH207  (Path.glob takes no absolute pattern)
    found = [match for match in matches if Path(match).exists()]
    if not found:
        raise DataError(f"no input at {text!r}: give a file, a folder, a glob in quotes, or --builtin")
    return [path for match in found for path in _expand(match)]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_jsonl(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else open(path, "rb")


def _lines(path: Path, field: str, rank: int, size: int) -> Iterator[Raw]:
    with _open(path) as file:
        for number, line in enumerate(file):
            if number % size != rank or not line.strip():
                continue
            text, replaced = decode(line)
            yield Raw(number, _field(text, field, f"{path}:{number + 1}"), replaced)


def _field(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}): mend or remove the line") from None
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str):
        keys = ", ".join(sorted(record)) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise DataError(f"{where} has no text in field {field!r}, it has: {keys[:200]}: choose one with --field")
    return value


def _builtin() -> list[Source]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = (path for path in root.rglob("*.py") if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts))
    # _sysconfigdata… and sitecustomize are of the machine, not of Python
    files = sorted(path for path in found if not path.name.startswith(("_sysconfigdata", "sitecustomize")))
    return [Source("topics", root / "pydoc_data" / "topics.py")] + [Source("docstrings", path) for path in files]


def _topics() -> Iterator[Raw]:
    from pydoc_data import topics

    for number, name in enumerate(sorted(topics.topics)):
        yield Raw(number, topics.topics[name])


def _docstrings(path: Path) -> Iterator[Raw]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(path.read_bytes())
    except SyntaxError:  # a template or a sample of wrong code holds no documentation
        return
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for number, node in enumerate(node for node in ast.walk(tree) if isinstance(node, owners)):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield Raw(number, inspect.cleandoc(text))
