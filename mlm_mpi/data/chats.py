"""Dialogues, one after another with their place: JSON lines, compressed or not.

    {"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Good day."}]}
    {"messages": [{"role": "user", "content": "Hello!"}], "chosen": "Good day.", "rejected": "What?"}

`prepare --chat` reads these, and `mlm-mpi chat` saves those of the first kind. The answers of the second may also be
lists of messages, which continue the others: all but the last are the same in both. And a text instead of the messages
is what a user says.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from mlm_mpi.data.decoding import Content, Told, check_repaired, plain_name
from mlm_mpi.data.formats import jsonl
from mlm_mpi.data.rows import missing
from mlm_mpi.data.template import ANSWERS, ROLES, Message, in_text
from mlm_mpi.data.text import clean
from mlm_mpi.errors import ConfigError, DataError

FIELD = "messages"
CHOSEN, REJECTED = "chosen", "rejected"
_ROLE, _CONTENT = "role", "content"
_SYSTEM, _USER = ROLES[:2]


@dataclass(frozen=True)
class ChatColumns:
    """Where dialogues stand: `text` is the field of a JSON line that holds the messages."""

    text: str = FIELD

    pair: ClassVar[None] = None
    split: ClassVar[None] = None
    target: ClassVar[None] = None

    def check(self) -> None:
        """Raises ConfigError for a field that no line has."""
        if not self.text:
            raise ConfigError("--text '' names no field: give the one that holds the messages")


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Messages up to the last answer, cleaned (`text.clean`), blanks at their ends gone.

    `place`: file:line. `is_odd`: a role is unknown, or system stands behind the first message. `is_empty`: there is no
    answer, or a message says nothing. `unanswered`: messages left out behind the last answer. `replaced`, `controls`:
    what cleaning found. `rejected`: what the last answer had better not be; None where nobody chose. `one_sided`: one
    of the two is missing.
    """

    place: str
    messages: tuple[Message, ...]
    is_odd: bool
    is_empty: bool
    unanswered: int
    replaced: int
    controls: int
    rejected: str | None = None
    one_sided: bool = False

    labels: ClassVar[tuple[str, ...]] = ("",)
    split: ClassVar[None] = None
    words: ClassVar[tuple[str, ...]] = ()
    answers: ClassVar[tuple[()]] = ()

    @property
    def text(self) -> str:
        """What they say."""
        return in_text(self.messages)

    @property
    def second(self) -> str:
        """What else was answered in the end."""
        return self.rejected or ""

    @property
    def undecided(self) -> bool:
        """Whether the chosen answer is the rejected one."""
        return [self.rejected] == [message.content for message in self.messages[-1:]]

    @property
    def source(self) -> str:
        """The first message of a user, by which dialogues are put on a side; without one all that is said."""
        return next((content for role, content in self.messages if role == _USER), self.text)


def _unheard(size: int) -> None:
    """Nobody wants to know."""


def read(path: Path, columns: ChatColumns, encoding: str = "utf-8", told: Told = _unheard) -> Iterator[Dialogue]:
    """The dialogues of a file in their order, in bounded memory; `told` hears of bytes that were read.

    Raises DataError in one line with the place: no JSON lines, no list of messages, a message without role or content,
    no dialogues, not text. An encoding that is wrong is known at the end only.
    """
    if Path(plain_name(path)).suffix.lower() not in jsonl.SUFFIXES:
        raise DataError(f"{path} has no dialogues by its name: rename it to end in .jsonl, or leave it out")
    count = replaced = characters = 0
    for place, line in jsonl.lines(Content(path, encoding, columns.text, told)):
        dialogue = _read(jsonl.record(line, columns.text, place), columns.text, place)
        count, replaced = count + 1, replaced + dialogue.replaced
        characters += sum(len(message.content) for message in dialogue.messages) + len(dialogue.second)
        yield dialogue
    check_repaired(path, replaced, characters)
    if not count:
        raise DataError(f"{path} has no dialogues: fill it, or leave it out")


