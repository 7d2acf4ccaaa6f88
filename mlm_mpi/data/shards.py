"""One shard: an HDF5 file of token ids and of where its documents begin.

    /tokens   (tokens,)         smallest unsigned type that holds the vocabulary, chunked, gzip, fletcher32
    /offsets  (documents + 1,)  uint64; document d is tokens[offsets[d] : offsets[d + 1]], its end included
    attributes: format, tokenizer, split, tokens, documents, characters

The file is built in memory and written as plain bytes: h5py that meets a full disk can take the
interpreter down at exit. A reader trusts the catalog's hash, never a file that merely opens.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mlm_mpi.errors import DataError
from mlm_mpi.files import publish, sha256_of

FORMAT = 1
_CHUNK_TOKENS = 1 << 14  # a random window of some hundred tokens decompresses 32 KiB, not more
_AGAIN = "run mlm-mpi prepare again"


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


def write_shard(
    folder: Path, name: str, split: str, documents: Sequence[np.ndarray], characters: int, utf8_bytes: int,
    tokenizer_hash: str, vocab_size: int,
) -> ShardEntry:  # fmt: skip
    """Publishes `<name>-<first 8 digits of its hash>.h5`; equal content gives equal bytes and name.

    Shapes: one array of ids per document, its end of text included. Raises DataError.
    """
    tokens = np.concatenate(documents).astype(token_type(vocab_size))
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.uint64)
    attributes = {
        "format": FORMAT, "tokenizer": tokenizer_hash, "split": split, "tokens": len(tokens),
        "documents": len(documents), "characters": characters,
    }  # fmt: skip
    image = _image(tokens, offsets, attributes)
    sha256 = hashlib.sha256(image).hexdigest()
    file = f"{name}-{sha256[:8]}.h5"
    publish(folder / file, image)
    return ShardEntry(file, split, len(image), sha256, len(tokens), len(documents), characters, utf8_bytes)


def _image(tokens: np.ndarray, offsets: np.ndarray, attributes: dict[str, Any]) -> bytes:
    memory = io.BytesIO()
    with h5py.File(memory, "w", libver="latest") as file:
        for name, values in (("tokens", tokens), ("offsets", offsets)):
            file.create_dataset(
                name, data=values, chunks=(min(_CHUNK_TOKENS, len(values)),), compression="gzip",
                compression_opts=4, shuffle=True, fletcher32=True, track_times=False,
            )  # fmt: skip
        for name, value in attributes.items():
            file.attrs[name] = value
    return memory.getvalue()  # of the closed file: HDF5 1.14's image of an open one does not open again


def verify(path: Path, entry: ShardEntry) -> None:
    """Compares a whole file with the catalog: size, then SHA-256. Raises DataError."""
    check_size(path, entry)
    try:
        found = sha256_of(path)
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror}: {_AGAIN}") from None
    if found != entry.sha256:
        raise DataError(
            f"shard {path} is damaged: SHA-256 {found[:16]}…, the catalog says {entry.sha256[:16]}…: {_AGAIN}"
        )


def check_size(path: Path, entry: ShardEntry) -> None:
    """The cheap part of `verify`: the file is there and as long as the catalog says. Raises DataError."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"shard {path} of {entry.bytes} bytes is missing ({error.strerror}): {_AGAIN}") from None
    if size != entry.bytes:
        raise DataError(f"shard {path} has {size} bytes, the catalog says {entry.bytes}: {_AGAIN}")


class ShardReader:
    """An open shard whose whole content was compared with the catalog before the first token."""

    def __init__(self, path: Path, entry: ShardEntry, tokenizer_hash: str, verified: bool = False) -> None:
        """`verified`: this process has compared the file before. Raises DataError."""
        self.path = path
        self.entry = entry
        if not verified:
            verify(path, entry)
        try:
            # Network file systems often refuse locks; the file is never changed in place.
            self._file = h5py.File(path, "r", locking=False)
            self._tokens = self._file["tokens"]
            attributes = dict(self._file.attrs)
        except (OSError, KeyError) as error:
            raise DataError(f"shard {path} is not a shard of mlm-mpi ({error}): {_AGAIN}") from None
        expected = {"format": FORMAT, "tokenizer": tokenizer_hash, "split": entry.split, "tokens": entry.tokens}
        for name, value in expected.items():
            if attributes.get(name) != value:
                self.close()
                raise DataError(f"shard {path} has {name} {attributes.get(name)}, the catalog says {value}: {_AGAIN}")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop − 1 of this shard, in their stored type. Raises DataError."""
        try:
            return np.asarray(self._tokens[start:stop])
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"cannot read tokens {start} to {stop} of shard {self.path} ({reason}): {_AGAIN}") from None

    def offsets(self) -> np.ndarray:
        """(documents + 1,) uint64: where each document begins, and the end of the last."""
        return np.asarray(self._file["offsets"][:])

    def close(self) -> None:
        self._file.close()
