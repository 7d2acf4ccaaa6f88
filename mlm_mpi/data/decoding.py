"""What all formats share: compression and encoding, told by a file's content, and refusing everything that is no text.

Only regular files are opened: a FIFO would hang, a device never end.
"""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from mlm_mpi.data.text import MARK
from mlm_mpi.errors import ConfigError, DataError
from mlm_mpi.files import open_regular

COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
# A text file is one document, read whole; 12 bytes of memory a byte, measured with 256 MiB and --tokenizer bytes.
LARGEST_TEXT_BYTES = 1 << 30
LONGEST_LINE = 1 << 28  # characters of a JSON line
_HEAD_BYTES = 1 << 16
_PIECE_BYTES = 1 << 20
# UTF-16 taken for another encoding has NUL as one of so many characters, or, of few ASCII ones, what is not of it
_UTF16_NULS, _INVALID = 8, "\udfff"
_ZSTD_BYTES = 1 << 10  # a kibibyte of zstd can grow to 32 MiB


def to_lines(field: str) -> str:
    """The remedy for what should be JSON lines that have this field."""
    return f'convert it to JSON lines, one {{"{field}": …}} a line'


_TO_TEXT = "convert it to text, or leave it out by a glob such as 'folder/*.txt'"
_TO_LINES = to_lines("text")
_UNPACK = "unpack it and give the text files in it"
# (how the content begins, what it is, the remedy). A beginning made of letters goes on with a byte no text has.
_NO_TEXT = [
    (rb"%PDF-", "a PDF", _TO_TEXT), (rb"\{\\rtf", "an RTF document", _TO_TEXT),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document (OLE)", _TO_TEXT),
    (rb"PK(\x03\x04|\x05\x06|\x07\x08)", "a zip archive (or docx, xlsx, epub, odt, npz)", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK), (rb"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (rb"(?s:.{257})ustar(\x00|  \x00)", "a tar archive", _UNPACK), (rb"MSCF\x00", "a cab archive", _UNPACK),
    (rb"!<arch>\n", "an ar archive", _UNPACK),
    (rb"\x1f[\x8b\x9d\xa0]|\xfd7zXZ\x00|BZh[1-9]1AY&SY|[\x28\x50-\x5f][\xb5\x2a][\x2f\x4d][\xfd\x18]|LZIP[\x00\x01]"
     rb"|\x04\x22\x4d\x18", "compressed in a way that is not read, or twice", _UNPACK),
    (rb"PAR1[^ -~]|PARE", "a Parquet file", _TO_LINES),
    (rb"ARROW1\x00|FEA1\x00|\xff\xff\xff\xff.\x00{1,3}", "an Arrow or Feather file", _TO_LINES),
    (rb"ORC[^ -~]", "an ORC file", _TO_LINES), (rb"Obj\x01", "an Avro file", _TO_LINES),
    (rb"SQLite format 3\x00", "an SQLite database", _TO_LINES),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file", _TO_LINES), (rb"\x93NUMPY", "a NumPy array", _TO_LINES),
    (rb"\x80[\x02-\x05]", "a Python pickle", _TO_LINES),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|II\*\x00|MM\x00\*", "an image", "leave it out"),
    (rb"OggS\x00|ID3[\x02-\x04]|fLaC\x00|RIFF(?s:....)(WAVE|AVI |WEBP)|\x00\x00(?s:..)ftyp", "sound or film",
     "leave it out"),
    (rb"\x7fELF|MZ\x90\x00|\x00asm|\xca\xfe\xba\xbe|[\xce\xcf]\xfa\xed\xfe", "a program", "leave it out"),
]  # fmt: skip
_MARKS = [
    (b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe\x00\x00", "utf-32-le"), (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"),
]  # fmt: skip


def plain_name(path: Path) -> str:
    """The name of a file without what compression has added to it."""
    return path.stem if path.suffix in COMPRESSED else path.name


Told = Callable[[int], None]


def _unheard(size: int) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class NoText:
    """What a format gives instead of a document for a record that has none; it is skipped and counted.

    `place`: of the record, for a person. `fields`: names of what it has; `has_field`: whether it has what was asked
    for, empty. A file of which no record has it is refused.
    """

    place: str
    fields: str
    has_field: bool


@dataclass(frozen=True)
class Content:
    """A file as a format sees it. Each way to read it raises DataError, in one line that names the file.

    Who reads it as text, in one of the first three ways, need not ask whether it is text: a binary file is refused by
    its name, and what is not of the encoding becomes U+FFFD, is counted, and refused if there is more than a little.
    """

    path: Path
    encoding: str = "utf-8"  # --encoding; a byte-order mark overrules it
    field: str = "text"  # --field
    told: Told = _unheard  # hears of bytes that were read, before decompression

    def head(self) -> str:
        """The first characters, of at most 64 KiB."""
        with _opened(self.path, self.encoding, self.told) as (_, _, head):
            return head

    def text(self) -> str:
        """All of it. A GiB is the most that is read."""
        return read_text(self.path, self.encoding, self.told)

    def lines(self) -> Iterator[str]:
        """One line after another with its end, in bounded memory."""
        return read_lines(self.path, self.encoding, self.told)

    @contextmanager
    def binary(self) -> Iterator[BinaryIO]:
        """The decompressed bytes, whatever they are, for `with`. Nothing is checked, and nothing bounds them."""
        with _decompressing(self.path, self.told) as file:
            yield cast(BinaryIO, file)


def check_encoding(name: str) -> None:
    """Raises ConfigError unless `name` is a text encoding of Python's that can go on behind an error."""
    try:
        b"\xff\xff\xff".decode(name, MARK)
        io.TextIOWrapper(io.BytesIO(b"text"), name, MARK).read()  # "utf-16" needs a mark, which decides by itself
    except (LookupError, ValueError, AssertionError):
        raise ConfigError(
            f"--encoding {name!r} is no text encoding that Python reads without a mark: give cp1252, utf-16-le, …"
        ) from None


def read_text(path: Path, encoding: str, told: Told = _unheard) -> str:
    """The content of a text file, decoded with `text.MARK` for what is not of its encoding. Raises DataError."""
    with _opened(path, encoding, told) as (file, encoding, _):
        content = bytearray()
        while piece := file.read(_PIECE_BYTES):
            content += piece
            if len(content) > LARGEST_TEXT_BYTES:
                raise DataError(
                    f"{path} has more than {LARGEST_TEXT_BYTES >> 20:,} MiB of text, which is read as one document: "
                    "cut it into files (split -C 500M) or JSON lines"
                )
        text = content.decode(encoding, MARK)
    _check_nul(text, path)
    return text


def read_lines(path: Path, encoding: str, told: Told = _unheard) -> Iterator[str]:
    """The lines of a file, decoded likewise, one at a time. Raises DataError."""
    with _opened(path, encoding, told) as (file, encoding, _):
        lines = io.TextIOWrapper(file, encoding, MARK, newline="\n")
        number = 0
        while line := lines.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE:
                raise DataError(f"{path}:{number} has {LONGEST_LINE:,} characters or more: {_TO_LINES}")
            _check_nul(line, path, number)
            yield line


def check_repaired(path: Path, replaced: int, characters: int) -> None:
    """Raises DataError if more than one character in a hundred was not of its encoding."""
    if replaced * 100 > characters:
        raise DataError(
            f"{path} is not in the encoding it was read with ({replaced:,} of {characters:,} characters): "
            "name it with --encoding (cp1252, utf-16-le, …), or leave the file out if it is no text"
        )


@contextmanager
def _opened(path: Path, encoding: str, told: Told) -> Iterator[tuple[BinaryIO, str, str]]:
    """(decompressed content without its mark, its encoding, its first characters). Raises DataError."""
    try:
        with _decompressing(path, told) as file:
            begin = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
            mark, encoding = next(((m, name) for m, name in _MARKS if begin.startswith(m)), (b"", encoding))
            if not mark:
                _check_is_text(path, begin)
            file.read(len(mark))
            head = begin[len(mark) :].decode(encoding, MARK)
            _check_nul(head, path)
            yield cast(BinaryIO, file), encoding, head
    except UnicodeError as error:
        raise DataError(f"cannot read {path} as {encoding} ({error}): give another --encoding") from None


@contextmanager
def _decompressing(path: Path, told: Told) -> Iterator[io.BufferedReader]:
    """The decompressed content of a regular file. Raises DataError, also for what goes wrong while it is read."""
    try:
        with (
            io.BufferedReader(_Counted(open_regular(path), told), _HEAD_BYTES) as raw,
            _decompressed(cast(io.BufferedReader, raw)) as file,
        ):
            yield file
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror or error}): {_remedy(error)}") from None
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise DataError(f"cannot read {path}, its compressed content is damaged ({error}): get it anew") from None
    except MemoryError:
        raise DataError(f"cannot read {path}, memory is full: cut it into files or JSON lines") from None


