"""The folder of a corpus while it is prepared: everything is made in a staging folder inside, then renamed out of it.

The rename of catalog.json is the moment at which the new corpus takes the place of an earlier one: every other file has
its hash in its name. Files that no catalog of ours names, or that are not as it says, are never touched.
"""

import contextlib
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from mlm_mpi.data import catalog
from mlm_mpi.errors import DataError, StorageError
from mlm_mpi.files import HeldError, Lock, publish, read_whole, sha256_of, sync_folder

T = TypeVar("T")

FOLDER = ".staging"
PREPARED = "prepared.json"
_LOCK = "prepare.lock"
_REPLACED = "replaced.json"  # the catalog of the corpus that is being replaced
_LARGEST_BYTES = 1 << 30  # of a catalog
_PUBLISHED = re.compile(r"(train|heldout|test)-\d{5,}-[0-9a-f]{8}\.h5|tokenizer(-[0-9a-f]{8})?\.json")
_STAGED = re.compile(
    rf"((text|records|pieces|contents)-\d+\.bin|{_PUBLISHED.pattern}|(catalog|prepared|replaced)\.json)(\.tmp)?"
)
_HOLDER = re.compile(rb"(pid \d+ on [^\n]*\n)?")


class Prepared(msgspec.Struct, omit_defaults=True):
    """The content of prepared.json: how the corpus was made.

    `plugins`: "formats/mine.py" -> SHA-256 of each file of `--plugins` that was loaded. `cut`: "novel.txt" -> what it
    was cut into.
    """

    command: str
    python: str
    mlm_mpi: str
    content: str
    plugins: dict[str, str] = {}
    cut: dict[str, str] = {}


class _File(msgspec.Struct):
    file: str
    sha256: str


class _Tokenizer(msgspec.Struct):
    file: str
    hash: str


class _Names(msgspec.Struct):
    """What a catalog, of this or the first format or of labelled texts, says about files."""

    format: Literal[1, 2, "labelled-1", "tagged-1", "questions-1"]
    tokenizer: _Tokenizer
    shards: list[_File]

    def hashes(self) -> dict[str, str]:
        return {self.tokenizer.file: self.tokenizer.hash} | {shard.file: shard.sha256 for shard in self.shards}


_JSON: dict[str, type[msgspec.Struct]] = {catalog.FILE_NAME: _Names, _REPLACED: _Names, PREPARED: Prepared}


