"""Reads HDF5 files that may come from anybody, without the HDF5 library.

That library does what a file says: it opens other files (external storage, links, virtual datasets), loads plug-ins,
allocates what a chunk claims to be or inflates to, takes what lies behind a chunk that inflates to less for data, and
version 2.0 dies of some damaged headers (SIGSEGV, SIGFPE). A manifest or a catalog says what has to be in a file of
ours; so this reader follows only what `libver="latest"` writes for that, and refuses the rest: hard links to datasets
of plain numbers, in chunks cut along dim 0. Nothing is allocated that the expected shapes do not need.

Whoever calls has compared the whole file with a SHA-256, so that HDF5's checksums of its metadata are left alone, and
those of chunks too where the file has stayed in memory or has a stamp. Whoever writes calls `examine` too: should HDF5
come to write something else, a save fails, not a resume.
Source: HDF5 File Format Specification, version 3.0 and 4.0 (superblock 2 and 3, object headers 2).
"""

import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from h5py import h5t

_SHUFFLE, _DEFLATE, _FLETCHER32 = 2, 1, 3
SUMMED = (_FLETCHER32,)
PACKED = (_SHUFFLE, _DEFLATE, _FLETCHER32)
_CHUNK_BYTES = 1 << 20  # or one row
_SUM_BYTES = 4
_SUM_WORDS = 256  # in a row of a checksum
_UNDEFINED = 2**64 - 1
_MESSAGES, _HEADER_BYTES = 100_000, 1 << 24  # of one object: far more than ours have
_NIL, _SPACE, _LINKS, _TYPE, _FILL, _LINK, _LAYOUT, _GROUP, _FILTERS, _ATTRIBUTE, _MORE, _DENSE_ATTRIBUTES = (
    0, 1, 2, 3, 5, 6, 8, 10, 11, 12, 16, 21,
)  # fmt: skip
_KNOWN = {_NIL, _SPACE, _LINKS, _TYPE, _FILL, _LINK, _LAYOUT, _GROUP, _FILTERS, _ATTRIBUTE, _MORE, _DENSE_ATTRIBUTES}

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

    def chunk(self, number: int, fetch: Fetch, summed: bool = False) -> np.ndarray:
        """The rows of a chunk, (rows, …), read-only. `summed`: its checksum is compared, too.

        Raises FormatError; OSError of `fetch`.
        """
        wanted = self.expected
        shape = (self.chunk_rows, *wanted.shape[1:])
        offset, stored = self.places[number].tolist()
        content = fetch(offset, stored)
        if len(content) != stored:
            raise FormatError(f"ends at offset {offset + len(content)}, within chunk {number}")
        body = content[:-_SUM_BYTES]
        if summed and fletcher32(body) != bytes(content[-_SUM_BYTES:]):
            raise FormatError(f"has a chunk at {offset} that does not match its Fletcher-32")
        if wanted.filters == PACKED:
            body = _unpack(body, shape[0] * wanted.dtype.itemsize, wanted.dtype.itemsize)
        return np.frombuffer(body, wanted.dtype).reshape(shape)[: wanted.shape[0] - number * self.chunk_rows]

    def chunks(self, fetch: Fetch) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) of every chunk in order."""
        for number in range(len(self.places)):
            yield number * self.chunk_rows, self.chunk(number, fetch)


def _unpack(body: Any, size: int, item: int) -> Any:
    """Inflates into exactly `size` bytes, then undoes HDF5's shuffle (first bytes of all items, second bytes, …)."""
    inflate = zlib.decompressobj()
    try:
        plain = inflate.decompress(body, size + 1)
    except zlib.error as error:
        raise FormatError(f"has a chunk that does not inflate ({error})") from None
    if len(plain) != size or not inflate.eof:
        raise FormatError(f"has a chunk that does not inflate to its {size} bytes")
    planes = np.frombuffer(plain, "u1").reshape(item, -1)
    items = np.empty(planes.shape[::-1], "u1")
    for place, plane in enumerate(planes):
        items[:, place] = plane  # a fifth of the time that transposing takes
    return items