def _read(record: dict[str, Any], field: str, place: str) -> Dialogue:
    """Raises DataError."""
    if CHOSEN not in record and REJECTED not in record:
        return _dialogue(_messages(record, field, place), place)
    chosen, rejected = (_answer(record.get(name), name, place) for name in (CHOSEN, REJECTED))
    asked: list[tuple[str, str]] = []
    if isinstance(record.get(field), str):
        asked = [(_USER, record[field])]
    elif field in record or not (chosen or rejected)[:-1]:
        asked = _messages(record, field, place)
    if chosen and rejected and chosen[:-1] != rejected[:-1]:
        raise DataError(
            f"{place}: {CHOSEN!r} and {REJECTED!r} differ in more than their last message: give lists that differ "
            "there alone"
        )
    return _preference([*asked, *(chosen or rejected)[:-1]], chosen[-1:], rejected[-1:], place)


def _answer(found: Any, name: str, place: str) -> list[tuple[str, str]]:
    """The messages of a chosen or rejected answer, [] where there is none. Raises DataError."""
    if found is None:
        return []
    if isinstance(found, str):
        return [(ANSWERS, found)]
    if isinstance(found, list):
        return [_message(message, number, place) for number, message in enumerate(found, 1)]
    raise DataError(f"{place}: {name!r} is no text and no list of messages: mend or remove the line")


def _preference(
    asked: list[tuple[str, str]], chosen: list[tuple[str, str]], rejected: list[tuple[str, str]], place: str
) -> Dialogue:  # fmt: skip
    """The two answers, of which a missing one is []."""
    first, second = _dialogue([*asked, *chosen], place), _dialogue([*asked, *rejected], place)
    follows = not asked or asked[-1][0] != _USER or any(role != ANSWERS for role, _ in (*chosen, *rejected))
    return replace(
        first,
        is_odd=first.is_odd or second.is_odd or follows,
        is_empty=first.is_empty or second.is_empty or not asked,
        unanswered=0,
        replaced=max(first.replaced, second.replaced),
        controls=max(first.controls, second.controls),
        rejected=second.messages[-1].content if second.messages else "",
        one_sided=not (chosen and rejected),
    )


def _messages(record: dict[str, Any], field: str, place: str) -> list[tuple[str, str]]:
    """(role, content) of each, "" for null. Raises DataError."""
    if field not in record:
        raise missing(place, "--text", field, sorted(record))
    found = record[field]
    if not isinstance(found, list):
        raise DataError(f"{place} has no list of messages in field {field!r}: give one, or another field with --text")
    return [_message(message, number, place) for number, message in enumerate(found, 1)]


def _message(message: Any, number: int, place: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise DataError(f'{place}: message {number} is no object: write {{"{_ROLE}": …, "{_CONTENT}": …}}')
    for name in (_ROLE, _CONTENT):
        if name not in message or not isinstance(message[name], str | None):
            what = "is no text" if name in message else f"is missing, it has {', '.join(sorted(message))[:200]!r}"
            raise DataError(f"{place}: {name!r} of message {number} {what}: mend or remove the line")
    return message[_ROLE] or "", message[_CONTENT] or ""


def _dialogue(messages: list[tuple[str, str]], place: str) -> Dialogue:
    cleaned = [clean(content) for _, content in messages]
    kept = [Message(role, one.text.strip()) for (role, _), one in zip(messages, cleaned, strict=True)]
    answered = max((number for number, message in enumerate(kept, 1) if message.role == ANSWERS), default=0)
    odd = any(role not in ROLES for role, _ in kept) or any(role == _SYSTEM for role, _ in kept[1:])
    return Dialogue(
        place, tuple(kept[:answered]), odd, not answered or not all(content for _, content in kept[:answered]),
        len(kept) - answered, sum(one.replaced for one in cleaned), sum(one.controls for one in cleaned),
    )  # fmt: skip
