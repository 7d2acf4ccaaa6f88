"""Near-identical documents: MinHash signatures, banded, and the clusters they form.

Two documents with Jaccard similarity J of their 3-word shingles share at least one of 24 bands of 6
minima with probability 1 − (1 − J⁶)²⁴: 0.999 at J = 0.8, 0.31 at 0.5, 0.02 at 0.3. A word is what
stands between spaces, so text written without spaces is compared as a whole.

Source: Broder, "On the resemblance and containment of documents", SEQUENCES 1997; banding as in
Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3.
"""

from collections.abc import Callable, Sequence

import numpy as np

from mlm_mpi.rng import key_of, words

BANDS, ROWS = 24, 6
_PIECE_BYTES = 1 << 18  # work arrays of a piece stay in a core's cache; also bounds memory for huge documents
_PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd, hence invertible modulo 2^64
_INVERSE = np.uint64(pow(int(_PRIME), -1, 1 << 64))
_SALTS = words(key_of(0, "minhash"), 0, 2 * BANDS * ROWS).view(np.uint64) | np.uint64(1)


def bands(texts: Sequence[str], told: Callable[[int], None] = lambda size: None) -> np.ndarray:
    """Band hashes of each document; equal in one band means probably similar.

    `told` hears of every so many bytes that are done. Shapes: n texts, none of them blank -> (n, BANDS) uint64.
    """
    minima = np.full((len(texts), BANDS * ROWS), np.uint64(2**64 - 1))
    batch: list[bytes] = []
    owners: list[int] = []
    size = 0

    def flush() -> None:
        if batch:
            np.minimum.at(minima, owners, _minima(batch))
            told(sum(map(len, batch)))
        batch.clear()
        owners.clear()

    for owner, text in enumerate(texts):
        data = text.lower().encode()
        for start in range(0, len(data), _PIECE_BYTES):
            piece = data[start : start + _PIECE_BYTES]
            if not piece.strip():
                continue
            if size + len(piece) > _PIECE_BYTES:
                flush()
                size = 0
            batch.append(piece)
            owners.append(owner)
            size += len(piece)
    flush()
    mixed = _mix(minima.reshape(len(texts), BANDS, ROWS))
    weights = _SALTS[: BANDS * ROWS].reshape(BANDS, ROWS)
    return (mixed * weights).sum(axis=2, dtype=np.uint64)


def clusters(band_hashes: np.ndarray) -> np.ndarray:
    """The cluster of each document, named by its first member: documents that share a band are linked.

    Shapes: (n, BANDS) uint64 -> (n,) int64.
    """
    parent = list(range(len(band_hashes)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for column in np.ascontiguousarray(band_hashes.T):
        order = np.argsort(column, kind="stable")
        same = np.flatnonzero(column[order[1:]] == column[order[:-1]])
        for a, b in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
            a, b = root(a), root(b)
            parent[max(a, b)] = min(a, b)
    return np.array([root(i) for i in range(len(parent))], np.int64)


def _minima(documents: Sequence[bytes]) -> np.ndarray:
    """Shapes: n documents, each with at least one word -> (n, BANDS·ROWS) uint64."""
    shingles, first = _shingles(documents)
    out = np.empty((len(documents), BANDS * ROWS), np.uint64)
    for column in range(BANDS * ROWS):
        out[:, column] = np.minimum.reduceat(_mix(shingles ^ _SALTS[column]), first)
    return out


def _shingles(documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(hash of the 3 words from each word on, index of each document's first word).

    A word's hash is its polynomial in _PRIME modulo 2^64, read off prefix sums: no loop over words.
    """
    text = np.frombuffer(b" ".join(documents) + b" ", np.uint8)
    lengths = np.fromiter(map(len, documents), np.int64, len(documents)) + 1
    inside = np.concatenate([[False], text > 32])  # text ends with a space: every word ends
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    begin, end = edges[0::2], edges[1::2]
    powers = np.cumprod(np.full(len(text), _PRIME))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(text * powers)])
    unshift = np.cumprod(np.full(len(text), _INVERSE))
    hashes = _mix((sums[end] - sums[begin]) * unshift[begin])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    first = np.searchsorted(begin, starts[:-1])
    last = np.searchsorted(begin, starts[1:])
    left = np.repeat(last, last - first) - np.arange(len(begin))  # words to the document's end, this one too
    second = np.where(left > 1, np.roll(hashes, -1), np.uint64(0))
    third = np.where(left > 2, np.roll(hashes, -2), np.uint64(0))
    return hashes * _SALTS[0] + second * _SALTS[1] + third * _SALTS[2], first


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), a bijection."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