def fletcher32(content: Any) -> bytes:
    """HDF5's checksum of a chunk of whole 16-bit words, as it stands in the file.

    Two sums modulo 65535 of big-endian words, the second of the running first. A word with its bytes swapped is the
    word times 256, modulo 65535, so that words are added as they lie. NumPy lets other threads run meanwhile; 0.45 ms
    per MiB where HDF5's own takes 0.6 and does not.
    Source: H5_checksum_fletcher32 in H5checksum.c.
    """
    words = np.frombuffer(content, "<u2")
    count, width = len(words), _SUM_WORDS
    whole = count // width * width
    table, tail = words[:whole].reshape(-1, width), words[whole:].astype(np.int64)
    by_row = np.add.reduce(table, axis=1, dtype=np.uint32).astype(np.int64)
    by_column = np.add.reduce(table, axis=0, dtype=np.uint32 if len(table) <= 1 << 16 else np.uint64)
    first = int(by_row.sum()) + int(tail.sum())
    places = int((by_row % 65535 * (np.arange(len(table)) % 65535)).sum()) * width
    places += int((by_column.astype(np.int64) * np.arange(width)).sum())
    places += int((tail * np.arange(whole, count)).sum())
    sums = [256 * total % 65535 or (65535 if first else 0) for total in (first, count * first - places)]
    return (sums[1] << 16 | sums[0]).to_bytes(4, "little")


def examine(fetch: Fetch, size_bytes: int, expected: dict[str, Expected]) -> tuple[dict[str, Dataset], Attributes]:
    """The datasets of a file, by path, and the attributes of its root. Reads structure, no data.

    Raises FormatError where anything is missing, too much, or not as expected; OSError of `fetch`.
    """
    try:
        return _File(fetch, size_bytes).datasets(expected)
    except (struct.error, IndexError, UnicodeDecodeError):
        raise FormatError("is not HDF5 as mlm-mpi writes it") from None


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise FormatError(f"is not HDF5 as mlm-mpi writes it ({what})")


