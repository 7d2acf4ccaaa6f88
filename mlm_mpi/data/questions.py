"""The questions of a split in memory, and the windows in which a model sees their contexts.

A context that does not fit beside its question is read in windows that begin a stride after one another and overlap.
Source: Devlin et al., arXiv:1810.04805, section 4.2, and their program run_squad.py.
"""

from typing import NamedTuple

import numpy as np

ENDS = 3  # positions before a question, between it and its context, and behind that


class Question(NamedTuple):
    """Token ids of a question (q,), of its context (c,), and of each of its answers, int32; the first one is tokens
    start … stop − 1 of the context, 0 and 0 where there is none."""

    ids: np.ndarray
    context: np.ndarray
    start: int
    stop: int
    answers: tuple[np.ndarray, ...] = ()


class Questions:
    """The questions of a split. Nothing changes them, so threads share.

    `lengths`, `contexts`: (n,) int32, tokens of each question and of its context; `starts`, `stops`: (n,) int32, its
    first answer.
    """

    def __init__(
        self, tokens: np.ndarray, offsets: np.ndarray, seconds: np.ndarray, answers: np.ndarray, starts: np.ndarray,
        stops: np.ndarray, eot: int,
    ) -> None:  # fmt: skip
        """`seconds`, `answers`: where among a question's tokens its context and its answers begin, each of which ends
        with an end of text. Shapes: (tokens,), (n + 1,), (n,) each."""
        self._tokens, self._offsets, self._eot = tokens, offsets.astype(np.int64), eot
        self._ends = answers.astype(np.int64)
        self.lengths: np.ndarray = seconds.astype(np.int32)
        self.contexts: np.ndarray = (answers.astype(np.int64) - seconds).astype(np.int32)
        self.starts: np.ndarray = starts.astype(np.int32)
        self.stops: np.ndarray = stops.astype(np.int32)
        for array in (self.lengths, self.contexts, self.starts, self.stops):
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, number: int) -> Question:
        """Question 0 … n − 1; its arrays are the caller's own."""
        ids = self._tokens[self._offsets[number] : self._offsets[number + 1]].astype(np.int32)
        second, end = int(self.lengths[number]), int(self._ends[number])
        ends = end + np.flatnonzero(ids[end:] == self._eot)
        answers = tuple(part[part != self._eot] for part in np.split(ids[end:], ends + 1 - end)[:-1])
        start, stop = int(self.starts[number]), int(self.stops[number])
        return Question(ids[:second], ids[second:end], start, stop, answers)


class Window(NamedTuple):
    """Tokens first … stop − 1 of the context of question `question`."""

    question: int
    first: int
    stop: int


class Cut(NamedTuple):
    """How questions and contexts are made to fit: tokens that a model sees at once, the most of a question, and after
    how many tokens of a context the next window begins (0: half of what a window holds).

    `matches`: tokens of a context that are in its question too lie in a segment of their own, the third.
    Source: Chen et al., arXiv:1704.00051, section 3.2, exact match.
    """

    context: int
    question: int
    stride: int
    matches: bool = False

    def kept(self, length: int) -> int:
        """Of so many tokens of a question."""
        return min(length, self.question, self.context - ENDS - 1)

    def windows(self, number: int, length: int, tokens: int) -> list[Window]:
        """Of a question of `length` tokens over a context of `tokens`, the last one up to its end."""
        room = self.context - ENDS - self.kept(length)
        step = min(self.stride or max(1, room // 2), room)
        count = 1 + max(0, -(-(tokens - room) // step))
        return [Window(number, k * step, min(k * step + room, tokens)) for k in range(count)]

    def of(self, questions: Questions) -> np.ndarray:
        """The windows of a split, those of a question one behind the other. Shapes: -> (w, 3) int32."""
        sizes = zip(questions.lengths.tolist(), questions.contexts.tolist(), strict=True)
        some = [window for number, size in enumerate(sizes) for window in self.windows(number, *size)]
        return np.array(some, np.int32).reshape(-1, 3)


class Span(NamedTuple):
    """Tokens first … stop − 1 of a context, 0 and 0 for no answer, and how probable the model finds it."""

    first: int
    stop: int
    probability: float


def best_span(firsts: np.ndarray, found: np.ndarray, may_be_none: bool) -> Span:
    """The answer to a question, of what was found in each of its windows.

    It is the most probable span of all windows; or none, where even the window that is surest of an answer finds none
    more probable than that. Windows without the answer learn to say that there is none, so probabilities of several
    windows can be compared. Source: Devlin et al., arXiv:1810.04805, section 4.3; Clark, Gardner, arXiv:1710.10723.
    Shapes: where windows begin (w,); first and stop in a window, log P of that, and of there being none (w, 4).
    """
    best = int(found[:, 2].argmax())
    nothing = float(found[:, 3].min())
    if may_be_none and nothing > found[best, 2]:
        return Span(0, 0, float(np.exp(nothing)))
    first = int(firsts[best])
    return Span(first + int(found[best, 0]), first + int(found[best, 1]), float(np.exp(found[best, 2])))