class CorpusFolder:
    """A locked corpus folder with an empty staging folder in it. Used by rank 0 alone."""

    def __init__(self, out: Path) -> None:
        """Makes the folder if there is none. Raises DataError, with everything as it was.

        What a killed preparation left behind is removed.
        """
        self.out = out
        self.staging = out / FOLDER
        self._made: list[Path] = []  # folders, the innermost last
        self._lock: Lock | None = None
        self._is_open = False
        try:
            self._open()
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
            self.abandon()
            raise DataError(
                f"cannot prepare a corpus in {out} ({getattr(error, 'strerror', None) or error}): choose another --out"
            ) from None
        except BaseException:
            self.abandon()
            raise

    def publish(self, files: Iterable[str]) -> bool:
        """Puts these staged files, catalog.json and prepared.json in place; returns whether a corpus was replaced.

        Raises StorageError; before the catalog is in place, everything is as it was.
        """
        is_replaced = (self.out / catalog.FILE_NAME).exists()
        try:
            if is_replaced:
                publish(self.staging / _REPLACED, read_whole(self.out / catalog.FILE_NAME, _LARGEST_BYTES))
            for name in (*files, catalog.FILE_NAME, PREPARED):
                if name == catalog.FILE_NAME:
                    sync_folder(self.out)  # what it names is there before it is
                (self.staging / name).replace(self.out / name)
            sync_folder(self.out)
            self._tidy()
        except OSError as error:
            raise StorageError(
                f"cannot put the corpus in place in {self.out} ({error.strerror}): "
                "free space there, or choose another --out"
            ) from None
        return is_replaced

    def close(self) -> None:
        """Lets go of the folder."""
        if self._lock is not None:
            self._lock.remove()

    def abandon(self) -> None:
        """Leaves the folder as it was before."""
        with contextlib.suppress(OSError):  # what made it end is what counts; the next preparation tidies up
            if self._is_open:
                self._tidy()
        self.close()
        with contextlib.suppress(OSError):
            for folder in reversed(self._made):
                (folder / _LOCK).unlink(missing_ok=True)  # a lock that could not be taken on a full disk
                folder.rmdir()

    def _open(self) -> None:
        for folder in [folder for folder in (*reversed(self.out.parents), self.out) if not folder.exists()]:
            folder.mkdir()
            self._made.append(folder)
        self._refuse(name for name in _names(self.out) if not self._may_be_ours(name))
        try:
            self._lock = Lock(self.out / _LOCK)
        except HeldError as holder:
            self._made.clear()  # it is the other's now
            raise DataError(
                f"another prepare ({holder}) writes to {self.out}: wait for its end, or choose another --out"
            ) from None
        self._refuse(self._foreign())
        self._tidy()
        self.staging.mkdir()
        self._is_open = True

    def _refuse(self, foreign: Iterable[str]) -> None:
        names = sorted(foreign)
        if names:
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            raise DataError(
                f"{self.out} holds what this corpus did not put there or what has changed since: "
                f"{', '.join(map(repr, names[:3]))}{more}: move it away, or choose another --out"
            )

    def _may_be_ours(self, name: str) -> bool:
        """Whether a preparation can have made this; nothing is read that another one may be writing."""
        path = self.out / name
        if name == FOLDER:
            return stat.S_ISDIR(_mode(path))
        if name == _LOCK:
            return _is_file(path) and bool(_HOLDER.fullmatch(read_whole(path, 300)))
        return bool(_PUBLISHED.fullmatch(name)) or name in (catalog.FILE_NAME, PREPARED)

    def _foreign(self) -> list[str]:
        """What no catalog of ours names, or what is not as it says."""
        staged = _names(self.staging) if self.staging.exists() else []
        strange = [f"{FOLDER}/{name}" for name in staged if not _is_staged(self.staging / name)]
        hashes = self._hashes_of(self.out / catalog.FILE_NAME) | self._hashes_of_leftovers()
        return strange + [name for name in _names(self.out) if not self._is_ours(name, hashes)]

    def _is_ours(self, name: str, hashes: dict[str, str]) -> bool:
        path = self.out / name
        if name in (FOLDER, _LOCK):
            return True
        if name in _JSON:
            return _decoded(path, _JSON[name]) is not None
        return _is_file(path) and sha256_of(path) == hashes.get(name)

    def _hashes_of_leftovers(self) -> dict[str, str]:
        return self._hashes_of(self.staging / _REPLACED) | self._hashes_of(self.staging / catalog.FILE_NAME)

    def _hashes_of(self, path: Path) -> dict[str, str]:
        """File names and hashes of a catalog; none where there is no whole one."""
        names = _decoded(path, _Names)
        return names.hashes() if names is not None else {}

    def _tidy(self) -> None:
        """Removes the staging folder and what its catalogs name, but not what the published one names."""
        if not self.staging.exists():
            return
        left = self._hashes_of_leftovers()
        for name in left.keys() - self._hashes_of(self.out / catalog.FILE_NAME).keys():
            if _PUBLISHED.fullmatch(name) and self._is_ours(name, left):
                (self.out / name).unlink()
        for path in sorted(self.staging.iterdir(), key=lambda path: path.name in (catalog.FILE_NAME, _REPLACED)):
            path.unlink()  # the catalogs last: if this is killed, the next one can still tell whose the files are
        self.staging.rmdir()


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _is_staged(path: Path) -> bool:
    if path.name in _JSON:
        return _decoded(path, _JSON[path.name]) is not None
    return bool(_STAGED.fullmatch(path.name)) and _is_file(path)


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(_mode(path))


def _mode(path: Path) -> int:
    """As `lstat` says; 0 where there is nothing (any more)."""
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return 0


def _decoded(path: Path, kind: type[T]) -> T | None:
    """The content of a JSON file of ours; None if there is none, or if it is somebody else's."""
    if not _is_file(path):
        return None
    try:
        return msgspec.json.decode(read_whole(path, _LARGEST_BYTES), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
