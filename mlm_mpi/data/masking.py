"""Windows of a text in which some tokens are hidden and have to be found: the samples of a masked language model.

Source: Devlin et al., arXiv:1810.04805, section 3.1; whole words: the authors' release of May 2019. Which tokens are
hidden is drawn anew each time that a window is read (Liu et al., RoBERTa, arXiv:1907.11692, section 4.1).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlm_mpi import order
from mlm_mpi.data.batch import Batch
from mlm_mpi.data.objectives.causal import Windows
from mlm_mpi.data.stream import TokenStream
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.rng import key_of, uniform

SHOWN, OTHER = 0.1, 0.1  # of the chosen tokens: left as they are, another in their place; the others are hidden


def inner_tokens(tokenizer: Tokenizer, whole_words: bool) -> tuple[np.ndarray, np.ndarray]:
    """(may continue a word, may be continued): for each id whether it begins, and ends, with a letter or digit.

    Without `whole_words` none does, and every token is a word. Shapes: -> (V,) bool each.
    """
    begins, ends = np.zeros(tokenizer.vocab_size, bool), np.zeros(tokenizer.vocab_size, bool)
    for number in range(tokenizer.vocab_size if whole_words else 0):
        text = tokenizer.token_text(number)
        begins[number], ends[number] = text[:1].isalnum(), text[-1:].isalnum()
    return begins, ends


class Masked:
    """Shapes of a batch: ids (B, T) int32, hidden (B, T) bool; targets ids (M,) int32, at (M,) int32 (layers/head.py),
    mask (M,) bool; M is a multiple of 8.

    A word of a window is chosen with probability `rate`, with all its tokens; in a window without any the one that was
    nearest to it is. Draws are of the stream, the step and the sample's number.
    """

    def __init__(
        self, stream: TokenStream, context: int, training: bool, tokenizer: Tokenizer,
        inner: tuple[np.ndarray, np.ndarray], rate: float, seed: int,
    ) -> None:  # fmt: skip
        """`inner`: what `inner_tokens` gives."""
        self.windows = Windows(stream, context, training)
        self.inner, self.rate, self.context = inner, rate, context
        self.eot, self.vocabulary = tokenizer.eot, tokenizer.vocab_size
        self._name = (seed, "masked", stream.split)

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, numbers: Sequence[int], step: int, index: int, rows: int | None = None) -> Batch:
        plain = self.windows.batch(numbers, step, index, rows)
        ids, there = plain.inputs["ids"], plain.targets.get("mask")
        chosen, hidden, shown = np.zeros(ids.shape, bool), np.zeros(ids.shape, bool), ids.copy()
        for row, number in enumerate(numbers):
            length = self.context if there is None else int(there[row].sum())
            if length:
                own = slice(row, row + 1), slice(0, length)
                chosen[own], hidden[own], shown[own] = self._drawn(ids[row, :length], step, int(number))
        at = np.flatnonzero(chosen).astype(np.int32)
        count, padded = len(at), -(-len(at) // order.MOST) * order.MOST
        mask = np.arange(padded) < count
        at = np.concatenate([at, np.zeros(padded - count, np.int32)])
        targets = {"ids": ids.reshape(-1)[at], "at": at, "mask": mask}
        return replace(plain, inputs={"ids": shown, "hidden": hidden}, targets=targets, count=count)

    def _drawn(self, ids: np.ndarray, step: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(chosen, hidden, ids that are shown) of a window. Shapes: (t,) -> (t,) each."""
        length, key = len(ids), key_of(*self._name, number)
        draws = uniform(key, 0, 3 * length, step).reshape(3, length)
        begins, ends = self.inner
        word = np.ones(length, np.int64)  # 1 where one begins
        word[1:] = ~(begins[ids[1:]] & ends[ids[:-1]])
        first = np.flatnonzero(word)
        lot = np.repeat(draws[0, first], np.diff([*first, length]))
        lot[ids == self.eot] = np.inf  # the end of a text is none of its words
        chosen = (
            lot < max(self.rate, np.nextafter(lot.min(), np.inf)) if np.isfinite(lot).any() else np.zeros(length, bool)
        )
        other = chosen & (draws[1] < OTHER)
        hidden = chosen & (draws[1] >= OTHER + SHOWN)
        drawn = (draws[2] * self.vocabulary).astype(ids.dtype)
        return chosen, hidden, np.where(other, drawn, ids)
