"""HDF5 files that may come from anybody: the library reads their structure, data is read here.

HDF5 does what a file says: it opens other files (external storage, links, virtual datasets), loads plug-ins
(filters), allocates what a chunk claims to be or inflates to, and reads past one that inflates to less. A file
therefore holds exactly the datasets expected of it, in the one layout that mlm_mpi writes: chunks cut along
dim 0, of plain numbers. Chunks are fetched and decoded here, each into its known size. Whoever calls has
compared the file with a SHA-256 before, so that the checksums of single chunks (fletcher32) are left alone.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5s, h5t, h5z

SUMMED = (h5z.FILTER_FLETCHER32,)
PACKED = (h5z.FILTER_SHUFFLE, h5z.FILTER_DEFLATE, h5z.FILTER_FLETCHER32)
_CHUNK_BYTES = 1 << 20  # or one row
_SUM_BYTES = 4
_ATTRIBUTES, _ATTRIBUTE_BYTES = 16, 256
_UNDEFINED = 2**64 - 1

Fetch = Callable[[int, int], Any]  # (offset, size) -> that many bytes of the file
Attributes = dict[str, int | str]


class FormatError(Exception):
    """A file that is not what was expected; its text follows the file's name."""


@dataclass(frozen=True)
class Expected:
    """A dataset as a manifest describes it. `filters`: SUMMED or PACKED. Shape: (rows, …), no dim 0."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    filters: tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """A dataset whose structure is as expected. `places`: (chunks, 2) offset and stored size of each chunk."""

    expected: Expected
    chunk_rows: int
    places: np.ndarray
    attributes: Attributes

    def chunk(self, number: int, fetch: Fetch) -> np.ndarray:
        """The rows of a chunk, (rows, …), read-only. Raises FormatError; OSError of `fetch`."""
        wanted = self.expected
        shape = (self.chunk_rows, *wanted.shape[1:])
        offset, stored = self.places[number].tolist()
        content = fetch(offset, stored)
        if len(content) != stored:
            raise FormatError(f"ends at offset {offset + len(content)}, within chunk {number}")
        body = content[:-_SUM_BYTES]
        if wanted.filters == PACKED:
            body = _unpack(body, shape[0] * wanted.dtype.itemsize, wanted.dtype.itemsize)
        return np.frombuffer(body, wanted.dtype).reshape(shape)[: wanted.shape[0] - number * self.chunk_rows]

    def chunks(self, fetch: Fetch) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) of every chunk in order."""
        for number in range(len(self.places)):
            yield number * self.chunk_rows, self.chunk(number, fetch)


def _unpack(body: Any, size: int, item: int) -> bytes:
    """Inflates into exactly `size` bytes, then undoes HDF5's shuffle (first bytes of all items, second bytes, …)."""
    inflate = zlib.decompressobj()
    try:
        plain = inflate.decompress(body, size + 1)
    except zlib.error as error:
        raise FormatError(f"has a chunk that does not inflate ({error})") from None
    if len(plain) != size or not inflate.eof:
        raise FormatError(f"has a chunk that does not inflate to its {size} bytes")
    return np.frombuffer(plain, "u1").reshape(item, -1).T.tobytes() if item > 1 else plain


