"""Sentences of words with a label each, one after another with their place, compressed or not.

    .jsonl    an object a line (.ndjson too), in it a list of words, and one as long of their labels
    others    a word a line, its columns between tabs or else blanks, and an empty line behind each sentence; in
              .conllu comments and lines that number no single word are none

`prepare --tags` reads these, and so does who predicts labels of new words.
Source: Tjong Kim Sang, De Meulder, CoNLL-2003 (arXiv:cs/0306050), for the lines.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mlm_mpi.data.decoding import Content, Told, check_repaired, plain_name
from mlm_mpi.data.formats import jsonl
from mlm_mpi.data.rows import cleaned_label, missing, plain
from mlm_mpi.data.text import clean
from mlm_mpi.errors import ConfigError, DataError

LONGEST_SENTENCE = 1 << 16  # words; a file without empty lines would be one sentence
DOCUMENT = "-DOCSTART-"  # CoNLL-2003's line between documents, no sentence
_WORDS, _LABELS = "tokens", "labels"  # fields of JSON lines
_NO_WORD = "\ufffd"  # in the place of a word that is nothing but control characters
_BLANKS = re.compile(r"[\t\n ]+")
_NO_LINE = re.compile(r"#|[0-9]+[-.]")  # of Universal Dependencies: comments, ranges of words, empty nodes


@dataclass(frozen=True)
class WordColumns:
    """Where words and their labels stand: numbers of columns from 1 on, names of fields of JSON lines.

    `text`, `label`: None for the first column and the last one, or for tokens and labels. `labelled`: whether labels
    are read.
    """

    text: str | None = None
    label: str | None = None
    labelled: bool = True

    pair: ClassVar[None] = None
    split: ClassVar[None] = None
    target: ClassVar[None] = None

    def check(self) -> None:
        """Raises ConfigError for a column that no file has."""
        for option, column in (("--text", self.text), ("--label", self.label)):
            if column == "":
                raise ConfigError(f"{option} '' names no column: give one")
        if self.text is not None and self.text == self.label:
            raise ConfigError(f"--text and --label are both column {self.text!r}: name another for one of them")


@dataclass(frozen=True, slots=True)
class Sentence:
    """Words, cleaned (`text.clean`), and their labels, as many or none.

    `place`: file:line. `empties`: lines behind it, or before the first, that are empty. `lost`: words that were nothing
    but control characters. `replaced`, `controls`: what cleaning found.
    """

    place: str
    words: tuple[str, ...]
    labels: tuple[str, ...]
    empties: int = 1
    lost: int = 0
    replaced: int = 0
    controls: int = 0

    second: ClassVar[str] = ""
    source: ClassVar[None] = None
    split: ClassVar[None] = None
    answers: ClassVar[tuple[()]] = ()

    @property
    def text(self) -> str:
        """The words with a space between."""
        return " ".join(self.words)


def _unheard(size: int) -> None:
    """Nobody wants to know."""


def read(path: Path, columns: WordColumns, encoding: str = "utf-8", told: Told = _unheard) -> Iterator[Sentence]:
    """The sentences of a file in their order; `told` hears of bytes that were read. A first one without words stands
    for empty lines at the beginning.

    Raises DataError in one line with the place: no such column, a line of another width, lists of unequal length, no
    words, not text. An encoding that is wrong is known at the end only.
    """
    suffix = Path(plain_name(path)).suffix.lower()
    content = Content(path, encoding, columns.text or _WORDS, told)
    words = replaced = characters = 0
    for found in (_json_lines if suffix in jsonl.SUFFIXES else _lines)(content, columns):
        words, replaced = words + len(found.words), replaced + found.replaced
        characters += sum(map(len, found.words))
        yield found
    check_repaired(path, replaced, characters)
    if not words:
        raise DataError(f"{path} has no words: fill it, or leave it out")


class _Growing:
    """A sentence that is read word by word."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.empties = self._lost = self._replaced = self._controls = 0
        self._words: list[str] = []
        self._labels: list[str] = []

    def add(self, place: str, word: str, label: str | None) -> None:
        """`label`: None where none is read."""
        if not self._words:
            self.place = place
        cleaned = clean(word)
        text = _BLANKS.sub(" ", cleaned.text).strip()
        self._replaced, self._controls = self._replaced + cleaned.replaced, self._controls + cleaned.controls
        self._lost += not text
        self._words.append(text or _NO_WORD)
        if len(self._words) > LONGEST_SENTENCE:
            raise DataError(
                f"{place} is word number {len(self._words):,} of a sentence, at most {LONGEST_SENTENCE:,} are read: "
                "put an empty line behind each sentence"
            )
        if label is not None:
            known = cleaned_label(label, place)
            if known is None:
                raise DataError(f"{place} has no label for the word {text[:80]!r}: give it one")
            self._labels.append(known)

    def done(self) -> Sentence:
        return Sentence(
            self.place, tuple(self._words), tuple(self._labels), self.empties, self._lost, self._replaced,
            self._controls,
        )  # fmt: skip


