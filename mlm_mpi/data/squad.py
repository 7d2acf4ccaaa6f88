"""Questions whose answers stand in a text, as SQuAD's files have them, versions 1.1 and 2.0; or new ones in JSON lines.

    .json     {"data": [{"paragraphs": [{"context": …, "qas": [{"id": …, "question": …, "answers": [{"text": …,
              "answer_start": …}], "is_impossible": …}]}]}]}; answers count characters of the context from 0
    .jsonl    {"question": …, "context": …} a line (.ndjson too), without answers

`prepare --squad` reads the former, and who answers new questions reads both. Either may be compressed.
Source: Rajpurkar et al., arXiv:1606.05250 and arXiv:1806.03822.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import msgspec

from mlm_mpi.data.decoding import Content, Told, check_repaired, plain_name
from mlm_mpi.data.formats import jsonl
from mlm_mpi.data.text import clean
from mlm_mpi.errors import DataError

_SHAPE = '{"data": [{"paragraphs": [{"context": …, "qas": […]}]}]}'


class Answer(NamedTuple):
    """A piece of a context: its first character, its text."""

    start: int
    text: str


class Columns:
    """Files of questions have none that could be named otherwise."""

    pair: ClassVar[None] = None
    split: ClassVar[None] = None
    target: ClassVar[None] = None

    def check(self) -> None:
        """There is nothing to be wrong."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question (`text`) and its context (`second`), cleaned (`text.clean`), the question without blanks at its ends.

    `place`: of it in its file. `answers`: each stands in the context where it says; () where there is none, which
    `impossible` says on purpose. `moved`: answers that stood elsewhere than was said; `lost`: those that stand nowhere.
    `replaced`, `controls`: what cleaning found, in a context at its first question. `id`: what its file calls it;
    `again`: as it calls one before.
    """

    place: str
    text: str
    second: str
    answers: tuple[Answer, ...] = ()
    impossible: bool = False
    id: str = ""
    moved: int = 0
    lost: int = 0
    replaced: int = 0
    controls: int = 0
    again: bool = False

    labels: ClassVar[tuple[str, ...]] = ()
    words: ClassVar[tuple[str, ...]] = ()
    split: ClassVar[None] = None

    @property
    def source(self) -> str:
        """What may not stand on two sides: the context."""
        return self.second


class _Given(msgspec.Struct):
    text: str
    answer_start: int


class _Asked(msgspec.Struct):
    question: str
    id: str | int = ""
    answers: list[_Given] = []
    is_impossible: bool = False


class _Paragraph(msgspec.Struct):
    context: str
    qas: list[_Asked]


class _Article(msgspec.Struct):
    paragraphs: list[_Paragraph]


class _File(msgspec.Struct):
    data: list[_Article]


def _unheard(size: int) -> None:
    """Nobody wants to know."""


def read(path: Path, encoding: str = "utf-8", told: Told = _unheard) -> Iterator[Question]:
    """The questions of a file of SQuAD's; it is read whole. Raises DataError in one line: another format, none, not
    text. An encoding that is wrong is known at the end only."""
    if Path(plain_name(path)).suffix.lower() != ".json":
        raise DataError(f"{path} is no file of SQuAD's by its name: rename it to end in .json, or leave it out")
    try:
        file = msgspec.convert(json.loads(Content(path, encoding, told=told).text()), _File)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not as SQuAD's files are ({error}): give JSON like {_SHAPE}") from None
    number = replaced = characters = 0
    for one in _told_again(_questions(path, file)):
        number, replaced = number + 1, replaced + one.replaced
        characters += len(one.text) + len(one.second)
        yield one
    check_repaired(path, replaced, characters)
    if not number:
        raise DataError(f"{path} has no questions: fill it, or leave it out")


def _questions(path: Path, file: _File) -> Iterator[Question]:
    number = 0
    for paragraph in (paragraph for article in file.data for paragraph in article.paragraphs):
        context = clean(paragraph.context)
        for place, asked in enumerate(paragraph.qas):
            number += 1
            name = f" ({clean(str(asked.id)).text[:40]})" if asked.id else ""
            found = _question(f"{path}: question {number}{name}", paragraph.context, context.text, asked)
            own = (0, 0) if place else (context.replaced, context.controls)
            yield replace(found, replaced=found.replaced + own[0], controls=found.controls + own[1])


def _told_again(questions: Iterable[Question]) -> Iterator[Question]:
    """The same, marked where the id is that of an earlier one."""
    known: set[str] = set()
    for one in questions:
        yield replace(one, again=True) if one.id in known else one
        known.update({one.id} - {""})


def _question(place: str, raw: str, context: str, asked: _Asked) -> Question:
    text = clean(asked.question)
    found = [] if asked.is_impossible else [_found(given, raw, context) for given in asked.answers]
    answers = tuple(answer for answer, _ in found if answer is not None)
    return Question(
        place, text.text.strip(), context if context.strip() else "", answers, asked.is_impossible,
        str(asked.id), sum(moved for _, moved in found), len(found) - len(answers), text.replaced,
        text.controls,
    )  # fmt: skip


def _found(given: _Given, raw: str, context: str) -> tuple[Answer | None, bool]:
    """(where an answer stands in the cleaned context, the place nearest to the one that is said; whether it is another
    place). None: nowhere."""
    start, text = min(max(0, given.answer_start), len(raw)), clean(given.text).text
    wanted = start if raw == context else len(clean(raw[:start]).text)
    wanted += len(text) - len(text.lstrip())
    text = text.strip()
    if not text:
        return None, False
    if context.startswith(text, wanted):
        return Answer(wanted, text), False
    nearest = min(_places(text, context), key=lambda place: abs(place - wanted), default=None)
    return (None, False) if nearest is None else (Answer(nearest, text), True)


def _places(text: str, context: str) -> Iterator[int]:
    place = context.find(text)
    while place >= 0:
        yield place
        place = context.find(text, place + 1)


def read_new(path: Path, encoding: str = "utf-8") -> Iterator[Question]:
    """The questions of a file of SQuAD's or of JSON lines; of answers nothing is read. Raises DataError."""
    if Path(plain_name(path)).suffix.lower() not in jsonl.SUFFIXES:
        yield from read(path, encoding)
        return
    number = 0
    for one in _told_again(_lines(path, encoding)):
        number += 1
        yield one
    if not number:
        raise DataError(f"{path} has no questions: fill it, or leave it out")


def _lines(path: Path, encoding: str) -> Iterator[Question]:
    for place, line in jsonl.lines(Content(path, encoding, "question")):
        record = jsonl.record(line, "question", place)
        question, context = (_text(record, name, place) for name in ("question", "context"))
        name = str(record.get("id", ""))
        yield Question(place, question.strip(), context if context.strip() else "", id=name)


def _text(record: dict[str, Any], name: str, place: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        what = "no" if value is None else "no text in"
        raise DataError(f'{place} has {what} field {name!r}: give {{"question": …, "context": …}} a line')
    return clean(value).text


def written(questions: Iterable[Question], title: str) -> bytes:
    """A file of SQuAD's with these questions; those of one context, one behind the other, share its paragraph."""
    paragraphs: list[dict[str, Any]] = []
    for one in questions:
        if not paragraphs or paragraphs[-1]["context"] != one.second:
            paragraphs.append({"context": one.second, "qas": []})
        answers = [{"text": answer.text, "answer_start": answer.start} for answer in one.answers]
        paragraphs[-1]["qas"].append({"id": one.id, "question": one.text, "answers": answers})
    file = {"version": "1.1", "data": [{"title": title, "paragraphs": paragraphs}]}
    return msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n"
