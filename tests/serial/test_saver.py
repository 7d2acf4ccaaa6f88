"""What a save leaves in the folder, whoever looks at it or whatever ends it."""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mlm_mpi.comm.group import Group
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import FlatStore, Parameter
from mlm_mpi.train import checkpoint

ABOUT = {"config": {}, "vocabulary": 40, "catalog": "", "fingerprint": {}}


def saver(folder: Path, tokenizer: bytes = b"{}") -> checkpoint.Saver:
    """One that keeps a single checkpoint."""
    parameters = [Parameter("table", Layout((40, 8)), 0.02), Parameter("scale", Layout((8,)), "ones")]
    store = FlatStore([parameters], Mesh(), "f4")
    store.initialise(1)
    return checkpoint.Saver(folder, store, {"weights": store.data}, tokenizer, Group(), 1, background=False)


def save(saver: checkpoint.Saver, step: int) -> str | None:
    saver.begin(step)
    return saver.publish(ABOUT)


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.published(folder)]


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path, monkeypatch):
    """As if a kill came before the first of them was removed."""
    mine = saver(tmp_path)
    assert save(mine, 1) is None
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *path, **options: None)
        assert save(mine, 2) is None
    assert names(tmp_path) == ["step-00000002"]
    checkpoint.remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_reader_goes_on_to_what_a_live_run_has_saved_meanwhile(tmp_path):
    mine, said = saver(tmp_path), []
    assert save(mine, 1) is None

    def load(path: Path, manifest: checkpoint.Manifest) -> int:
        if manifest.step == 1:
            assert save(mine, 2) is None
        checkpoint.read_tokenizer(path, manifest)
        return manifest.step

    assert checkpoint.newest_sound(tmp_path, load, said.append) == 2
    assert said == []


def test_a_tokenizer_that_finds_no_room_fails_the_save(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        problem = save(saver(tmp_path, b" " * (2 << 20)), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert problem is not None and "cannot write 2097152 bytes" in problem and "tokenizer.json" in problem
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_is_sealed(tmp_path):
    assert save(saver(tmp_path, b"a tokenizer"), 1) is None
    (path,) = checkpoint.published(tmp_path)
    manifest = checkpoint.read_manifest(path)
    assert checkpoint.read_tokenizer(path, manifest) == b"a tokenizer"
    (path / "tokenizer.json").write_bytes(b"a Tokenizer")
    with pytest.raises(checkpoint.DamagedCheckpoint, match="tokenizer.json does not match the SHA-256"):
        checkpoint.read_tokenizer(path, manifest)


def background(folder: Path) -> checkpoint.Saver:
    made = saver(folder)
    return checkpoint.Saver(folder, made.store, made.buffers, b"{}", Group(), 1, background=True)


def test_a_save_is_tended_without_waiting_for_the_disk(tmp_path, monkeypatch):
    """Neither for the index nor for what is pushed out: the loop hears of it when it is done."""
    mine, gate, withdrawn = background(tmp_path), threading.Event(), checkpoint._withdraw
    assert not mine.busy and not mine.written
    mine.begin(1)
    wait_for(lambda: mine.written)
    assert mine.tend(ABOUT) is None and mine.busy
    wait_for(lambda: mine.written)
    assert mine.tend(ABOUT) is None and not mine.busy and not mine.written
    monkeypatch.setattr(checkpoint, "_withdraw", lambda path: gate.wait(30) and withdrawn(path))
    mine.begin(2)
    wait_for(lambda: mine.written)
    assert mine.tend(ABOUT) is None
    wait_for(lambda: names(tmp_path) == ["step-00000002", "step-00000001"])
    assert mine.busy and not mine.written
    gate.set()
    assert mine.publish(ABOUT) is None and not mine.busy
    assert names(tmp_path) == ["step-00000002"]


def test_what_is_saved_is_what_was_there_when_it_began(tmp_path, monkeypatch):
    gate, write = threading.Event(), checkpoint.part_file.write
    mine = background(tmp_path)
    monkeypatch.setattr(checkpoint.part_file, "write", lambda *args: gate.wait(30) and write(*args))
    for step in (1, 2):  # the memory of the snapshot is used again
        gate.clear()
        before = mine.store.data.copy()
        mine.begin(step)
        mine.store.data[...] += 1
        gate.set()
        assert mine.publish(ABOUT) is None
        other = saver(tmp_path)
        (path,) = checkpoint.published(tmp_path)
        checkpoint.restore(path, checkpoint.read_manifest(path), other.store, other.buffers)
        for name, value in mine.store.named(before).items():
            assert np.array_equal(other.store.named(other.store.data)[name], value)


def test_no_memory_for_a_snapshot_is_a_failed_save(tmp_path, monkeypatch):
    def full(size_bytes):
        raise MemoryError

    monkeypatch.setattr(checkpoint, "new_pages", full)
    mine = background(tmp_path)
    mine.begin(1)
    problem = mine.publish(ABOUT)
    assert problem == "rank 0: no memory for a snapshot: set checkpoint.background=false"
    monkeypatch.undo()
    assert save(mine, 2) is None and names(tmp_path) == ["step-00000002"]


def test_a_writer_that_hangs_keeps_its_snapshot(tmp_path, monkeypatch):
    """Its save has failed; the next takes other memory, and what the first writes in the end is seen by nobody."""
    gate, write = threading.Event(), checkpoint.part_file.write
    mine = background(tmp_path)
    mine.group = mine.group.with_timeout(0.05)
    with monkeypatch.context() as slow:
        slow.setattr(checkpoint.part_file, "write", lambda *args: gate.wait(30) and write(*args))
        mine.begin(1)
        hanging = mine._writer
        problem = mine.publish(ABOUT)
        assert problem is not None and "the disk to take its part" in problem
    mine.group = Group()
    first = mine._snapshot
    assert save(mine, 2) is None and mine._snapshot is not first
    gate.set()
    hanging.join()
    assert names(tmp_path) == ["step-00000002"]


def test_a_full_disk_fails_a_save_in_the_background_too(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    mine = background(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        problem = save(mine, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (
        problem is not None and "cannot write 1312 bytes to " in problem and "part-0000.h5 (File too large)" in problem
    )
    assert list(tmp_path.iterdir()) == []
    assert save(mine, 2) is None


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "save_memory.py"
STATE_MIB = 64  # twice the slack: a second copy would show


def peak_mib(mode: str, folder: Path) -> float:
    """VmHWM of a process of its own; of "resume", what it takes more than the state."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--work", mode, str(STATE_MIB), str(folder)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "OPENBLAS_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["peak_kib"] / 1024


@pytest.mark.slow
def test_a_save_takes_no_more_memory_than_its_snapshot(tmp_path):
    steps = peak_mib("steps", tmp_path)
    assert peak_mib("background", tmp_path) <= steps + STATE_MIB + 32
    assert peak_mib("synchronous", tmp_path) <= steps + 32
    assert peak_mib("resume", tmp_path) <= 32
