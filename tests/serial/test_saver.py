"""What a save leaves in the folder, whoever looks at it or whatever ends it."""

import resource
import shutil
from pathlib import Path

import pytest

from mlm_mpi.comm.group import Group
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.models import gpt
from mlm_mpi.params.store import FlatStore
from mlm_mpi.train import checkpoint

ABOUT = {"config": {}, "vocabulary": 40, "catalog": "", "fingerprint": {}}


def saver(folder: Path, tokenizer: bytes = b"{}") -> checkpoint.Saver:
    """One that keeps a single checkpoint."""
    stack = gpt.build(gpt.Settings(layers=1, width=8, heads=1, context=8, feed_forward=8), 40)
    store = FlatStore(stack.parameter_blocks(), Mesh(), "f4")
    store.initialise(1)
    return checkpoint.Saver(folder, store, {"weights": store.data}, tokenizer, Group(), 1, background=False)


def save(saver: checkpoint.Saver, step: int) -> str | None:
    saver.begin(step)
    return saver.publish(ABOUT)


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
