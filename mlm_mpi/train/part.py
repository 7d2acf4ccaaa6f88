"""One part of a checkpoint: an HDF5 file of boxes of global arrays, written and read a chunk at a time.

Never more than a chunk of it is in memory (about 1 MiB, or one row), on either way.

Writing. HDF5 makes the structure and every chunk goes past its filters (`write_direct_chunk`, with a Fletcher-32 of our
own): nothing is copied into HDF5, and the interpreter's lock is free in every long call. HDF5 writes through an object
that keeps the first OSError to itself: HDF5's own file on a full disk takes the interpreter down at exit, and an error
raised through it comes out as another one.

Reading. A part is compared with the size and SHA-256 of its manifest, then read a second time, so that no unverified
byte is parsed and none has to be kept. That the second reading sees the bytes of the first has three reasons: the
descriptor is the same or leads to a file of the same stamp (inode, size, time of change), the stamp is compared again
at the end, and every chunk is compared with its Fletcher-32.
"""

import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mlm_mpi import hdf5
from mlm_mpi.backend.arrays import to_host
from mlm_mpi.cut import Box
from mlm_mpi.files import open_regular, sha256_of_open
from mlm_mpi.train.manifest import WEIGHTS, DamagedCheckpoint, Manifest, Part, dataset

_CHUNK_BYTES = 1 << 20
_OPEN = 64  # descriptors of parts that a reader keeps, of the 1,024 a process may usually have


@dataclass(frozen=True)
class Piece:
    """What a part holds under a path: a box of a global array, which may lie in a GPU's memory."""

    path: str
    box: Box
    value: Any


