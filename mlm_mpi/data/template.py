"""How a dialogue becomes tokens: of each message its role and a line end, what it says, and an end of text.

    user⏎ Hello! <end> assistant⏎ Good day. <end>

A role is written in the tokens that any tokenizer has, so that a model of plain text can learn dialogues. What a person
says never holds an end of text, and a role follows nothing else: no message can pretend to be several.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from mlm_mpi.data.shards import token_type
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.data.tokenizing import encode
from mlm_mpi.errors import DataError

NAME = "roles"  # in catalogs: another template would be another name
ANSWERS = "assistant"  # the role that a model learns
ROLES = ("system", "user", ANSWERS)


class Message(NamedTuple):
    """Who says what."""

    role: str
    content: str


def header(role: str) -> str:
    """What stands before a message."""
    return f"{role}\n"


def in_text(messages: Iterable[Message]) -> str:
    """A dialogue as a person reads it, and as a tokenizer is trained on it."""
    return "\n".join(header(role) + content for role, content in messages)


class Template:
    """The template in a tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises DataError where the tokenizer has no tokens by which roles differ."""
        self._tokenizer, self._type = tokenizer, token_type(tokenizer.vocab_size)
        self._end = np.array([tokenizer.eot], self._type)
        self.headers = {role: np.array(tokenizer.encode(header(role)), self._type) for role in ROLES}
        if not _differ([ids.tolist() for ids in self.headers.values()], {tokenizer.eot, tokenizer.unknown}):
            raise DataError(
                f'the tokenizer has no tokens that tell the roles {", ".join(ROLES)} of the chat template "{NAME}" '
                "apart: give another --tokenizer, such as bpe or bytes"
            )

    def encode(self, dialogues: Iterable[Sequence[Message]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, which of them are answers, their ends of text among them) of each dialogue. Shapes: (t,), (t,) bool.

        Raises DataError for a message without tokens, or with one that ends a text.
        """
        kept = list(dialogues)
        found = encode(self._tokenizer, (message.content for message in chain.from_iterable(kept)))
        for messages in kept:
            parts, answers = [], []
            for message in messages:
                said, own = next(found), self.headers[message.role]
                self._check(said[:-1], message)
                parts += [own, said]
                answers += [np.zeros(len(own), bool), np.full(len(said), message.role == ANSWERS)]
            yield np.concatenate(parts), np.concatenate(answers)

    def prompt(self, messages: Sequence[Message]) -> list[list[int]]:
        """What an answer continues: an end of text, each message, and what stands before an answer."""
        told = [ids.tolist() for message in messages for ids, _ in self.encode([[message]])]
        return [self._end.tolist(), *told, self.headers[ANSWERS].tolist()]

    def _check(self, said: np.ndarray, message: Message) -> None:
        if not len(said) or (said == self._tokenizer.eot).any():
            what = "an end of text in" if len(said) else "no token of"
            raise DataError(f"the tokenizer makes {what} the message {message.content[:80]!r}: change or remove it")


def _differ(headers: Sequence[list[int]], not_these: set[int | None]) -> bool:
    """Whether none is empty or begins another, and none has one of these tokens."""
    begins = any(a is not b and b[: len(a)] == a for a in headers for b in headers)
    return not begins and not any(token in not_these for ids in headers for token in ids)