class _Bytes:
    """A cursor over a block of metadata: little-endian numbers."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def take(self, size: int) -> bytes:
        self.at += size
        if self.at > len(self.content):
            raise IndexError
        return self.content[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    @property
    def left(self) -> int:
        return len(self.content) - self.at


Messages = dict[int, list[bytes]]


class _File:
    """The structure of one file."""

    def __init__(self, fetch: Fetch, size_bytes: int) -> None:
        self._fetch, self._size = fetch, size_bytes
        head = self._block(0, 48, b"\x89HDF\r\n\x1a\n")
        version, sizes = head.number(1), head.take(3)
        _require(version in (2, 3) and sizes[:2] == b"\x08\x08", f"superblock {version}")
        base, extension, end, self._root = (head.number(8) for _ in range(4))
        _require((base, extension, end) == (0, _UNDEFINED, size_bytes), f"base {base}, end {end}")

    def _block(self, offset: int, size: int, signature: bytes) -> _Bytes:
        """A block of metadata behind its signature."""
        _require(0 <= offset <= self._size - size, f"{size} bytes at {offset}")
        content = bytes(self._fetch(offset, size))
        _require(len(content) == size and content.startswith(signature), f"no {signature[-4:].decode()} at {offset}")
        block = _Bytes(content)
        block.take(len(signature))
        return block

    def datasets(self, expected: dict[str, Expected]) -> tuple[dict[str, Dataset], Attributes]:
        """Groups hold hard links to what is expected, and nothing else."""
        children: dict[str, set[str]] = {"": set()}
        for path in expected:
            group, _, name = path.rpartition("/")
            children.setdefault(group, set()).add(name)
            if group:
                children[""].add(group)
        root = self._messages(self._root)
        found = {"": self._links(root, "/", children[""])}
        for group in children.keys() - {""}:
            found[group] = self._links(self._messages(found[""][group]), f"/{group}", children[group])
        places = {path: found[path.rpartition("/")[0]][path.rpartition("/")[2]] for path in expected}
        datasets = {
            path: self._dataset(path, wanted, self._messages(places[path])) for path, wanted in expected.items()
        }
        return datasets, _attributes(root)

    def _messages(self, offset: int) -> Messages:
        """The messages of an object header, by type."""
        head = self._block(offset, 6, b"OHDR")
        version, flags = head.number(1), head.number(1)
        _require(version == 2, f"object header {version}")
        before = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        start = offset + before + width
        size = self._block(offset + before, width, b"").number(width)
        found: Messages = {}
        pieces, total, count = [(start, size, b"")], 0, 0
        while pieces:
            at, size, signature = pieces.pop()
            total += size
            _require(total <= _HEADER_BYTES, "a header of too many bytes")
            block = self._block(at, size, signature)
            while block.left >= 4 + (2 if flags & 4 else 0):
                kind, length, shared = block.number(1), block.number(2), block.number(1)
                block.take(2 if flags & 4 else 0)
                body = block.take(length)
                count += 1
                _require(kind in _KNOWN and not shared & 2 and count <= _MESSAGES, f"message {kind}")
                found.setdefault(kind, []).append(body)
                if kind == _MORE:
                    next_at, next_size = struct.unpack("<QQ", body)
                    _require(next_size > 8, "an empty header")
                    pieces.append((next_at, next_size - _SUM_BYTES, b"OCHK"))
        return found

    def _links(self, messages: Messages, path: str, names: set[str]) -> dict[str, int]:
        """Name -> address of the object; exactly `names`."""
        held = messages.get(_LINK, [])
        about = _Bytes(_only(messages, _LINKS))
        version, flags = about.number(1), about.number(1)
        about.take(8 if flags & 1 else 0)
        heap, index = about.number(8), about.number(8)
        _require(version == 0, f"link info {version}")
        if heap != _UNDEFINED:
            _require(not held, "links in two places")
            held = list(self._dense_links(heap, index, len(names)))
        links = dict(_link(body) for body in held)
        if set(links) != names or len(held) != len(names):
            odd = sorted(set(links) ^ names)
            raise FormatError(f"has other objects in {path} than expected: {', '.join(map(repr, odd[:3]))}")
        return links

    def _dense_links(self, heap: int, index: int, count: int) -> Iterator[bytes]:
        """Link messages of a group of more than 8: a B-tree of names leads into a heap."""
        blocks = list(self._heap_blocks(heap))
        for record in self._records(index, count):
            offset, size = struct.unpack("<IH", record[5:])
            _require(record[4] == 0, "a link outside its heap")
            for begin, block_size, address in blocks:
                if begin <= offset and offset + size <= begin + block_size:
                    yield self._block(address + offset - begin, size, b"").content
                    break
            else:
                raise FormatError("is not HDF5 as mlm-mpi writes it (a link outside its heap)")

    def _heap_blocks(self, address: int) -> Iterator[tuple[int, int, int]]:
        """(offset in the heap, size, address) of the direct blocks: 4 in a row, rows double from 512 to 64 KiB."""
        head = self._block(address, 142, b"FRHP").content
        fixed = struct.unpack("<BHHBI", head[4:14]), struct.unpack("<HQQHH", head[110:132])
        _require(fixed == ((0, 7, 0, 2, 4096), (4, 512, 65536, 32, 1)), "another heap")
        root, rows = struct.unpack("<QH", head[132:142])
        _require(rows <= 9, f"a heap of {rows} rows")  # 512 KiB: 10,000 links
        if rows == 0:
            yield 0, 512, root
            return
        entries = self._block(root, 17 + rows * 4 * 8, b"FHIB")
        entries.take(13)
        begin = 0
        for row in range(rows):
            size = 512 << max(0, row - 1)
            for _ in range(4):
                place = entries.number(8)
                if place != _UNDEFINED:
                    yield begin, size, place
                begin += size

    def _records(self, address: int, count: int) -> Iterator[bytes]:
        """The records of a B-tree of link names, (hash, heap id) of 11 bytes each, in nodes of 512 bytes."""
        head = self._block(address, 34, b"BTHD")
        fixed, depth, split = head.take(8), head.number(2), head.take(2)
        _require(fixed == struct.pack("<BBIH", 0, 5, 512, 11) and depth <= 4, "another tree")
        root, inner, total = head.number(8), head.number(2), head.number(8)
        _require(total == count and len(split) == 2, f"{total} links, {count} are expected")
        yield from self._node(root, inner, depth, [count])

    def _node(self, address: int, count: int, depth: int, left: list[int]) -> Iterator[bytes]:
        """`left`: how many records may still come, so that a tree that leads into itself ends."""
        left[0] -= count
        _require(left[0] >= 0, "a tree of too many records")
        node = self._block(address, 512, b"BTIN" if depth else b"BTLF")
        node.take(2)
        yield from (node.take(11) for _ in range(count))
        if depth:
            width = _total_width(depth - 1)
            pointers = [(node.number(8), node.number(1), node.take(width)) for _ in range(count + 1)]
            for child, size, _ in pointers:
                _require(size > 0, "an empty node")
                yield from self._node(child, size, depth - 1, left)

    def _dataset(self, path: str, wanted: Expected, messages: Messages) -> Dataset:
        row_bytes = math.prod(wanted.shape[1:]) * wanted.dtype.itemsize
        if _kind(_only(messages, _TYPE)) != _KINDS[wanted.dtype.str[1:]]:
            raise FormatError(f"has another type of /{path} than {wanted.dtype}")
        if _shape(_only(messages, _SPACE)) != wanted.shape:
            raise FormatError(f"has another shape of /{path} than {wanted.shape}")
        filters = _filters(_only(messages, _FILTERS)) if _FILTERS in messages else ()
        if filters != wanted.filters:
            raise FormatError(f"has filters {filters} on /{path}, {wanted.filters} are expected")
        layout = _Bytes(_only(messages, _LAYOUT))
        version, storage = layout.number(1), layout.number(1)
        if version not in (4, 5) or storage != 2:
            raise FormatError(f"does not hold /{path} in chunks of its own")
        flags, rank, width = layout.number(1), layout.number(1), layout.number(1)
        chunk = tuple(layout.number(width) for _ in range(rank))
        most_rows = min(wanted.shape[0], max(1, _CHUNK_BYTES // row_bytes))
        if chunk[1:] != (*wanted.shape[1:], wanted.dtype.itemsize) or not 0 < chunk[0] <= most_rows:
            raise FormatError(f"has chunks of {chunk[:-1]} in /{path}, whose shape is {wanted.shape}")
        count = -(-wanted.shape[0] // chunk[0])
        _require(count <= self._size // _SUM_BYTES, f"{count} chunks of /{path}")
        places = self._places(layout, flags, count)
        self._check_places(places, path, chunk[0] * row_bytes, wanted)
        return Dataset(wanted, chunk[0], places[:, :2], _attributes(messages))

    def _places(self, layout: _Bytes, flags: int, count: int) -> np.ndarray:
        """(chunks, 3): offset, stored size and filter mask of every chunk."""
        index = layout.number(1)
        if index == 1:  # a single chunk
            _require(flags == 2 and count == 1, "a single chunk")
            size, mask, offset = layout.number(8), layout.number(4), layout.number(8)
            return np.array([(offset, size, mask)], np.uint64)
        _require(index == 3 and flags == 0, f"chunk index {index}")  # a fixed array
        page_bits = layout.number(1)
        head = self._block(layout.number(8), 24, b"FAHD")
        version, client, width, bits, stored, block = (head.number(n) for n in (1, 1, 1, 1, 8, 8))
        fixed = (version, client, bits, stored) == (0, 1, page_bits, count)
        _require(fixed and 13 <= width <= 20 and page_bits <= 20, "another array of chunks")
        entries = b"".join(self._pages(block, count, width, 1 << page_bits))
        table = np.frombuffer(entries, "u1").reshape(count, width)
        wide = np.zeros((count, 8 + 8 + 8), "u1")
        wide[:, :8], wide[:, 8 : width - 4], wide[:, 16:20] = table[:, :8], table[:, 8:-4], table[:, -4:]
        return wide.view("<u8")

    def _pages(self, address: int, count: int, width: int, page: int) -> Iterator[bytes]:
        """The entries of a fixed array; of more than a page, in pages that each end with a checksum."""
        if count <= page:
            yield self._block(address, 14 + count * width, b"FADB").content[14:]
            return
        pages = -(-count // page)
        at = address + 14 + -(-pages // 8) + _SUM_BYTES  # behind a bitmap of the pages
        self._block(address, at - address, b"FADB")
        for begin in range(0, count, page):
            size = min(page, count - begin) * width
            yield self._block(at, size, b"").content
            at += size + _SUM_BYTES

    def _check_places(self, places: np.ndarray, path: str, plain: int, wanted: Expected) -> None:
        """Every chunk lies in the file, has passed all filters and has a size that it can have."""
        packed = wanted.filters == PACKED
        most = plain + _SUM_BYTES + (plain // 1000 + 12 if packed else 0)  # deflate's worst case
        least = _SUM_BYTES + (1 if packed else plain)
        offset, size, mask = places.T
        odd = (size < least) | (size > most) | (mask != 0) | (offset > self._size) | (offset + size > self._size)
        if odd.any():
            first = int(odd.argmax())
            raise FormatError(f"has a chunk of {size[first]} bytes at {offset[first]} in /{path}")
        order = np.argsort(offset, kind="stable")  # chunks that share bytes would make a small file a large array
        if (offset[order][1:] < (offset + size)[order][:-1]).any():
            raise FormatError(f"has chunks that overlap in /{path}")


def _only(messages: Messages, kind: int) -> bytes:
    _require(len(messages.get(kind, [])) == 1, f"{len(messages.get(kind, []))} messages {kind}")
    return messages[kind][0]


def _link(body: bytes) -> tuple[str, int]:
    """Name and address; hard links only."""
    link = _Bytes(body)
    version, flags = link.number(1), link.number(1)
    _require(version == 1, f"link {version}")
    if flags & 8 and link.number(1) != 0:
        raise FormatError("has a link that leads elsewhere")
    link.take((8 if flags & 4 else 0) + (1 if flags & 16 else 0))
    name = link.take(link.number(1 << (flags & 3))).decode()
    return name, link.number(8)


def _total_width(depth: int) -> int:
    """Bytes of the number of records in a subtree, which a pointer to a node of this depth carries."""
    width, below = 0, 45  # records of a leaf: (512 - 10) / 11
    for _ in range(depth):
        pointer = 8 + 1 + width
        records = (512 - 10 - pointer) // (11 + pointer)
        below = (records + 1) * below + records
        width = -(-below.bit_length() // 8)
    return width


def _kind(body: bytes) -> tuple[int, bytes]:
    """A datatype without the version of its encoding."""
    return body[0] & 15, body[1:].rstrip(b"\0")


def _shape(body: bytes) -> tuple[int, ...] | None:
    """Dims of a simple dataspace that cannot grow; () of a scalar; None of another."""
    space = _Bytes(body)
    version, rank, flags, kind = space.take(4)
    dims = tuple(space.number(8) for _ in range(rank))
    most = tuple(space.number(8) for _ in range(rank)) if flags & 1 else dims
    return dims if version == 2 and most == dims and kind == (1 if rank else 0) else None


def _filters(body: bytes) -> tuple[int, ...]:
    """Numbers of the filters in order; those that are not HDF5's own carry a name, which ends this in an error."""
    pipeline = _Bytes(body)
    version, count = pipeline.take(2)
    found = []
    for _ in range(count if version == 2 else 0):
        found.append(pipeline.number(2))
        if found[-1] >= 256:
            break
        pipeline.take(2)
        pipeline.take(4 * pipeline.number(2))
    return tuple(found)