class _Shield(io.RawIOBase):
    """A file as HDF5 is given it. After the first OSError, `error`, nothing is written any more and nobody is told."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.error: OSError | None = None
        self._descriptor, self._at = descriptor, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (os.fstat(self._descriptor).st_size if whence == os.SEEK_END else 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        return os.preadv(self._descriptor, [buffer], self._at)

    def write(self, content: Any) -> int:
        left = memoryview(content)
        size = len(left)
        try:
            while left and self.error is None:
                count = os.pwrite(self._descriptor, left, self._at)
                self._at, left = self._at + count, left[count:]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            if self.error is None:
                os.ftruncate(self._descriptor, self._at if size is None else size)
        except OSError as error:
            self.error = error
        return size or 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def write(descriptor: int, pieces: Sequence[Piece], dtype: np.dtype[Any]) -> tuple[int, str]:
    """Writes pieces of one dtype into an empty file that is open for reading too; returns its size and SHA-256.

    No timestamps, all checksummed. Raises OSError; FormatError where a `Reader` could not read what HDF5 has made.
    """
    file = _Shield(descriptor)
    with h5py.File(file, "w", libver="latest") as image:
        for piece in pieces:
            if file.error is None:
                _write_piece(image, piece, dtype.newbyteorder("<"), file)
    if file.error is not None:
        raise file.error
    size = os.fstat(descriptor).st_size
    _examine(descriptor, size, {piece.path: piece.box for piece in pieces}, dtype)
    return size, sha256_of_open(descriptor)


def _write_piece(image: h5py.File, piece: Piece, dtype: np.dtype[Any], file: _Shield) -> None:
    shape = piece.box.shape
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    rows = max(1, min(shape[0], _CHUNK_BYTES // row_bytes))
    made = image.create_dataset(piece.path, shape, dtype, chunks=(rows, *shape[1:]), fletcher32=True, track_times=False)
    made.attrs["box"] = _words(piece.box)
    chunk = np.zeros(rows * row_bytes + 4, np.uint8)
    values = chunk[:-4].view(dtype).reshape(rows, *shape[1:])
    for start in range(0, shape[0], rows):
        found = to_host(piece.value[start : start + rows])
        values[: len(found)] = found
        values[len(found) :] = 0
        chunk[-4:] = np.frombuffer(hdf5.fletcher32(chunk[:-4]), np.uint8)
        made.id.write_direct_chunk((start,) + (0,) * (len(shape) - 1), chunk)
        if file.error is not None:
            return


def _words(box: Box) -> np.bytes_:
    return np.bytes_(",".join(f"{start}:{stop}" for start, stop in box.to_list()))


def _examine(descriptor: int, size: int, boxes: dict[str, Box], dtype: np.dtype[Any]) -> dict[str, hdf5.Dataset]:
    """The datasets of a part by path. Reads no data. Raises FormatError, OSError."""
    expected = {path: hdf5.Expected(box.shape, dtype, hdf5.SUMMED) for path, box in boxes.items()}
    found, _ = hdf5.examine(lambda offset, count: os.pread(descriptor, count, offset), size, expected)
    for path, box in boxes.items():
        if found[path].attributes != {"box": _words(box).decode()}:
            raise hdf5.FormatError(f"does not hold {_words(box).decode()} of {path}")
    return found


class _File:
    """A part on disk, verified when it was opened first."""

    def __init__(self, path: Path, part: Part, manifest: Manifest) -> None:
        self.path, self.part = path, part
        self._descriptor: int | None = None
        self._stamp: tuple[int, ...] | None = None
        boxes = {dataset(kind, name, n): box for name, n, box in part.held() for kind in manifest.holding(name)}
        try:
            descriptor = self.open()
            if sha256_of_open(descriptor) != part.sha256:
                raise DamagedCheckpoint(f"{path} does not match the SHA-256 in its manifest")
            self._datasets = _examine(descriptor, part.bytes, boxes, np.dtype(manifest.dtype))
        except BaseException as error:
            self.let_go()
            if isinstance(error, OSError | hdf5.FormatError):
                raise self._damage(error) from None
            raise

    def open(self) -> int:
        """The descriptor of the file that was verified."""
        if self._descriptor is None:
            self._descriptor = open_regular(self.path, self.path.parent)
            size = os.fstat(self._descriptor).st_size
            if size != self.part.bytes:
                raise DamagedCheckpoint(f"{self.path} has {size} bytes, its manifest says {self.part.bytes}")
            self._stamp = self._stamp or self._stamp_now(self._descriptor)
            self.check()
        return self._descriptor

    def check(self) -> None:
        """Raises DamagedCheckpoint if it was changed since it was verified."""
        if self._descriptor is not None and self._stamp_now(self._descriptor) != self._stamp:
            raise DamagedCheckpoint(f"{self.path} was changed while it was read")

    def let_go(self) -> None:
        """Closes it until it is read again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _stamp_now(self, descriptor: int) -> tuple[int, ...]:
        now = os.fstat(descriptor)
        return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns

    def rows(self, path: str, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) of the chunks of a dataset that hold rows start … stop - 1."""
        data = self._datasets[path]
        try:
            descriptor = self.open()
            for number in range(start // data.chunk_rows, -(-stop // data.chunk_rows)):
                rows = data.chunk(number, lambda offset, size: os.pread(descriptor, size, offset), summed=True)
                yield number * data.chunk_rows, rows
        except (OSError, hdf5.FormatError) as error:
            raise self._damage(error) from None

    def _damage(self, error: OSError | hdf5.FormatError) -> DamagedCheckpoint:
        if isinstance(error, hdf5.FormatError):
            return DamagedCheckpoint(f"{self.path} {error}")
        return DamagedCheckpoint(
            f"{self.path} cannot be read: {error.strerror}; its manifest says {self.part.bytes} bytes"
        )


class Reader:
    """A checkpoint as global arrays: a `Source` for each of its buffers. Parts are verified when first needed."""

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        self.checkpoint, self.manifest = checkpoint, manifest
        self.places: dict[str, list[tuple[Part, int, Box]]] = {name: [] for name in manifest.shapes}
        for part in manifest.parts:
            for name, number, box in part.held():
                self.places[name].append((part, number, box))
        self._files: dict[str, _File] = {}
        self._open: dict[str, None] = {}  # as a set in order: the file opened first is closed first

    def buffer(self, kind: str) -> "_Buffer":
        """The arrays of a buffer, "weights" for one."""
        return _Buffer(self, kind)

    def file(self, part: Part) -> _File:
        """The file of a part, open and verified. Raises DamagedCheckpoint."""
        if part.file not in self._open:
            if len(self._open) >= _OPEN:
                first = next(iter(self._open))
                del self._open[first]
                self._files[first].check()
                self._files[first].let_go()
            if part.file not in self._files:
                self._files[part.file] = _File(self.checkpoint / part.file, part, self.manifest)
            self._open[part.file] = None
        return self._files[part.file]

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Closes all files. Raises DamagedCheckpoint if one was changed since it was verified."""
        try:
            for name in self._open if kind is None else ():
                self._files[name].check()
        finally:
            for name in self._open:
                self._files[name].let_go()


class _Buffer:
    """The arrays of one buffer of a checkpoint. Frozen weights are their own average."""

    def __init__(self, reader: Reader, kind: str) -> None:
        self._reader, self._kind = reader, kind

    def shape(self, name: str) -> tuple[int, ...] | None:
        shape = self._reader.manifest.shapes.get(name)
        return None if shape is None else tuple(shape)

    def read(self, name: str, box: Box) -> np.ndarray:
        """Every element comes from the one part that holds it: the manifest was checked for that."""
        out, holding = np.empty(box.shape, self._reader.manifest.dtype), self._reader.manifest.holding(name)
        for part, number, held in self._reader.places[name]:
            shared = held.overlap(box)
            if shared is None:
                continue
            rows, *others = shared.within(held)
            path = dataset(self._kind if self._kind in holding else WEIGHTS, name, number)
            for first, values in self._reader.file(part).rows(path, rows.start, rows.stop):
                start, stop = max(rows.start, first), min(rows.stop, first + len(values))
                at = shared.starts[0] - box.starts[0] + start - rows.start
                found = values[(slice(start - first, stop - first), *others)]
                out[(slice(at, at + len(found)), *shared.within(box)[1:])] = found
        return out
