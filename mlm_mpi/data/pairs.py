"""Pairs of words that stand near each other, and words drawn by chance beside each: what skip-gram learns from.

Sources: Mikolov et al., arXiv:1301.3781 (the window), arXiv:1310.4546 (words drawn by chance, frequent ones left out).
Where papers and word2vec.c differ, it is word2vec.c: words are left out before windows are laid, and a window reaches a
distance drawn anew for each word. Every draw is keyed by seed, step, micro-batch and place, and by no rank.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mlm_mpi import exact
from mlm_mpi.data.batch import Batch
from mlm_mpi.data.stream import TokenStream
from mlm_mpi.errors import DataError
from mlm_mpi.rng import Key, key_of, uniform, words

_PIECE_TOKENS = 1 << 20
_FINENESS = 2.0**30  # parts of the most frequent word: 16 million words of them all fit into an int64 many times over


def counted(streams: Iterable[TokenStream], vocabulary: int, left_out: Sequence[int]) -> np.ndarray:
    """How often each token comes up, 0 for those left out. Reads all. Shapes: -> (V,) int64. Raises DataError."""
    found = np.zeros(vocabulary, np.int64)
    for stream in streams:
        for start in range(0, stream.tokens, _PIECE_TOKENS):
            tokens = stream.read(start, min(start + _PIECE_TOKENS, stream.tokens))
            found += np.bincount(tokens, minlength=vocabulary)
    found[list(left_out)] = 0
    if not found.any():
        raise DataError("train has no word that vectors could be learnt of: prepare more text, or a larger --vocab")
    return found


def kept(counts: np.ndarray, threshold: float) -> np.ndarray:
    """With which probability a token stays, √x + x for x = threshold / its share of the text; of a threshold 0: all.

    Tokens that were not counted go. Shapes: (V,) int64 -> (V,) float64. Source: word2vec.c, which arXiv:1310.4546,
    section 2.3, describes with √x alone.
    """
    if not threshold:
        return (counts > 0).astype("f8")
    x = threshold * int(counts.sum()) / np.maximum(counts, 1)
    return np.where(counts > 0, np.sqrt(x) + x, 0.0)


class Noise:
    """Draws tokens by their counts to a power, 0.75 in arXiv:1310.4546, section 2.2."""

    def __init__(self, counts: np.ndarray, power: float) -> None:
        """Shapes: (V,) int64."""
        self._tokens = np.flatnonzero(counts).astype(np.int32)
        weights = exact.exp(power * exact.log(counts[self._tokens].astype("f8")))
        self._ends = np.cumsum(np.ceil(weights * (_FINENESS / weights.max())).astype(np.int64))

    def draw(self, key: Key, first: int, count: int, step: int, index: int) -> np.ndarray:
        """Draws number first … first + count − 1 of a micro-batch. Shapes: -> (count,) int32."""
        high, low = words(key, 2 * first, 2 * count, step, index).reshape(-1, 2).astype(np.uint64).T
        share = ((high >> np.uint64(5)) * 2.0**26 + (low >> np.uint64(6))) * 2.0**-53  # exact, below 1
        place = np.minimum((share * self._ends[-1]).astype(np.int64), self._ends[-1] - 1)
        return self._tokens[np.searchsorted(self._ends, place, side="right")]


@dataclass(frozen=True)
class Drawing:
    """How pairs are drawn from text. `keep`: probabilities (V,); `window`: words on either side, at most; `negatives`:
    words drawn by chance for each pair; `end`: the token that ends a document."""

    seed: int
    keep: np.ndarray
    noise: Noise
    window: int
    negatives: int
    end: int


class Pairs:
    """Sample w is the stretch of tokens wT … wT+T−1; no pair lies across its borders, nor across those of documents.

    Shapes of a batch of n pairs: ids (n, 1) int32, each pair's centre; targets ids (n, 1 + K) int32, its neighbour and
    the words drawn by chance. n is what chance makes it; a micro-batch without pairs has one, of the end of text with
    itself, whose vectors nobody asks for.
    """

    def __init__(self, stream: TokenStream, context: int, whole: bool, drawing: Drawing) -> None:
        """`whole`: a shorter stretch at the end is left out."""
        self.stream, self.context, self.drawing = stream, context, drawing
        self._count = stream.tokens // context if whole else -(-stream.tokens // context)
        self._keys = {what: key_of(drawing.seed, "pairs", stream.split, what) for what in ("keep", "reach", "noise")}

    def __len__(self) -> int:
        return self._count

    def batch(self, numbers: Sequence[int], step: int, index: int, rows: int | None = None) -> Batch:
        drawing, numbers = self.drawing, [int(number) for number in numbers]
        centres, near = self._pairs(numbers, step, index)
        count, most = len(centres), 2 * drawing.window * drawing.negatives  # of a token
        chance = drawing.noise.draw(
            self._keys["noise"], numbers[0] * self.context * most, count * drawing.negatives, step, index
        )
        found = np.concatenate([near[:, None], chance.reshape(count, -1)], axis=1)
        return Batch(step, index, {"ids": centres[:, None]}, {"ids": found}, count)

    def _pairs(self, numbers: Sequence[int], step: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(centres, neighbours) of some stretches, by distance. Shapes: (n,), (n,) int32, n ≥ 1."""
        left_over = [self._left_over(number, step, index) for number in numbers]
        ids, reach, pieces = (np.concatenate(parts) for parts in zip(*left_over, strict=True))
        centres, near = [], []
        for distance in range(1, self.drawing.window + 1):
            left, right = slice(None, -distance), slice(distance, None)
            together = pieces[left] == pieces[right]
            for one, other in ((left, right), (right, left)):
                chosen = together & (reach[one] >= distance)
                centres.append(ids[one][chosen])
                near.append(ids[other][chosen])
        if not any(map(len, centres)):
            centres = near = [np.array([self.drawing.end], np.int32)]
        return np.concatenate(centres), np.concatenate(near)

    def _left_over(self, number: int, step: int, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of a stretch the tokens that stay, how far the window of each reaches, and a number for each document.

        Shapes: (m,) int32, int64, int64, m ≤ T.
        """
        first = number * self.context
        ids = self.stream.read(first, min(first + self.context, self.stream.tokens)).astype(np.int32)
        stays = uniform(self._keys["keep"], first, len(ids), step, index) < self.drawing.keep[ids]
        drawn = words(self._keys["reach"], first, len(ids), step, index).astype(np.int64)
        reach = 1 + (drawn * self.drawing.window >> 32)
        pieces = first + number + np.cumsum(ids == self.drawing.end)  # of no two stretches alike
        return ids[stays], reach[stays], pieces[stays]
