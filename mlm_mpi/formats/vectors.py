"""Word vectors as others write them, each compressed or not, told apart by their content.

    word2vec text, fastText .vec    a line "N C", then a line for each word: the word, C numbers, spaces between
    word2vec binary                 the same line, then for each word: the word, a space, C float32, little-endian
    GloVe                           lines as above without the first one; a word may hold spaces

A file is read once, a word at a time, in memory for that word and the set of words before it.
Sources: word2vec.c (Mikolov et al., 2013); Bojanowski et al., arXiv:1607.04606; Pennington et al., EMNLP 2014.
"""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from mlm_mpi.data.decoding import Content
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.errors import DataError
from mlm_mpi.files import publishing
from mlm_mpi.params.sources import Replaced, Source

MOST_NUMBERS = 1 << 16  # of a vector
MOST_WORDS = 1 << 24
_LONGEST_LINE = 1 << 21  # bytes: 2¹⁶ numbers of 16 digits and a word
_LONGEST_WORD = 1 << 12
_PIECE_BYTES = 1 << 20
_PIECE_ROWS = 1 << 14
_HEADER = re.compile(rb"\s*(\d{1,18})[ \t]+(\d{1,18})\s*")
_FASTTEXT = b"\xba\x16\x4f\x2f"  # the first bytes of its models
_MEND = "mend it, or get the file anew"


class Vectors(NamedTuple):
    """Words and their vectors (N, C) float32, in the order of a file or of the tokens of a model.

    `repeated`: words that the file has again, of which the first one counts.
    """

    words: list[str]
    rows: np.ndarray
    repeated: int = 0


class Record(NamedTuple):
    """A word of a file and its vector (C,) float32, finite; `where`: its place, for a person."""

    where: str
    word: str
    row: np.ndarray


# ---- reading


def read(path: Path, most: int = 0) -> Vectors:
    """The first `most` words, 0: all; of a word that comes again the first vector.

    Raises DataError: one line that names place, value and remedy.
    """
    words: list[str] = []
    pieces: list[np.ndarray] = []
    piece: list[np.ndarray] = []
    file = Records(path)
    for record in file:
        words.append(record.word)
        piece.append(record.row)
        if len(piece) == _PIECE_ROWS:
            pieces.append(np.stack(piece))
            piece = []
        if len(words) == most:
            break
    return Vectors(words, np.concatenate([*pieces, *([np.stack(piece)] if piece else [])]), file.repeated)


