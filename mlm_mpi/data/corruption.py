"""Windows of a text from which spans are taken out and have to be written: how an encoder-decoder is pre-trained.

Of each span a sentinel stays in the text that the encoder reads, another one each; the decoder writes each sentinel
and the tokens of its span behind it, and one sentinel more at the end. Sentinels are tokens behind those of the
tokenizer, so that any tokenizer will do. Source: Raffel et al., T5, arXiv:1910.10683, section 3.1.4 and as released:
what is left out and what stays are cut into as many spans, at random, and alternate, what stays first. Spans are drawn
anew each time that a window is read.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlm_mpi import order
from mlm_mpi.data.batch import Batch
from mlm_mpi.data.stream import TokenStream
from mlm_mpi.data.translation import Pair, pairs_batch
from mlm_mpi.errors import DataError
from mlm_mpi.rng import key_of, words


@dataclass(frozen=True)
class Spans:
    """How much is taken out: this share of the tokens (above 0, below 1), in spans of this mean length (1 or more)."""

    rate: float
    length: float

    def counts(self, tokens: int) -> tuple[int, int]:
        """(tokens that are taken out, spans that they are), of a window of two tokens or more."""
        out = min(max(round(tokens * self.rate), 1), tokens - 1)
        return out, min(max(round(out / self.length), 1), tokens - out)

    def sides(self, tokens: int) -> tuple[int, int]:
        """(tokens that an encoder reads of such a window, tokens that a decoder writes), each with an end of text."""
        out, spans = self.counts(tokens)
        return tokens - out + spans + 1, out + spans + 2

    def window(self, context: int) -> int:
        """The tokens of the longest window whose sides both fit a context; 1 where none does."""
        found = range(2, 2 * context + 2)
        return 1 + bisect_left(found, context + 1, key=lambda tokens: max(self.sides(tokens)))

    def sentinels(self, context: int) -> int:
        """Sentinels of the longest window, filled up to a multiple of 8, so that sums over the vocabulary have the
        shares that they have without."""
        most = self.counts(self.window(context))[1] + 1
        return -(-most // order.MOST) * order.MOST


class Corrupted:
    """The samples of a split: sample w is the window of tokens wn … wn + n − 1. In training whole ones only; else the
    last one may be short. Draws are of the stream, the step and the sample's number.

    Shapes of a batch: those of `pairs_batch`, of texts of ids below vocabulary + sentinels.
    """

    def __init__(
        self, stream: TokenStream, context: int, training: bool, vocabulary: int, eot: int, spans: Spans, seed: int
    ) -> None:
        """`context`: of either side, with room for a window. `vocabulary`: tokens of the tokenizer."""
        self.stream, self.spans, self.tokens = stream, spans, spans.window(context)
        self.vocabulary, self.eot = vocabulary, eot
        self._count = stream.tokens // self.tokens if training else -(-max(0, stream.tokens - 1) // self.tokens)
        self._name = (seed, "corrupted", stream.split)

    def __len__(self) -> int:
        return self._count

    def batch(self, numbers: Sequence[int], step: int, index: int, rows: int | None = None) -> Batch:
        """No text is padded, whatever `rows` says."""
        if not self._count:
            raise DataError(
                f"{self.stream.split} has {self.stream.tokens} tokens, a window has {self.tokens}: prepare with a "
                "larger --heldout or more text, or lower model.context"
            )
        return pairs_batch([self._pair(int(number), step) for number in numbers], self.eot, step, index)

    def _pair(self, number: int, step: int) -> Pair:
        start = number * self.tokens
        ids = self.stream.read(start, min(start + self.tokens, self.stream.tokens)).astype(np.int32)
        out, spans = self.spans.counts(len(ids))
        draws = words(key_of(*self._name, number), 0, len(ids) - 2, step)
        stays, taken = cut(len(ids) - out, spans, draws[out - 1 :]), cut(out, spans, draws[: out - 1])
        source, target = corrupted(ids, stays, taken, self.vocabulary)
        end = np.array([self.eot], np.int32)
        return Pair(np.concatenate([source, end]), np.concatenate([end, target]), np.concatenate([target, end]))


def cut(tokens: int, spans: int, draws: np.ndarray) -> np.ndarray:
    """Lengths of so many spans, each at least 1, of so many tokens: every way to cut them is as likely as any other.

    `draws` (tokens − 1,): where the lowest are, a span ends. Shapes: -> (spans,).
    """
    ends = np.sort(np.argsort(draws, kind="stable")[: spans - 1]) + 1
    return np.diff([0, *ends, tokens])


def corrupted(ids: np.ndarray, stays: np.ndarray, taken: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """(what an encoder reads, what a decoder writes), without ends of text. `stays`, `taken` (spans,): lengths of what
    alternates; `first`: the first sentinel. Shapes: ids (n,) int32 -> int32 each."""
    pieces = np.split(ids, np.cumsum(np.stack([stays, taken], axis=1).reshape(-1))[:-1])
    sentinels = [np.array([first + number], np.int32) for number in range(len(taken) + 1)]
    source = [part for pair in zip(pieces[::2], sentinels[:-1], strict=True) for part in pair]
    target = [part for pair in zip(sentinels[:-1], pieces[1::2], strict=True) for part in pair]
    return np.concatenate(source), np.concatenate([*target, sentinels[-1]])
