"""What may be read, and locks that end with their holder."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlm_mpi.files import HeldError, Lock, cannot_write, open_regular, publish, publishing, read_whole


def refuse(path, text, **more):
    with pytest.raises(OSError, match=text) as caught:
        os.close(open_regular(path, **more))
    assert caught.value.strerror


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    refuse(tmp_path / "fifo", "it is a FIFO, not a regular file")
    refuse(tmp_path, "it is a folder")
    (tmp_path / "zero").symlink_to("/dev/zero")
    refuse(tmp_path / "zero", "it is a device")
    refuse(tmp_path / "nothing", "No such file")
    (tmp_path / "loop").symlink_to("loop")
    refuse(tmp_path / "loop", "symbolic links", folder=tmp_path)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_whole(path, 5) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes, at most 4 are read"):
        read_whole(path, 4)
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse: nothing of it may be allocated
    with pytest.raises(OSError, match="at most 5 are read"):
        read_whole(path, 5)


def test_a_link_may_not_lead_out_of_its_folder(tmp_path):
    inside = tmp_path / "folder"
    inside.mkdir()
    (tmp_path / "outside").write_bytes(b"secret")
    (inside / "file").write_bytes(b"own")
    (inside / "near").symlink_to("file")
    (inside / "far").symlink_to("../outside")
    assert read_whole(inside / "near", 9, inside) == b"own"
    refuse(inside / "far", "it leads out of", folder=inside)
    refuse(inside / "../outside", "it leads out of", folder=inside)


@pytest.mark.parametrize(
    ("code", "size", "what", "says"),
    [
        (errno.ENOSPC, 7, "", "7 bytes to a/b (No space left on device): free space there or choose another folder"),
        (errno.ENOSPC, 0, "the text", "the text to a/b (No space left on device): free space there or choose another"),
        (errno.EACCES, 0, "", "a/b (Permission denied): mend its permissions or choose another folder"),
        (
            errno.EFBIG,
            9,
            "digests",
            "9 bytes of digests to a/b (File too large): raise the limit (ulimit -f) or",
        ),
        (errno.EIO, 9, "", "9 bytes to a/b (Input/output error): choose another folder"),
    ],
)
def test_what_cannot_be_written_is_said_with_a_remedy(code, size, what, says):
    error = cannot_write(Path("a/b"), size, OSError(code, os.strerror(code)), what)
    assert str(error).startswith(f"cannot write {says}")


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "file.tmp").symlink_to("precious")
    publish(tmp_path / "file", b"new")
    assert (tmp_path / "precious").read_text() == "kept"
    assert (tmp_path / "file").read_bytes() == b"new" and not (tmp_path / "file").is_symlink()


HOLD = """
import sys, pathlib
from mlm_mpi.files import Lock
lock = Lock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("knows_nameless", [True, False])
def test_a_file_without_a_name_appears_whole(tmp_path, monkeypatch, knows_nameless):
    if not knows_nameless:  # as NFS
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    path = tmp_path / "some"
    path.write_text("before")
    with publishing(path, 0, nameless=True) as descriptor:
        os.write(descriptor, b"after")
        assert path.read_text() == "before"
        if knows_nameless:
            assert [one.name for one in tmp_path.iterdir()] == ["some"], "a kill leaves nothing"
    assert path.read_text() == "after" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(KeyboardInterrupt), publishing(path, 0, nameless=True):
        raise KeyboardInterrupt
    assert path.read_text() == "after" and len(list(tmp_path.iterdir())) == 1


def test_a_lock_ends_with_its_holder(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(HeldError, match=f"pid {holder.pid} on "):
        Lock(path)
    holder.kill()
    holder.communicate()
    Lock(path).remove()
    assert not path.exists()


def test_a_lock_is_not_taken_through_a_link_or_on_a_fifo(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "link").symlink_to("precious")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo"):
        with pytest.raises(OSError):
            Lock(tmp_path / name)
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_lock_file_that_was_removed_meanwhile_is_made_anew(tmp_path):
    path = tmp_path / "lock"
    first = Lock(path)
    path.unlink()
    second = Lock(path)
    with pytest.raises(HeldError):
        Lock(path)
    second.remove()
    first.release()
