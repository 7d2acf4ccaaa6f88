"""The dialogues of a split in memory, and rows of them as micro-batches whose targets are the answers.

Several dialogues lie one behind the other in a row, as many as fit, and none sees another (`documents`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlm_mpi.data.batch import Batch
from mlm_mpi.data.tokenizer import Tokenizer


class Dialogue(NamedTuple):
    """Token ids (t,) int32, each message with the end of text behind it, and which of them are answers (t,) bool."""

    ids: np.ndarray
    answers: np.ndarray


class Dialogues:
    """The dialogues of a split. Nothing changes them, so threads share. `lengths`: (n,) int32, tokens of each."""

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, answers: np.ndarray) -> None:
        """Shapes: (tokens,), (n + 1,), (tokens,)."""
        self._tokens, self._offsets, self._answers = tokens, offsets.astype(np.int64), answers.astype(bool)
        self.lengths: np.ndarray = np.diff(self._offsets).astype(np.int32)
        self.lengths.flags.writeable = False

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, number: int) -> Dialogue:
        """Dialogue 0 … n − 1; its arrays are the caller's own."""
        own = slice(self._offsets[number], self._offsets[number + 1])
        return Dialogue(self._tokens[own].astype(np.int32), self._answers[own].copy())

    @property
    def answers(self) -> int:
        """Tokens of all answers, their ends of text among them."""
        return int(self._answers.sum())

    def grams(self, order: int, kept: np.ndarray, eot: int) -> np.ndarray:
        """Each token of an answer behind the order − 1 before it, of the first `kept` tokens of each dialogue.

        Shapes: (n,) -> (grams, order).
        """
        before = np.concatenate([np.full(order - 1, eot, self._tokens.dtype), self._tokens])
        places = np.arange(len(self._tokens)) - np.repeat(self._offsets[:-1], self.lengths)
        wanted = self._answers & (places < np.repeat(kept, self.lengths))
        return np.lib.stride_tricks.sliding_window_view(before, order)[wanted]

    def fitting(self, context: int, eot: int) -> np.ndarray:
        """How many tokens of each lie within the context, up to the end of an answer; 0: not even the first answer.

        Shapes: -> (n,) int32.
        """
        ends = np.concatenate([[0], np.flatnonzero(self._answers & (self._tokens == eot)) + 1])  # of answers
        starts, stops = self._offsets[:-1], self._offsets[1:]
        last = ends[np.searchsorted(ends, np.minimum(starts + context, stops), side="right") - 1]
        return np.maximum(last - starts, 0).astype(np.int32)


class Rows:
    """The samples of a split: rows of dialogues, in their order, each cut behind the last answer that fits.

    A row reads an end of text, then a dialogue, and has to find its answers and their ends of text: the targets
    (teacher forcing). `lost`: dialogues without an answer that fits, which are left out; `cut`: the others that do not
    fit.
    """

    def __init__(self, dialogues: Dialogues, context: int, tokenizer: Tokenizer) -> None:
        self.dialogues, self.context, self.eot, self._tokenizer = dialogues, context, tokenizer.eot, tokenizer
        self._kept = dialogues.fitting(context, self.eot)
        self._rows = packed(self._kept, context)
        self.lost = int((self._kept == 0).sum())
        self.cut = int((self._kept < dialogues.lengths).sum()) - self.lost

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, numbers: Sequence[int], step: int, index: int, rows: int | None = None) -> Batch:
        """Shapes: ids, starts, targets ids (B, T) int32; mask (B, T) bool."""
        shape = rows or len(numbers), self.context
        ids, starts = np.full(shape, self.eot, np.int32), np.zeros(shape, np.int32)
        wanted, mask = np.full(shape, self.eot, np.int32), np.zeros(shape, bool)
        for row, number in enumerate(numbers):
            start = 0
            for dialogue in range(*self._rows[number]):
                if not (count := int(self._kept[dialogue])):
                    continue
                found = self.dialogues.read(dialogue)
                own = slice(start, start + count)
                ids[row, start + 1 : start + count] = found.ids[: count - 1]
                wanted[row, own], mask[row, own] = found.ids[:count], found.answers[:count]
                starts[row, own] = start
                start += count
            starts[row, start:] = start
        return Batch(step, index, {"ids": ids, "starts": starts}, {"ids": wanted, "mask": mask}, int(mask.sum()))

    def bytes(self, count: int) -> int:
        """The size in UTF-8 of what the answers of the first `count` rows say."""
        return sum(self._size(number) for number in range(self._rows[count - 1][1] if count else 0))

    def grams(self, order: int) -> np.ndarray:
        """Targets behind the tokens before them, as `Dialogues.grams`."""
        return self.dialogues.grams(order, self._kept, self.eot)

    def _size(self, number: int) -> int:
        ids, answers = (every[: self._kept[number]] for every in self.dialogues.read(number))
        return len(self._tokenizer.decode(ids[answers].tolist()).encode())


def packed(lengths: np.ndarray, room: int) -> list[tuple[int, int]]:
    """Runs [first, stop) of neighbours whose lengths fit into a row; runs of nothing are none. None is above `room`."""
    rows, first, used = [], 0, 0
    for number, length in enumerate(lengths.tolist()):
        if used + length > room:
            rows.append((first, number))
            first, used = number, 0
        used += length
    return [*rows, (first, len(lengths))] if used else rows