_INTEGER = _kind(h5t.STD_I64LE.encode()[2:])
_KINDS = {  # made here, because HDF5 has one lock, which a thread that saves may hold while a disk is slow
    name: _kind(h5t.py_create(np.dtype(f"<{name}")).encode()[2:]) for name in ("u1", "u2", "u4", "u8", "f4", "f8")
}


def _attributes(messages: Messages) -> Attributes:
    """Scalar integers and strings of a fixed length."""
    for body in messages.get(_DENSE_ATTRIBUTES, []):
        at = 2 + (2 if body[1] & 1 else 0)
        _require(body[at : at + 8] == b"\xff" * 8, "attributes outside of their object")
    return dict(_attribute(body) for body in messages.get(_ATTRIBUTE, []))


def _attribute(body: bytes) -> tuple[str, int | str]:
    about = _Bytes(body)
    version, flags = about.take(2)
    name_size, type_size, space_size = (about.number(2) for _ in range(3))
    _require(version == 3 and flags == 0, f"attribute {version}")
    about.take(1)
    name = about.take(name_size).rstrip(b"\0").decode()
    kind, shape = about.take(type_size), _shape(about.take(space_size))
    size = int.from_bytes(kind[4:8], "little")
    if shape == () and _kind(kind) == _INTEGER:
        return name, int.from_bytes(about.take(8), "little", signed=True)
    if shape == () and kind[0] & 15 == 3 and size <= about.left:
        return name, about.take(size).rstrip(b"\0").decode()
    raise FormatError(f"has an attribute {name!r} that is no integer and no text of a fixed length")