def _remedy(error: OSError) -> str:
    return "write it to a file first" if "not a regular file" in str(error.strerror) else "mend it or leave it out"


def _decompressed(file: io.BufferedReader) -> io.BufferedReader:
    begin = file.peek(8)[:8]
    if begin.startswith(b"\x1f\x8b"):
        return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=file)), _PIECE_BYTES)
    if begin.startswith(b"\xfd7zXZ\x00"):
        return io.BufferedReader(cast(io.RawIOBase, lzma.LZMAFile(file)), _PIECE_BYTES)
    if re.match(rb"BZh[1-9]1AY&", begin):
        return io.BufferedReader(cast(io.RawIOBase, bz2.BZ2File(file)), _PIECE_BYTES)
    if re.match(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", begin):
        return io.BufferedReader(_Zstd(file), _PIECE_BYTES)
    return file


class _Counted(io.FileIO):
    """A file that tells how much of it is read."""

    def __init__(self, descriptor: int, told: Told) -> None:
        super().__init__(descriptor)
        self._told = told

    def readinto(self, buffer: "memoryview") -> int | None:  # type: ignore[override]
        count = super().readinto(buffer)
        self._told(count or 0)
        return count


class _Zstd(io.RawIOBase):
    """Decompresses zstd frames. (The library's own reader takes a file that was cut off for a whole one.)"""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._is_between = True  # frames
        self._ready = memoryview(b"")
        self._packed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        while not self._ready and self._fill():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _fill(self) -> bool:
        """Decompresses a little more; False at the end."""
        self._packed = self._packed or self._file.read(_ZSTD_BYTES)
        if not self._packed:
            if not self._is_between:
                raise EOFError("it ends before its last frame does")
            return False
        self._ready = memoryview(self._frame.decompress(self._packed))
        self._packed, self._is_between = self._frame.unused_data, self._frame.eof
        if self._is_between:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        return True


def _check_is_text(path: Path, begin: bytes) -> None:
    for pattern, what, remedy in _NO_TEXT:
        if re.match(pattern, begin):
            raise DataError(f"{path} is {what}, not text: {remedy}")


def _check_nul(text: str, path: Path, first: int = 1) -> None:
    """Raises DataError for NUL bytes. `first`: the number of the first line."""
    count = text.count("\0")
    if count * _UTF16_NULS > len(text) or (count and _INVALID in text):
        raise DataError(f"{path} has NUL bytes: it is no text, or UTF-16 without a mark: give --encoding utf-16-le")
    if count:
        before = text[: text.index("\0")]
        place = f"{path}:{first + before.count(chr(10))}"
        raise DataError(
            f"{place} has a NUL byte as character {len(before) - before.rfind(chr(10))}, which no text has: remove it "
            "(tr -d '\\0'), or leave the file out"
        )
