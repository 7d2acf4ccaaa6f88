"""Everything random: Philox4x32-10 and a keyed permutation that is computed, never stored.

A random number is a pure function of a key, made from (seed, name), and a counter, made from
(step, micro-batch, *global* element index). No generator object is carried around, and no rank number
enters, so a value does not depend on who draws it.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. The same
function is to exist in C and CUDA; the published known answers are in tests/serial/test_rng.py.
"""

import hashlib

import numpy as np

from mlm_mpi import exact

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_CHUNK = 1 << 14  # counters per pass: the work arrays, 128 KiB each, stay in a core's L2 cache

Key = tuple[int, int]
Keys = Key | tuple[np.ndarray, np.ndarray]  # one for all, or one for each
Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def key_of(seed: int, *names: object) -> Key:
    """Two 32-bit key words for a seed and a path of names: the first 8 bytes of a SHA-256."""
    text = "\x1f".join([str(int(seed)), *map(str, names)])
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[0:4], "little"), int.from_bytes(digest[4:8], "little")


def philox(counter: Words, key: Keys) -> Words:
    """Philox4x32-10 of four uint32 counter words under a key.

    Shapes: four arrays (or scalars) that broadcast to one shape -> four uint32 arrays of that shape. The words of the
    key may be arrays of that shape too.
    """
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)  # ten rounds mix every word into all four
    k0, k1 = (np.asarray(word, np.uint64) for word in key)
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32)


def words(key: Key, start: int, count: int, step: int = 0, micro_batch: int = 0) -> np.ndarray:
    """uint32 words number start … start+count-1 of the stream (key, step, micro-batch).

    Word e is word e mod 4 of counter (e div 4 low, e div 4 high, micro-batch, step).
    """
    first, last = start // 4, -(-(start + count) // 4)
    out = np.empty((last - first, 4), np.uint32)
    tail = (np.asarray(micro_batch & 0xFFFFFFFF, np.uint32), np.asarray(step & 0xFFFFFFFF, np.uint32))
    for a in range(first, last, _CHUNK):
        index = np.arange(a, min(a + _CHUNK, last), dtype=np.uint64)
        quad = philox(((index & _LOW).astype(np.uint32), (index >> _SHIFT).astype(np.uint32), *tail), key)
        for column, word in enumerate(quad):
            out[a - first : a - first + len(index), column] = word
    return out.reshape(-1)[start - 4 * first : start - 4 * first + count]


def uniform(key: Key, start: int, count: int, step: int = 0, micro_batch: int = 0) -> np.ndarray:
    """float32 in [0, 1): the top 24 bits of each word, so that every value is exact."""
    return (words(key, start, count, step, micro_batch) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def normal(key: Key, start: int, count: int) -> np.ndarray:
    """float64 standard normals number start … start+count-1 by Box-Muller on word pairs, the same bits everywhere.

    Source: Box, Muller, Annals of Mathematical Statistics 29 (1958).
    """
    first, last = start // 2, -(-(start + count) // 2)
    out = np.empty(2 * (last - first))
    for a in range(first, last, _CHUNK):
        b = min(a + _CHUNK, last)
        pair = words(key, 2 * a, 2 * (b - a)).reshape(-1, 2)
        squared = exact.log((pair[:, 0] + 1.0) * 2.0**-32)  # (0, 1]: the logarithm is finite
        squared *= -2.0
        radius = np.sqrt(squared, out=squared)  # rounded correctly, as IEEE 754 asks
        cosine, sine = exact.circle(pair[:, 1])
        part = out[2 * (a - first) : 2 * (b - first)].reshape(-1, 2)
        np.multiply(radius, cosine, out=part[:, 0])
        np.multiply(radius, sine, out=part[:, 1])
    return out[start - 2 * first : start - 2 * first + count]


def permute(key: Keys, n: int, index: np.ndarray) -> np.ndarray:
    """A keyed bijection of 0 … n-1, evaluated at `index`; nothing of size n is ever made.

    An 8-round balanced Feistel network on the smallest even number of bits that holds n, with Philox as
    round function, walked until the value falls below n (fewer than 4 steps expected).
    Source: Black, Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002 (cycle walking).

    Shapes: integers of any shape in [0, n) -> int64 of that shape; the words of the key are numbers, or arrays of that
    shape, a key for each index. Raises ValueError outside the range.
    """
    x = np.asarray(index, dtype=np.int64)
    if n < 1 or n > 1 << 62 or (x.size and (x.min() < 0 or x.max() >= n)):
        raise ValueError(f"permute needs 1 <= n <= 2^62 and indices in [0, n); n = {n}")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    flat = x.reshape(-1).astype(np.uint64)
    keys = [np.asarray(word, np.uint64).reshape(-1) for word in key]
    todo = np.arange(flat.size)
    while todo.size:
        for a in range(0, todo.size, _CHUNK):
            some = todo[a : a + _CHUNK]
            k0, k1 = (word if word.size == 1 else word[some] for word in keys)
            flat[some] = _feistel(flat[some], half, (k0, k1))
        todo = todo[flat[todo] >= np.uint64(n)]
    return flat.astype(np.int64).reshape(x.shape)


def _feistel(x: np.ndarray, half: int, key: Keys) -> np.ndarray:
    """Eight rounds over two halves of so many bits each. Shapes: (n,) uint64 -> the same."""
    mask, none = np.uint64((1 << half) - 1), np.asarray(0, np.uint32)
    left, right = x >> np.uint64(half), x & mask
    for number in range(8):  # a half has at most 31 bits
        word = philox((right, none, np.asarray(number, np.uint32), none), key)[0]
        left, right = right, (left ^ word.astype(np.uint64)) & mask
    return (left << np.uint64(half)) | right