class Records:
    """The words of a file, one after the other, at least one; `repeated`: so many came again and were left out so far.

    Raises DataError.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.repeated = path, 0

    def __iter__(self) -> Iterator[Record]:
        path, seen = self.path, set[bytes]()
        self.repeated = 0
        with Content(path).binary() as file:
            for where, name, row in _parsed(path, file):
                if name in seen:
                    self.repeated += 1
                    continue
                if len(seen) == MOST_WORDS:
                    raise DataError(f"{where} is word {MOST_WORDS + 1:,}, {MOST_WORDS:,} are the most: cut the file")
                seen.add(name)
                yield _record(where, name, row)
        if not seen:
            raise DataError(f"{path} has no word: give a file of word vectors (word2vec, GloVe, fastText .vec)")


def _record(where: str, name: bytes, row: np.ndarray) -> Record:
    try:
        word = name.decode()
    except UnicodeDecodeError:
        raise DataError(
            f"{where} has the word {_shown(name)}, which is not UTF-8: convert the file (iconv -t UTF-8), or "
            "leave the word out"
        ) from None
    if not np.isfinite(row).all():
        value = row[~np.isfinite(row)][0]
        raise DataError(f"{where} has {value} in the vector of {word[:80]!r}, not a number: leave the word out")
    return Record(where, word, row)


_Raw = Iterator[tuple[str, bytes, np.ndarray]]


def _parsed(path: Path, file: BinaryIO) -> _Raw:
    """(place, word, vector) of each word of a file of any kind."""
    first = _line(path, file, 1)
    if first.startswith(_FASTTEXT):
        raise DataError(f"{path} is a model of fastText (.bin): give the .vec beside it")
    header = _HEADER.fullmatch(first)
    if header is None:
        yield from _lines(path, file, first, 1, _width(path, first))
        return
    count, width = map(int, header.groups())
    if not (1 <= count <= MOST_WORDS and 1 <= width <= MOST_NUMBERS):
        raise DataError(
            f"{path}:1 says {count} words of {width} numbers, at most {MOST_WORDS:,} of {MOST_NUMBERS:,} are read: "
            f"{_MEND}"
        )
    begin, found = file.readline(_LONGEST_LINE), 0
    raw = _lines(path, file, begin, 2, width)
    if _is_binary(begin, width):
        raw = _binary(path, _Bytes(begin, file), count, width)
    for found, record in enumerate(raw, 1):
        if found > count:
            raise DataError(f"{record[0]} is word {found:,}, and the first line says {count:,}: {_MEND}")
        yield record
    if found < count:
        raise DataError(f"{path} ends after {found:,} words, and its first line says {count:,}: {_MEND}")


def _is_binary(begin: bytes, width: int) -> bool:
    """Whether what follows the first line is no text: no line of numbers, and bytes that no text has."""
    if len(begin.split()) == width + 1:
        return False
    start = begin[: _LONGEST_WORD + 4 * width]
    try:
        start.decode()
    except UnicodeDecodeError as error:
        if error.end < len(start) or len(start) == len(begin):
            return True
    return re.search(rb"[\x00-\x08\x0e-\x1f]", start) is not None


# ---- text


def _line(path: Path, file: BinaryIO, number: int) -> bytes:
    line = file.readline(_LONGEST_LINE)
    if len(line) == _LONGEST_LINE:
        raise DataError(f"{path}:{number} has {_LONGEST_LINE:,} bytes or more, which no word's line has: {_MEND}")
    return line


def _width(path: Path, line: bytes) -> int:
    """Of a file without a header, by its first line."""
    numbers = line.split()[1:]
    if line and (not numbers or len(numbers) > MOST_NUMBERS or _numbers(numbers) is None):
        raise DataError(
            f"{path}:1 is neither a word with its numbers nor how many there are ({_shown(line)}): give a file of word "
            "vectors (word2vec, GloVe, fastText .vec)"
        )
    return len(numbers)


def _lines(path: Path, file: BinaryIO, line: bytes, number: int, width: int) -> _Raw:
    """From a line on, which has been read already."""
    while line:
        where = f"{path}:{number}"
        if line.strip():
            name, *found = line.strip(b" \t\r\n").rsplit(b" ", width)
            row = _numbers(found) if len(found) == width else None
            more = name.split()[1:]  # a word may hold spaces, but no numbers
            if row is None or (more and _numbers(more) is not None):
                raise _unlike(where, line.split(), width)
            yield where, name, row
        number += 1
        line = _line(path, file, number)


def _numbers(fields: Sequence[bytes]) -> np.ndarray | None:
    """float32, infinite where they are too large for one; None where one is no number."""
    text = b" ".join(fields)
    try:
        values = None if b"_" in text else np.array(list(map(float, fields)))
    except ValueError:
        return None
    with np.errstate(over="ignore"):
        return None if values is None else values.astype(np.float32)


def _unlike(where: str, fields: list[bytes], width: int) -> DataError:
    strange = next((field for field in fields[-width:] if _numbers([field]) is None), b"")
    if len(fields) == width + 1 and strange:
        return DataError(f"{where} has {_shown(strange)} where a number belongs: leave the word out, or {_MEND}")
    return DataError(
        f"{where} has {len(fields) - 1} numbers, and the vectors of this file {width}: leave the word out, or {_MEND}"
    )


def _shown(name: bytes) -> str:
    """For a message."""
    return repr(name[:80].decode(errors="backslashreplace"))


# ---- binary


class _Bytes:
    """What is left of a file of which something has been read."""

    def __init__(self, begin: bytes, file: BinaryIO) -> None:
        self._ready, self._at, self._file = begin, 0, file

    def until(self, end: bytes, most: int) -> bytes | None:
        """What stands before `end`, which is read too; None if that is not within so many bytes."""
        self._have(most)
        stop = self._ready.find(end, self._at, self._at + most)
        if stop < 0:
            return None
        found, self._at = self._ready[self._at : stop], stop + len(end)
        return found

    def take(self, count: int) -> bytes:
        """So many bytes, fewer at the end."""
        self._have(count)
        found = self._ready[self._at : self._at + count]
        self._at += len(found)
        return found

    def ends(self) -> bool:
        """Whether nothing is left but line ends."""
        self._have(2)
        return not self._ready[self._at : self._at + 2].strip()

    def _have(self, count: int) -> None:
        while len(self._ready) - self._at < count and (piece := self._file.read(_PIECE_BYTES)):
            self._ready, self._at = self._ready[self._at :] + piece, 0


def _binary(path: Path, content: _Bytes, count: int, width: int) -> _Raw:
    """`count` words at most, and one more if there is one."""
    for number in range(1, count + 2):
        if content.ends():
            return
        where, name = f"{path}:word {number}", content.until(b" ", _LONGEST_WORD)
        if name is None:
            raise DataError(f"{where} has no end within {_LONGEST_WORD:,} bytes: {_MEND}")
        vector = content.take(4 * width)
        if len(vector) < 4 * width:
            raise DataError(f"{where} ends after {len(vector)} of the {4 * width} bytes of its vector: {_MEND}")
        yield where, name.lstrip(b"\r\n"), np.frombuffer(vector, "<f4").astype(np.float32)


# ---- writing


def write(path: Path, vectors: Vectors) -> None:
    """Writes word2vec's text, durably and in one step: what is read again has the same bits. Raises StorageError."""
    count, width = vectors.rows.shape
    with publishing(path, 12 * vectors.rows.size) as descriptor, open(descriptor, "wb", closefd=False) as file:
        file.write(f"{count} {width}\n".encode())
        for word, row in zip(vectors.words, vectors.rows.tolist(), strict=True):
            file.write(f"{word} {' '.join(f'{number:.9g}' for number in row)}\n".encode())


