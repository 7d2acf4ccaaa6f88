"""Files that appear whole or not at all, files that may be read, and locks.

A name only ever holds complete, synced content: bytes go to a temporary name, file and folder are
fsynced, a rename publishes. Rename without both fsyncs survives no power loss.

What is read may come from anybody: a FIFO would hang, a device never end, a link lead elsewhere.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlm_mpi.errors import StorageError

_KINDS = {
    stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}  # fmt: skip
_REMEDIES = {
    errno.ENOSPC: "free space there", errno.EDQUOT: "free space there", errno.EFBIG: "raise the limit (ulimit -f)",
    errno.EACCES: "mend its permissions", errno.EPERM: "mend its permissions",
}  # fmt: skip


def publish(path: Path, content: bytes) -> str:
    """Writes `content` under `path`, durably and in one step; returns its SHA-256 in hex.

    Raises StorageError (a full disk, a folder without permission); the temporary file is gone then.
    """
    publish_all([(path, content)])
    return hashlib.sha256(content).hexdigest()


def publish_all(files: Sequence[tuple[Path, bytes]]) -> None:
    """The same for several files of one folder: all are on disk before the first takes its name.

    A disk that is full leaves every earlier file as it was. Raises StorageError.
    """
    temporary = {path: path.with_name(path.name + ".tmp") for path, _ in files}
    try:
        for path, content in files:
            try:
                _write_synced(temporary[path], content)
            except OSError as error:
                raise cannot_write(path, len(content), error) from None
        for path, content in files:
            try:
                temporary[path].replace(path)
                sync_folder(path.parent)
            except OSError as error:
                raise cannot_write(path, len(content), error) from None
    except StorageError:
        for left in temporary.values():
            with contextlib.suppress(OSError):  # what the first error says is what counts
                left.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def publishing(path: Path, size_bytes: int, nameless: bool = False) -> Iterator[int]:
    """A descriptor, for writing and reading, of a file that takes its name, durably, when the block has ended.

    `size_bytes`: about what will be written, 0 if nobody knows, for the message. An OSError of the block or of what
    follows it becomes StorageError; whatever ends the block early removes the file. `nameless`: until then it has no
    name where the file system can do that, so that even a kill leaves nothing.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        descriptor, has_name = _create_nameless(temporary) if nameless else (_create(temporary), True)
        try:
            yield descriptor
            os.fsync(descriptor)
            if not has_name:
                # the folder is ignored for a path from the root; without one Python does not follow the link
                os.link(f"/proc/self/fd/{descriptor}", temporary, src_dir_fd=descriptor, follow_symlinks=True)
        finally:
            os.close(descriptor)
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, size_bytes, error) from None
        raise


def _create(path: Path) -> int:
    path.unlink(missing_ok=True)  # what somebody left under this name may be a link that leads elsewhere
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _create_nameless(path: Path) -> tuple[int, bool]:
    """(a descriptor of a new file beside `path`, whether it has that name already)."""
    path.unlink(missing_ok=True)
    if Path("/proc/self/fd").is_dir():
        with contextlib.suppress(OSError):  # NFS and others know no O_TMPFILE
            return os.open(path.parent, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o666), False
    return _create(path), True


def _write_synced(path: Path, content: bytes) -> None:
    with open(_create(path), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def cannot_write(path: Path, size_bytes: int, error: OSError, what: str = "") -> StorageError:
    """The one line for a write of `what` that failed. `size_bytes`: 0 if nobody knows."""
    parts = [f"{size_bytes} bytes"] if size_bytes else []
    parts += [what] if what else []
    content = f"{' of '.join(parts)} to {path}" if parts else str(path)
    remedy = f"{_REMEDIES[error.errno]} or " if error.errno in _REMEDIES else ""
    return StorageError(f"cannot write {content} ({error.strerror or error}): {remedy}choose another folder")


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power loss."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex; reads it once, in bounded memory. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_open(descriptor: int) -> str:
    """SHA-256 of an open file from its beginning on, in hex. Raises OSError."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb", closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: Path, folder: Path | None = None) -> int:
    """A descriptor of a regular file, opened for reading. `folder`: the file must lie inside it, links followed.

    Raises OSError whose `strerror` says what the path is instead, and never waits for a writer.
    """
    if folder is not None and not _resolved(path).is_relative_to(_resolved(folder)):
        raise OSError(errno.EPERM, f"it leads out of {folder}, to {_resolved(path)}", str(path))
    _check_regular(path.stat().st_mode, path)  # before the open, which may act on a device
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _check_regular(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_whole(path: Path, limit_bytes: int, folder: Path | None = None) -> bytes:
    """The content of a regular file of at most `limit_bytes`; `folder` as in `open_regular`. Raises OSError."""
    with open(open_regular(path, folder), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(limit_bytes + 1) if size <= limit_bytes else b""
    if size > limit_bytes or len(content) > limit_bytes:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, at most {limit_bytes:,} are read", str(path))
    return content


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError:  # how Python before 3.13 says ELOOP
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None


def _check_regular(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))


class HeldError(Exception):
    """A lock that a live process holds; its text says which."""


class Lock:
    """A lock file. The lock ends with the process that holds it, however it ends."""

    def __init__(self, path: Path) -> None:
        """Takes the lock at once. Raises HeldError, or OSError where the file cannot be made, written or locked."""
        self.path = path
        while True:
            self._descriptor = os.open(
                path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644
            )
            try:
                _check_regular(os.fstat(self._descriptor).st_mode, path)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current():
                    os.ftruncate(self._descriptor, 0)
                    os.write(self._descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
                    return
            except BlockingIOError:
                holder = os.read(self._descriptor, 200).decode(errors="replace").strip()
                os.close(self._descriptor)
                raise HeldError(holder or "another process") from None
            except OSError:
                os.close(self._descriptor)
                raise
            os.close(self._descriptor)  # its holder has just removed it: what lies there now counts

    def _is_current(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._descriptor), self.path.stat(follow_symlinks=False))
        return False

    def release(self) -> None:
        """Lets go; the file stays."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Lets go and removes the file, so that a folder made in vain can be removed too."""
        with contextlib.suppress(OSError):  # a file system that has become read-only
            self.path.unlink()
        os.close(self._descriptor)
