"""Python's own documentation, the same on every machine: docstrings, comments and help topics of its library.

Distributions split the library and patch releases change it. So a text counts if its digest stands in `builtin.bin`,
a list of what all of these hold: CPython 3.11.7, 3.12.1 and 3.13.0, Debian's 3.11.2, 3.13.5, 3.13.18 and 3.14.10,
PyPy's 3.11.11 and 3.11.17, and Pyodide's 3.11.3, 3.12.7, 3.13.2 and 3.14.2 (the files it has, over those of a
neighbour). The list also gives the order. No text of Python's is in this package.

`python -m mlm_mpi.data.builtin FOLDER…` writes the list anew, from the standard libraries in these folders.
"""

import ast
import functools
import hashlib
import os
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import dedent

_LIST = Path(__file__).with_name("builtin.bin")
_DIGEST_BYTES = 5  # 40 bits: one of 10^5 other texts is taken for one of 13,000 with probability 0.001
_SHORTEST = 40  # characters of a comment or paragraph; shorter ones are labels and switched-off code
# Large, and in no list: not every distribution has them.
_SKIPPED_FOLDERS = {
    "test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3", "tkinter", "distutils",
}  # fmt: skip
_COMMENTS = re.compile(r"(?:^[ \t]*#.*\n)+", re.MULTILINE)
_OWNERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def documents(root: Path | None = None) -> dict[int, str]:
    """The listed texts that the library in `root` (this Python's) holds, by their place in the list."""
    places = {digest: place for place, digest in enumerate(_listed())}
    whole = _texts(root or Path(sysconfig.get_paths()["stdlib"]))
    found = ((places.get(_digest(text)), text) for texts in map(_with_paragraphs, whole) for text in texts)
    return {place: text for place, text in found if place is not None}


def count() -> int:
    """How many documents there are where none is missing."""
    return len(_listed())


@functools.cache
def _listed() -> tuple[bytes, ...]:
    content = _LIST.read_bytes()
    return tuple(content[start : start + _DIGEST_BYTES] for start in range(0, len(content), _DIGEST_BYTES))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES).digest()


def _texts(root: Path) -> Iterator[str]:
    """Every text of a library, file by file; a file that is no Python (a template, a sample) holds none."""
    for path in sorted(_modules(root), key=lambda path: path.relative_to(root).as_posix()):
        try:
            with warnings.catch_warnings(), tokenize.open(path) as file:
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                source = file.read()
                tree = ast.parse(source)
        except (OSError, ValueError, SyntaxError):  # ValueError: a NUL, or bytes that are not of its encoding
            continue
        found = _topics(tree) if path.name == "topics.py" else _comments(source)
        yield from (*_docstrings(tree), *found)


def _modules(root: Path) -> Iterator[Path]:
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, _OWNERS):
            first, _, rest = (ast.get_docstring(node, clean=False) or "").expandtabs().partition("\n")
            text = f"{first.strip()}\n{_dedent(rest)}".strip()
            if text:
                yield text


def _comments(source: str) -> Iterator[str]:
    for match in _COMMENTS.finditer(source):
        text = _dedent("\n".join(line.strip().lstrip("#") for line in match[0].expandtabs().splitlines())).strip()
        if len(text) >= _SHORTEST:
            yield text


def _topics(tree: ast.Module) -> Iterator[str]:
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            yield from (_dedent(text).strip() for text in ast.literal_eval(statement.value).values())


def _with_paragraphs(text: str) -> list[str]:
    """A text and its paragraphs: where a patch release has changed some, the others still count."""
    parts = [_dedent(part).strip() for part in text.split("\n\n")]
    return [text, *(part for part in parts if len(part) >= _SHORTEST)]


def _dedent(text: str) -> str:
    """Without the margin of its lines and without spaces at their ends. (inspect.cleandoc changed in Python 3.13.)"""
    return "\n".join(line.rstrip() for line in dedent(text).split("\n"))


def _common(roots: Iterable[Path]) -> list[str]:
    """What every one of these libraries holds, in the order of the first: whole texts, or else paragraphs of them."""
    first, *others = ([*dict.fromkeys(_texts(root))] for root in roots)
    everywhere = set.intersection(*({part for text in texts for part in _with_paragraphs(text)} for texts in others))
    taken = ([text] if text in everywhere else _with_paragraphs(text) for text in first)
    return [*dict.fromkeys(text for texts in taken for text in texts if text in everywhere)]


if __name__ == "__main__":
    listed = _common(map(Path, sys.argv[1:]))
    _LIST.write_bytes(b"".join(map(_digest, listed)))
    print(f"{len(listed):,} texts are in all of {len(sys.argv) - 1} libraries")