# ---- words and tokens


def tokens_by_word(tokenizer: Tokenizer) -> dict[str, int]:
    """The token of each bare word; where two stand for one, that which begins it, behind a space."""
    named = [(tokenizer.word(number), number) for number in range(tokenizer.vocab_size)]
    found = {word: number for word, number in reversed(named) if word}
    if tokenizer.is_byte_level:
        found |= {word: number for word, number in named if word and tokenizer.token_bytes(number).startswith(b" ")}
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


class Known(NamedTuple):
    """Tokens whose word a file of vectors has: `ids` (n,) ascending, `rows` (n, C) float32, out of `tokens`.

    `repeated`: words that the file has again, of which the first one counts.
    """

    ids: np.ndarray
    rows: np.ndarray
    tokens: int
    repeated: int = 0

    def __str__(self) -> str:
        again = f" (the first of each word: {self.repeated:,} come again)" if self.repeated else ""
        return f"vectors of {len(self.ids):,} of {self.tokens:,} tokens{again}"

    def root_mean_square(self) -> float:
        """Of all numbers: their sum is exact before it is rounded, so that every machine finds the same."""
        squares = (square for row in self.rows for square in np.square(row, dtype="f8").tolist())
        return math.sqrt(math.fsum(squares) / self.rows.size)

    def times(self, factor: float) -> "Known":
        """The same, each number multiplied in float64 and rounded to float32, which may make it infinite."""
        with np.errstate(over="ignore"):
            return self._replace(rows=(self.rows * np.float64(factor)).astype(np.float32))


def known(path: Path, tokenizer: Tokenizer) -> Known:
    """The vectors that a file has for the tokens of a tokenizer: of the bare word as it is, else in small letters.

    Raises DataError as `Records` does, and where no token is known.
    """
    exact: dict[str, list[int]] = {}
    small: dict[str, list[int]] = {}
    for number in range(tokenizer.vocab_size):
        if word := tokenizer.word(number):
            exact.setdefault(word, []).append(number)
            if word.lower() != word:
                small.setdefault(word.lower(), []).append(number)
    rows: dict[int, np.ndarray] = {}
    second: dict[int, np.ndarray] = {}
    file = Records(path)
    for record in file:
        rows |= dict.fromkeys(exact.get(record.word, ()), record.row)
        second |= dict.fromkeys(small.get(record.word, ()), record.row)
    found = second | rows
    if not found:
        raise DataError(
            f"{path} has none of the {tokenizer.vocab_size:,} tokens of the tokenizer as a word: give vectors of its "
            "language, or a tokenizer of whole words (prepare --tokenizer words)"
        )
    ids = sorted(found)
    return Known(np.array(ids), np.stack([found[number] for number in ids]), tokenizer.vocab_size, file.repeated)


def initial(path: Path, found: Known, source: Source, table: str) -> Source:
    """`source`, but for the rows of its token table that a file has. Raises DataError for vectors of another width."""
    check_width(path, found, table, source.shape(table))
    return Replaced(source, table, found.ids, found.rows)


def check_width(path: Path, found: Known, table: str, shape: tuple[int, ...] | None) -> None:
    """`shape`: of the table, (V, C), or (V + n, C) with n rows behind those of the tokens. Raises DataError for vectors
    of another width."""
    width = found.rows.shape[1]
    if shape is None or shape[0] < found.tokens:
        raise DataError(f"{table} has the shape {shape} in this model, and its tokenizer {found.tokens:,} tokens")
    if shape[1] != width:
        raise DataError(
            f"{path} has vectors of {width} numbers, and {table} rows of {shape[1]}: set model.width = {width}, or "
            f"give vectors of {shape[1]}"
        )
