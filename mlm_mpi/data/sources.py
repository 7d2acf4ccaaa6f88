"""Where documents come from: files, folders, globs, and Python's own documentation.

A list of sources is a pure function of the inputs, and so is the number of a document in its source.
Ranks share the work by these numbers: a file as a whole, or document by document where its format says so.
"""

import difflib
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mlm_mpi.data import builtin
from mlm_mpi.data.decoding import Content, NoText, Told
from mlm_mpi.data.reading import Format, Formats
from mlm_mpi.errors import DataError

_BUILTIN_BYTES = 1_900_000
_MOST_NAMES = 10_000  # of a folder, compared with what was mistyped


@dataclass(frozen=True)
class Source:
    """A file and its format, or (without both) Python's library."""

    path: Path = Path()
    format: Format | None = None

    @property
    def is_shared(self) -> bool:
        """Whether all ranks read parts of it; otherwise one rank reads it as a whole."""
        return self.format is None or self.format.is_shared

    def size(self) -> int:
        """Bytes of the file, of the built-in documents about; 0 where they cannot be told."""
        try:
            return _BUILTIN_BYTES if self.format is None else self.path.stat().st_size
        except OSError:  # who reads it will say so
            return 0

    @property
    def name(self) -> str:
        """What a person calls it."""
        return "the built-in documents" if self.format is None else os.fsencode(self.path).decode(errors="replace")


@dataclass(frozen=True)
class Raw:
    """A document as it was found: number in its source, and text with `text.MARK` for what could not be decoded."""

    number: int
    content: str | NoText


def find(inputs: Sequence[str], has_builtin: bool, out: Path, formats: Formats) -> list[Source]:
    """The sources behind the command line, in a fixed order, each once; at least one. Raises DataError as `files`."""
    found = files(inputs, out)
    if not found and not has_builtin:
        raise DataError(
            f"the corpus is empty: no file in {', '.join(map(repr, inputs[:3]))} (hidden ones, corpora and --out are "
            "no input): give other files, or --builtin"
        )
    return [Source(path, formats.serving(path)) for path in found] + ([Source()] if has_builtin else [])


def files(inputs: Sequence[str], out: Path) -> list[Path]:
    """The files behind the command line, in a fixed order, each once.

    Files below `out` are no input, so that `prepare . --out corpus` can run twice; nor are those of other corpora.
    Raises DataError for an input that does not exist, may not be looked at or matches nothing.
    """
    try:
        skipped = out.resolve()
        paths = [path for text in inputs for path in _expand(text)]
        return [path for path in dict.fromkeys(paths) if not path.resolve().is_relative_to(skipped)]
    except OSError as error:
        raise DataError(
            f"cannot look for input at {error.filename} ({error.strerror}): mend its permissions, or give another input"
        ) from None


def read(source: Source, field: str, encoding: str, rank: int, size: int, told: Told) -> Iterator[Raw]:
    """Documents of a source that rank `rank` of `size` is to read (of a shared one every size-th).

    `told` hears of bytes that were read.

    Raises DataError naming file (and line): unreadable, or not what its format takes.
    """
    if source.format is None:
        found = builtin.documents()
        yield from (Raw(number, found[number]) for number in sorted(found) if number % size == rank)
    else:
        mine = (rank, size) if source.is_shared else (0, 1)
        content = Content(source.path, encoding, field, told)
        yield from (Raw(number, text) for number, text in source.format.texts(content, *mine))


def _expand(text: str) -> list[Path]:
    path = Path(text)
    if path.is_dir():
        return _files_below(path)
    if path.exists():
        return [path]
    found = [match for match in sorted(_matches(text)) if Path(match).exists()]
    if not found:
        raise DataError(f"no input at {text!r}{_hint(path)}: give a file, a folder, a glob in quotes, or --builtin")
    return [path for match in found for path in _expand(match)]


def _hint(path: Path) -> str:
    """What may have been meant by a path that does not exist."""
    if str(path).startswith(("http:/", "https:/")):
        return " (download it first)"
    missing = next(part for part in (*reversed(path.parents), path) if not part.exists())
    if not missing.parent.is_dir():
        return ""
    there = {other.name.lower(): other for other in islice(missing.parent.iterdir(), _MOST_NAMES)}
    near = difflib.get_close_matches(missing.name.lower(), there, n=1)
    return f" (did you mean {str(there[near[0]] / path.relative_to(missing))!r}?)" if near else ""


def _files_below(top: Path) -> list[Path]:
    """Regular files, hidden ones and corpora left out, sorted; links to folders are not followed: no loop is."""
    return sorted(
        folder / name
        for folder, names in _folders_below(top)
        if not {"catalog.json", "prepared.json"} <= set(names)
        for name in names
        if not name.startswith(".") and (folder / name).is_file()
    )


def _folders_below(top: Path) -> Iterator[tuple[Path, list[str]]]:
    for folder, inside, names in os.walk(top, onerror=_raise):
        inside[:] = [name for name in inside if not name.startswith(".")]
        yield Path(folder), names


def _raise(error: OSError) -> None:
    raise error


def _matches(pattern: str) -> list[str]:
    """What a glob matches. (`glob` follows links behind a `**`: two that lead back to their folder never end.)"""
    parts = Path(pattern).parts
    if "**" not in parts:
        return glob.glob(pattern)  # noqa: PTH207  (Path.glob takes no absolute pattern)
    cut = parts.index("**")
    tops = glob.glob(str(Path(*parts[:cut])))  # noqa: PTH207
    if cut + 1 == len(parts):
        return tops
    folders = (folder for top in tops for folder, _ in _folders_below(Path(top)))
    return [match for folder in folders for match in _matches(str(Path(glob.escape(str(folder)), *parts[cut + 1 :])))]
