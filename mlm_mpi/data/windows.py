"""Questions with windows of their contexts as micro-batches."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mlm_mpi.data import texts
from mlm_mpi.data.batch import Batch
from mlm_mpi.data.labelled import Example
from mlm_mpi.data.questions import Cut, Question, Questions, Window


class Seen(NamedTuple):
    """What a model sees at once: token ids of a question (q,) and of a part of its context (c,) int32, and its answer,
    tokens start … stop − 1 of that part, 0 and 0 where none lies in it whole. `number`: of the window."""

    ids: np.ndarray
    context: np.ndarray
    start: int
    stop: int
    number: int


def seen(question: Question, window: Window, cut: Cut, number: int = 0) -> Seen:
    """A window of a question's context beside it."""
    here = window.first <= question.start < question.stop <= window.stop
    start, stop = (question.start - window.first, question.stop - window.first) if here else (0, 0)
    kept = question.ids[: cut.kept(len(question.ids))]
    return Seen(kept, question.context[window.first : window.stop], start, stop, number)


def batch_of(some: Sequence[Seen], cut: Cut, eot: int, side: int = 0, step: int = 0, index: int = 0) -> Batch:
    """Windows in a row, as `texts.batch_of` has pairs of texts; positions are counted within a text.

    Shapes: ids, places, segments (1, N) int32; targets, (B, 2) int32 each: answers, the first and the last position of
    the answer, 0 and 0 where there is none; contexts, where the context begins and ends; and names, the number of the
    side and of the window.
    """
    pairs = [Example(np.concatenate([one.ids, one.context]), len(one.ids), 0) for one in some]
    made = texts.batch_of(pairs, cut.context, eot, True, step, index)
    begins = [2 + len(one.ids) for one in some]  # behind an end of text, the question, an end
    answers = [
        (begin + one.start, begin + one.stop - 1) if one.stop else (0, 0)
        for begin, one in zip(begins, some, strict=True)
    ]
    contexts = [(begin, begin + len(one.context)) for begin, one in zip(begins, some, strict=True)]
    for one, (first, stop), (begin, _) in zip(some, contexts, made.spans(), strict=True) if cut.matches else ():
        made.inputs["segments"][0, begin + first : begin + stop][np.isin(one.context, one.ids)] = 2
    table = {"answers": answers, "contexts": contexts, "names": [(side, one.number) for one in some]}
    return replace(made, targets={name: np.array(rows, np.int32) for name, rows in table.items()})


class Windows:
    """The samples of a split, its windows (w, 3). `side`: its number. `noise`: what is hidden of them in training."""

    def __init__(self, questions: Questions, cut: Cut, eot: int, side: int, noise: texts.Noise | None = None) -> None:
        self.questions, self.cut, self.eot, self.side, self.noise = questions, cut, eot, side, noise
        self.table = cut.of(questions)

    def __len__(self) -> int:
        return len(self.table)

    def batch(self, numbers: Sequence[int], step: int, index: int, rows: int | None = None) -> Batch:
        """No window is padded, whatever `rows` says."""
        read = [self._read(int(number)) for number in numbers]
        read.sort(key=lambda one: len(one.ids) + len(one.context))  # attention takes those of one length together
        made = batch_of(read, self.cut, self.eot, self.side, step, index)
        if self.noise is not None:
            made.inputs["hidden"] = self.noise.hidden(made, [one.number for one in read])
        return made

    def _read(self, number: int) -> Seen:
        window = Window(*self.table[number].tolist())
        return seen(self.questions.read(window.question), window, self.cut, number)
