"""Files that appear whole or not at all.

A name only ever holds complete, synced content: bytes go to a temporary name, file and folder are
fsynced, a rename publishes. Rename without both fsyncs survives no power loss.
"""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from mlm_mpi.errors import StorageError


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


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def cannot_write(path: Path, size_bytes: int, error: OSError) -> StorageError:
    """The one line for a write that failed."""
    return StorageError(
        f"cannot write {size_bytes} bytes to {path} ({error.strerror or error}): "
        "free space there or choose another folder"
    )


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
