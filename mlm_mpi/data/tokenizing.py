"""Texts through a tokenizer, in batches that bound memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np

from mlm_mpi.data.shards import token_type
from mlm_mpi.data.tokenizer import Tokenizer

T = TypeVar("T")

BATCH_CHARACTERS = 1 << 20  # documents are signed and tokenised in batches of this size, to bound memory


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """One array of ids per text, its end included."""
    dtype = token_type(tokenizer.vocab_size)
    parts: list[np.ndarray] = []
    for batch in batches(pieces(texts), lambda piece: len(piece[0])):
        encoded = tokenizer.encode_batch([piece for piece, _ in batch])
        for (_, is_last), ids in zip(batch, encoded, strict=True):
            parts.append(np.array(ids, dtype))
            if is_last:
                yield np.concatenate([*parts, np.array([tokenizer.eot], dtype)])
                parts = []


def encode_pairs(tokenizer: Tokenizer, pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[np.ndarray, int]]:
    """(ids of both texts without an end of text, where the second begins among them) of each (text, second text).

    A second text that is "" is none: it begins at 0. Who is to label new texts encodes them like this, too.
    """
    found = encode(tokenizer, chain.from_iterable(pairs))
    for first, second in zip(found, found, strict=True):  # two at a time
        yield np.concatenate([first[:-1], second[:-1]]), len(first) - 1 if len(second) > 1 else 0


def encode_words(tokenizer: Tokenizer, sentences: Sequence[Sequence[str]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, where among them each word begins, -1: it has no token) of each sentence. Shapes: (t,), (n,) int32.

    Each word is encoded by itself, and by a byte-level tokenizer behind a space unless it is the first: the tokens that
    it has in a text. Who is to label new words encodes them like this, too.
    """
    between = " " if tokenizer.is_byte_level else ""
    spaced = [[between * (place > 0) + word for place, word in enumerate(words)] for words in sentences]
    names = list(dict.fromkeys(chain.from_iterable(spaced)))
    known = dict(zip(names, (ids[:-1] for ids in encode(tokenizer, names)), strict=True))
    nothing = np.zeros(0, token_type(tokenizer.vocab_size))
    for words in spaced:
        found = [known[word] for word in words]
        lengths = np.array([len(ids) for ids in found], np.int32)
        begins = np.where(lengths > 0, np.cumsum(lengths) - lengths, -1).astype(np.int32)
        yield np.concatenate([nothing, *found]), begins


def bounds_of(tokenizer: Tokenizer, ids: np.ndarray, text: str) -> np.ndarray | None:
    """Where the tokens of a text begin, in bytes of its UTF-8, and where the last one ends; None where they are not
    the text, byte by byte. Shapes: (t,) -> (t + 1,)."""
    parts = list(map(tokenizer.token_bytes, ids.tolist()))
    if not tokenizer.is_byte_level or b"".join(parts) != text.encode():
        return None
    return np.cumsum([0, *map(len, parts)])


def tokens_of(text: str, bounds: np.ndarray, start: int, stop: int) -> tuple[int, int]:
    """The fewest tokens that hold characters start … stop − 1: the first and one past the last; (0, 0) for none.
    `bounds`: as `bounds_of` has them."""
    if start >= stop:
        return 0, 0
    begin = len(text[:start].encode())
    end = begin + len(text[start:stop].encode())
    return int(np.searchsorted(bounds, begin, "right")) - 1, int(np.searchsorted(bounds, end, "left"))


def characters_of(text: str, bounds: np.ndarray, start: int, stop: int) -> tuple[int, int]:
    """The characters of tokens start … stop − 1, without blanks at their ends; of a character whose bytes are cut, all:
    the first and one past the last."""
    content = text.encode()
    first = len(content[: bounds[start]].decode(errors="ignore"))
    last = len(text) - len(content[bounds[stop] :].decode(errors="ignore"))
    found = text[first:last]
    first += len(found) - len(found.lstrip())
    return first, max(first, last - len(found) + len(found.rstrip()))


def pieces(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """(piece, is the text's last): huge texts in parts, cut behind a line end where there is one."""
    for text in texts:
        start = 0
        while len(text) - start > BATCH_CHARACTERS:
            stop = text.rfind("\n", start, start + BATCH_CHARACTERS) + 1 or start + BATCH_CHARACTERS
            yield text[start:stop], False
            start = stop
        yield text[start:], True


def batches(items: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """Runs of items with about BATCH_CHARACTERS characters."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += characters(item)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