def examine(file: BinaryIO, size_bytes: int, expected: dict[str, Expected]) -> tuple[dict[str, Dataset], Attributes]:
    """The datasets of a file, by path, and the attributes of its root. Reads no data and allocates none.

    Raises FormatError where anything is missing, anything is too much, or not as expected.
    """
    try:
        _check_superblock(file, size_bytes)
        with h5py.File(file, "r") as opened:
            root = h5g.open(opened.id, b"/")
            _check_links(root, expected)
            found = {path: _dataset(root, path, wanted, size_bytes) for path, wanted in expected.items()}
            return found, _attributes(root, "/")
    except FormatError:
        raise
    except Exception as error:  # whatever h5py raises over a file that somebody else has made
        raise FormatError(f"is not HDF5 as mlm-mpi writes it ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _check_superblock(file: BinaryIO, size_bytes: int) -> None:
    """Version 2 or 3, 8-byte offsets, nothing before or behind the file, no extension (drivers, free space)."""
    file.seek(0)
    head = file.read(48)
    base, extension, end = (int.from_bytes(head[at : at + 8], "little") for at in (12, 20, 28))
    if head[:8] != b"\x89HDF\r\n\x1a\n" or head[8] not in (2, 3) or head[9:11] != b"\x08\x08":
        raise FormatError("is not HDF5 as mlm-mpi writes it (its first bytes)")
    if (base, extension, end) != (0, _UNDEFINED, size_bytes):
        raise FormatError(f"is not HDF5 as mlm-mpi writes it (base {base}, extension {extension}, end {end})")


def _check_links(root: h5g.GroupID, expected: dict[str, Expected]) -> None:
    """The groups hold hard links to what is expected, and nothing else."""
    children: dict[str, set[str]] = {"": set()}
    for path in expected:
        parts = path.split("/")
        for depth, name in enumerate(parts):
            children.setdefault("/".join(parts[:depth]), set()).add(name)
    for path, names in children.items():
        group = _open(root, path, h5g.GroupID) if path else root
        if group.get_num_objs() != len(names):
            raise FormatError(f"holds {group.get_num_objs()} objects in /{path}, {len(names)} are expected")
        for name in names:
            _check_hard(group, f"{path}/{name}".lstrip("/"), name)


def _check_hard(group: h5g.GroupID, path: str, name: str) -> None:
    try:
        kind = group.links.get_info(name.encode()).type
    except KeyError:
        raise FormatError(f"has no /{path}") from None
    if kind != h5l.TYPE_HARD:
        raise FormatError(f"has a link that leads elsewhere in place of /{path}")


def _open(root: h5g.GroupID, path: str, kind: type) -> Any:
    """An object that hard links lead to: `_check_links` has seen those on the way, outer groups first."""
    found = h5o.open(root, path.encode())
    if not isinstance(found, kind):
        raise FormatError(f"has a {type(found).__name__} in place of /{path}")
    return found


def _dataset(root: h5g.GroupID, path: str, wanted: Expected, size_bytes: int) -> Dataset:
    """Layout before type, type before shape: to ask a virtual dataset for its shape opens other files."""
    found = _open(root, path, h5d.DatasetID)
    chunk_rows = _check_storage(found.get_create_plist(), path, wanted)
    kind, space = found.get_type(), found.get_space()
    if kind.committed() or not kind.equal(h5t.py_create(wanted.dtype.newbyteorder("<"))):
        raise FormatError(f"has another type of /{path} than {wanted.dtype}")
    if space.get_simple_extent_type() != h5s.SIMPLE or space.get_simple_extent_dims(True) != wanted.shape:
        raise FormatError(f"has another shape of /{path} than {wanted.shape}")
    if space.get_simple_extent_dims() != wanted.shape:
        raise FormatError(f"has another shape of /{path} than {wanted.shape}")
    places = _places(found, path, wanted, chunk_rows, size_bytes)
    return Dataset(wanted, chunk_rows, places, _attributes(found, path))


def _check_storage(storage: Any, path: str, wanted: Expected) -> int:
    """Rows of a chunk; it is no larger than 1 MiB, or one row, or the dataset."""
    if storage.get_layout() != h5d.CHUNKED or storage.get_external_count():
        raise FormatError(f"does not hold /{path} in chunks of its own")
    filters = tuple(storage.get_filter(number)[0] for number in range(storage.get_nfilters()))
    if filters != wanted.filters:
        raise FormatError(f"has filters {filters} on /{path}, {wanted.filters} are expected")
    chunk = storage.get_chunk()
    rows: int = chunk[0]
    row_bytes = math.prod(wanted.shape[1:]) * wanted.dtype.itemsize
    if chunk[1:] != wanted.shape[1:] or rows > min(wanted.shape[0], max(1, _CHUNK_BYTES // row_bytes)):
        raise FormatError(f"has chunks of {chunk} in /{path}, whose shape is {wanted.shape}")
    return rows


def _places(found: h5d.DatasetID, path: str, wanted: Expected, chunk_rows: int, size_bytes: int) -> np.ndarray:
    """(chunks, 2) offset and stored size: every chunk is there once, inside the file, and of a size it can have."""
    count = -(-wanted.shape[0] // chunk_rows)
    if count > size_bytes // _SUM_BYTES or found.get_num_chunks() != count:
        raise FormatError(f"does not hold the {count} chunks of /{path}")
    stored: list[Any] = []
    found.chunk_iter(stored.append)
    stored.sort(key=lambda info: info.chunk_offset)
    zeros = (0,) * (len(wanted.shape) - 1)
    if [info.chunk_offset for info in stored] != [(number * chunk_rows, *zeros) for number in range(count)]:
        raise FormatError(f"does not hold the {count} chunks of /{path}")
    plain = chunk_rows * math.prod(wanted.shape[1:]) * wanted.dtype.itemsize
    most = plain + _SUM_BYTES + (plain // 1000 + 12 if wanted.filters == PACKED else 0)  # deflate's worst case
    least = _SUM_BYTES + (1 if wanted.filters == PACKED else plain)
    for info in stored:
        inside = 0 <= info.byte_offset <= size_bytes - info.size
        if info.filter_mask or not inside or not least <= info.size <= most:
            raise FormatError(f"has a chunk of {info.size} bytes at {info.byte_offset} in /{path}")
    return np.array([(info.byte_offset, info.size) for info in stored], np.int64)


def _attributes(holder: Any, path: str) -> Attributes:
    """Scalar integers and strings of a fixed length, few and short."""
    if h5a.get_num_attrs(holder) > _ATTRIBUTES:
        raise FormatError(f"has more than {_ATTRIBUTES} attributes on {path}")
    found = (h5a.open(holder, index=number) for number in range(h5a.get_num_attrs(holder)))
    return {attribute.name.decode(): _value(attribute) for attribute in found}


def _value(attribute: h5a.AttrID) -> int | str:
    kind = attribute.get_type()
    scalar = attribute.get_space().get_simple_extent_type() == h5s.SCALAR
    if scalar and kind.equal(h5t.STD_I64LE):
        number = np.empty((), "<i8")
        attribute.read(number)
        return int(number)
    is_text = scalar and isinstance(kind, h5t.TypeStringID) and not kind.is_variable_str()
    if is_text and kind.get_size() <= _ATTRIBUTE_BYTES:
        text = np.empty((), f"S{kind.get_size()}")
        attribute.read(text)
        return bytes(text[()]).decode()
    raise FormatError(f"has an attribute {attribute.name.decode()} that is no integer and no short text")
