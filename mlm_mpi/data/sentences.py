"""The sentences of a split whose words have labels, in memory.

A word's label stands at its first token, and its other tokens have none.
Source: Devlin et al., arXiv:1810.04805, section 5.3.
"""

from typing import NamedTuple

import numpy as np

ENDS = 2  # positions before and behind a sentence


class Sentence(NamedTuple):
    """Token ids (t,) int32 without an end of text, and tags (t,) int32: the label's number at the first token of a
    word, -1 elsewhere."""

    ids: np.ndarray
    tags: np.ndarray


class Sentences:
    """The sentences of a split. Nothing changes them, so threads share.

    `lengths`: (n,) int32, tokens of each; `targets`: (w,) int32, numbers of the labels of all words.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, tags: np.ndarray) -> None:
        """`tags`: a label's number and 1, or 0. Shapes: (tokens,), (n + 1,), (tokens,)."""
        self._tokens, self._offsets, self._tags = tokens, offsets.astype(np.int64), tags
        self.lengths: np.ndarray = np.diff(self._offsets).astype(np.int32)
        self.targets: np.ndarray = tags[tags > 0].astype(np.int32) - 1
        for array in (self.lengths, self.targets):
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, number: int) -> Sentence:
        """Sentence 0 … n − 1; its arrays are the caller's own."""
        own = slice(self._offsets[number], self._offsets[number + 1])
        return Sentence(self._tokens[own].astype(np.int32), self._tags[own].astype(np.int32) - 1)

    def words(self) -> list[np.ndarray]:
        """The token ids of each word, in the order of `targets`."""
        return np.split(self._tokens, np.flatnonzero(self._tags)[1:])

    def begins(self) -> np.ndarray:
        """Which words are the first of their sentence. Shapes: -> (w,) bool."""
        first = np.zeros(len(self._tags), bool)
        first[self._offsets[:-1]] = True
        return first[self._tags > 0]

    def cut(self, context: int) -> tuple[int, int, int]:
        """(sentences that do not fit the context, words that they lose, positions that the longest needs)."""
        needed = self.lengths + ENDS
        place = np.arange(len(self._tags)) - np.repeat(self._offsets[:-1], self.lengths)
        lost = (self._tags > 0) & (place >= context - ENDS)
        return int((needed > context).sum()), int(lost.sum()), int(needed.max(initial=0))
