"""One shard: an HDF5 file of token ids and of where its documents begin.

    /tokens   (tokens,)         smallest unsigned type that holds the vocabulary, chunked, gzip, fletcher32
    /offsets  (documents + 1,)  uint64; document d is tokens[offsets[d] : offsets[d + 1]], its end included
    /<column> (documents,)      of labelled texts: what else is known of each, such as its label
    /<mark>   (tokens,)         of tagged ones: what else is known of each token
    attributes: format, tokenizer, split, tokens, documents, characters; texts as bytes of a fixed length

The file is built in memory and written as plain bytes: h5py that meets a full disk can take the
interpreter down at exit. A reader trusts the catalog's hash, never a file that merely opens, and what the
hash covers it takes apart as something that anybody may have made (`hdf5`).
"""

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mlm_mpi import hdf5
from mlm_mpi.errors import DataError
from mlm_mpi.files import open_regular, publish

FORMAT = 2
_CHUNK_TOKENS = 1 << 14  # a random window of some hundred tokens decompresses 32 KiB, not more
_AGAIN = "run mlm-mpi prepare again"

Stamp = tuple[int, ...]  # which file this is, and when it was last changed


@dataclass(frozen=True)
class ShardEntry:
    """What the catalog says about a shard. `characters` and `utf8_bytes` are of the text, ends not counted."""

    file: str
    split: str
    bytes: int
    sha256: str
    tokens: int
    documents: int
    characters: int
    utf8_bytes: int


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every id."""
    return np.min_scalar_type(vocab_size - 1)


def most_bytes(tokens: int, documents: int, vocab_size: int, column_bytes: int = 0, mark_bytes: int = 0) -> int:
    """What a shard can need, however badly it is compressed: chunks of up to twice its numbers, and headers.

    `column_bytes`: of a document in all columns; `mark_bytes`: of a token in all marks.
    """
    of_token = token_type(vocab_size).itemsize + mark_bytes
    return 2 * (tokens * of_token + (8 + column_bytes) * (documents + 1)) + (1 << 16)


def write_shard(
    folder: Path, name: str, split: str, documents: Sequence[np.ndarray], characters: int, utf8_bytes: int,
    tokenizer_hash: str, vocab_size: int, columns: Mapping[str, np.ndarray] | None = None,
    marks: Mapping[str, np.ndarray] | None = None,
) -> ShardEntry:  # fmt: skip
    """Publishes `<name>-<first 8 digits of its hash>.h5`; equal content gives equal bytes and name.

    Shapes: one array of ids per document, an end of text included; columns (documents,); marks (tokens,). Raises
    DataError.
    """
    tokens = np.concatenate(documents).astype(token_type(vocab_size))
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.uint64)
    attributes = {
        "format": FORMAT, "tokenizer": np.bytes_(tokenizer_hash), "split": np.bytes_(split), "tokens": len(tokens),
        "documents": len(documents), "characters": characters,
    }  # fmt: skip
    columns, marks = dict(columns or {}), dict(marks or {})
    image = _image({"tokens": tokens, "offsets": offsets, **columns, **marks}, attributes)
    view = memoryview(image)
    try:
        kinds, of_tokens = ({name: values.dtype for name, values in some.items()} for some in (columns, marks))
        expected = _expected(len(tokens), len(documents), vocab_size, kinds, of_tokens)
        hdf5.examine(lambda offset, size: view[offset : offset + size], len(image), expected)
    except hdf5.FormatError as error:
        raise DataError(f"h5py {h5py.__version__} made a shard that {error}: install an earlier h5py") from None
    sha256 = hashlib.sha256(image).hexdigest()
    file = f"{name}-{sha256[:8]}.h5"
    publish(folder / file, image)
    return ShardEntry(file, split, len(image), sha256, len(tokens), len(documents), characters, utf8_bytes)


def _expected(
    tokens: int, documents: int, vocab_size: int, columns: Mapping[str, np.dtype[Any]],
    marks: Mapping[str, np.dtype[Any]],
) -> dict[str, hdf5.Expected]:  # fmt: skip
    lengths = {name: (documents, dtype) for name, dtype in columns.items()}
    lengths |= {name: (tokens, dtype) for name, dtype in marks.items()}
    return {
        "tokens": hdf5.Expected((tokens,), token_type(vocab_size), hdf5.PACKED),
        "offsets": hdf5.Expected((documents + 1,), np.dtype(np.uint64), hdf5.PACKED),
    } | {name: hdf5.Expected((length,), dtype, hdf5.PACKED) for name, (length, dtype) in lengths.items()}


def _image(arrays: dict[str, np.ndarray], attributes: dict[str, Any]) -> bytes:
    memory = io.BytesIO()
    with h5py.File(memory, "w", libver="latest") as file:
        for name, values in arrays.items():
            file.create_dataset(
                name, data=values, chunks=(min(_CHUNK_TOKENS, len(values)),), compression="gzip",
                compression_opts=4, shuffle=True, fletcher32=True, track_times=False,
            )  # fmt: skip
        for name, value in attributes.items():
            file.attrs[name] = value
    return memory.getvalue()  # of the closed file: HDF5 1.14's image of an open one does not open again


class ShardReader:
    """An open shard whose whole content was compared with the catalog before the first token."""

    def __init__(
        self, path: Path, entry: ShardEntry, tokenizer_hash: str, vocab_size: int, verified: Stamp | None = None,
        columns: Mapping[str, np.dtype[Any]] | None = None, marks: Mapping[str, np.dtype[Any]] | None = None,
    ) -> None:  # fmt: skip
        """`verified`: the stamp of the file that this process has compared before. `columns`, `marks`: names and types
        of those that it has. Raises DataError."""
        self.path, self.entry, self._vocab_size = path, entry, vocab_size
        self._column_types, self._mark_types = dict(columns or {}), dict(marks or {})
        self._held: tuple[int, np.ndarray] | None = None  # the chunk read last, decoded
        self._file = _open(path, entry)
        try:
            self.stamp = _stamp(self._file)
            if self.stamp != verified:
                _verify(self._file, path, entry)
            self._examine(tokenizer_hash)
            if self.stamp != verified:
                self.offsets()
        except BaseException:
            self.close()
            raise

    def _examine(self, tokenizer_hash: str) -> None:
        entry = self.entry
        datasets = _expected(
            entry.tokens, entry.documents, self._vocab_size, self._column_types, self._mark_types
        )  # fmt: skip
        try:
            found, attributes = hdf5.examine(self._fetch, entry.bytes, datasets)
        except hdf5.FormatError as error:
            raise DataError(f"shard {self.path} {error}: {_AGAIN}") from None
        except OSError as error:
            raise _unreadable(self.path, entry, error) from None
        expected = {
            "format": FORMAT, "tokenizer": tokenizer_hash, "split": entry.split, "tokens": entry.tokens,
            "documents": entry.documents, "characters": entry.characters,
        }  # fmt: skip
        for name, value in expected.items():
            if attributes.get(name) != value:
                raise DataError(
                    f"shard {self.path} has {name} {attributes.get(name)}, the catalog says {value}: {_AGAIN}"
                )
        self._tokens, self._offsets = found["tokens"], found["offsets"]
        self._columns = {name: found[name] for name in (*self._column_types, *self._mark_types)}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop − 1 of this shard, in their stored type. Raises DataError."""
        size = self._tokens.chunk_rows
        numbers = range(start // size, -(-stop // size))
        parts = [self._chunk(number)[max(0, start - number * size) : stop - number * size] for number in numbers]
        tokens = np.concatenate(parts) if parts else np.empty(0, self._tokens.expected.dtype)
        if tokens.size and tokens.max() >= self._vocab_size:
            raise DataError(
                f"shard {self.path} holds token {tokens.max()}, the vocabulary has {self._vocab_size}: {_AGAIN}"
            )
        return tokens

    def _chunk(self, number: int) -> np.ndarray:
        if self._held is None or self._held[0] != number:
            self._held = (number, self._decoded(self._tokens, number))
        return self._held[1]

    def _decoded(self, dataset: hdf5.Dataset, number: int) -> np.ndarray:
        try:
            return dataset.chunk(number, self._fetch)
        except (OSError, hdf5.FormatError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"cannot read chunk {number} of shard {self.path} ({reason}): {_AGAIN}") from None

    def _fetch(self, offset: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)

    def offsets(self) -> np.ndarray:
        """(documents + 1,) uint64: where each document begins, and the end of the last. Raises DataError."""
        offsets = self._whole(self._offsets)
        if offsets[0] != 0 or offsets[-1] != self.entry.tokens or (offsets[1:] <= offsets[:-1]).any():
            raise DataError(f"shard {self.path} has documents that do not follow each other: {_AGAIN}")
        return offsets

    def column(self, name: str) -> np.ndarray:
        """(documents,) of a column, or (tokens,) of a mark, in its stored type. Raises DataError."""
        return self._whole(self._columns[name])

    def _whole(self, dataset: hdf5.Dataset) -> np.ndarray:
        return np.concatenate([self._decoded(dataset, number) for number in range(len(dataset.places))])

    def close(self) -> None:
        self._file.close()


def _open(path: Path, entry: ShardEntry) -> FileIO:
    """The file of this entry, unbuffered: the one descriptor that is hashed and then read."""
    try:
        return open(open_regular(path, path.parent), "rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, entry, error) from None


def _unreadable(path: Path, entry: ShardEntry, error: OSError) -> DataError:
    what = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
    return DataError(f"shard {path} of {entry.bytes} bytes {what} ({error.strerror}): {_AGAIN}")


def _stamp(file: FileIO) -> Stamp:
    now = os.fstat(file.fileno())
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


def _verify(file: FileIO, path: Path, entry: ShardEntry) -> None:
    """Compares a whole file with the catalog: size, then SHA-256. Raises DataError."""
    _compare_size(path, os.fstat(file.fileno()).st_size, entry)
    try:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, entry, error) from None
    if found != entry.sha256:
        raise DataError(
            f"shard {path} is damaged: SHA-256 {found[:16]}…, the catalog says {entry.sha256[:16]}…: {_AGAIN}"
        )


def check_size(path: Path, entry: ShardEntry) -> None:
    """The cheap part of what a reader checks: the file is there and as long as the catalog says. Raises DataError."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, entry, error) from None
    _compare_size(path, size, entry)


def _compare_size(path: Path, size: int, entry: ShardEntry) -> None:
    if size != entry.bytes:
        raise DataError(f"shard {path} has {size} bytes, the catalog says {entry.bytes}: {_AGAIN}")