def _lines(content: Content, columns: WordColumns) -> Iterator[Sentence]:
    """Of files with a word a line."""
    sentence, width, number = _Growing(f"{content.path}:1"), 0, 0
    has_comments = plain_name(content.path).lower().endswith(".conllu")
    for number, line in enumerate(content.lines(), 1):
        if has_comments and _NO_LINE.match(line):
            continue
        fields, place = _fields(line), f"{content.path}:{number}"
        if not fields:
            sentence.empties += 1
            continue
        if sentence.empties:
            yield sentence.done()
            sentence = _Growing(place)
        if width not in (0, len(fields)):
            raise DataError(f"{place} has {len(fields)} columns, the first line has {width}: mend or remove it")
        width = width or len(fields)
        word = fields[_column("--text", columns.text or "1", place, width)]
        if not columns.labelled:
            sentence.add(place, word, None)
            continue
        if width == 1:
            raise DataError(f"{place} has 1 column, and a word and its label are two: put a tab or a blank between")
        sentence.add(place, word, fields[_column("--label", columns.label or str(width), place, width)])
    if number:
        yield sentence.done()


def _fields(line: str) -> list[str]:
    """The columns of a line, none of an empty one. A word may hold blanks that are no plain ones."""
    line = line.strip(" \r\n")
    if "\t" in line:
        return line.split("\t") if line.strip("\t") else []
    return _BLANKS.split(line) if line else []


def _column(option: str, column: str, place: str, width: int) -> int:
    """The place of a column in a line of `width`."""
    if not re.fullmatch("[1-9][0-9]{0,5}", column):
        raise DataError(
            f"{place} is of a file whose columns have numbers, and {option} is {column!r}: give {option} 1, 2, …"
        )
    if int(column) > width:
        raise DataError(f"{place} has {width} columns, and {option} is {column}: give one of these, or mend the line")
    return int(column) - 1


def _json_lines(content: Content, columns: WordColumns) -> Iterator[Sentence]:
    """Of files with a sentence a line."""
    name, other = columns.text or _WORDS, columns.label or _LABELS
    for place, line in jsonl.lines(content):
        record, sentence = jsonl.record(line, name, place), _Growing(place)
        sentence.empties = 1
        words = _list(record, "--text", name, place)
        labels: list[Any] = [None] * len(words)
        if columns.labelled:
            labels = _list(record, "--label", other, place)
            if len(labels) != len(words):
                raise DataError(
                    f"{place} has {len(words):,} words in {name!r} and {len(labels):,} labels in {other!r}: mend or "
                    "remove it"
                )
        for word, label in zip(words, labels, strict=True):
            known = (plain(label, other, place) or "") if columns.labelled else None
            sentence.add(place, plain(word, name, place) or "", known)
        yield sentence.done()


def _list(record: dict[str, Any], option: str, name: str, place: str) -> list[Any]:
    if name not in record:
        raise missing(place, option, name, sorted(record))
    if not isinstance(record[name], list):
        raise DataError(f"{place} has no list in field {name!r}: give one, or another field with {option}")
    found: list[Any] = record[name]
    return found
