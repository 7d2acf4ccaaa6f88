"""A shard file: smallest type, same bytes, and no damage that goes unseen."""

import hashlib
import os
from dataclasses import replace

import h5py
import numpy as np
import pytest

from mlm_mpi import files
from mlm_mpi.data.shards import ShardReader, token_type, write_shard
from mlm_mpi.errors import DataError

DOCUMENTS = [np.arange(n) % 300 for n in (1, 500, 40_000, 3)]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def shard(tmp_path):
    entry = write_shard(tmp_path, "train-00000", "train", DOCUMENTS, 123, 124, "hash", 300)
    return tmp_path / entry.file, entry


@pytest.mark.parametrize(
    ("vocab", "name"), [(2, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4"), (1 << 32, "u4")]
)
def test_smallest_type(vocab, name):
    assert token_type(vocab) == np.dtype(name)


def test_content_and_attributes(shard):
    path, entry = shard
    reader = ShardReader(path, entry, "hash", 300)
    stream = np.concatenate(DOCUMENTS)
    assert np.array_equal(reader.read(0, entry.tokens), stream)
    assert np.array_equal(reader.read(490, 20_000), stream[490:20_000])
    assert reader.offsets().tolist() == [0, 1, 501, 40_501, 40_504]
    reader.close()
    with h5py.File(path) as file:
        data = file["tokens"]
        assert (data.dtype, data.compression, data.shuffle, data.fletcher32) == (np.uint16, "gzip", True, True)
        assert dict(file.attrs) == {
            "format": 2, "tokenizer": b"hash", "split": b"train", "tokens": 40_504, "documents": 4, "characters": 123,
        }  # fmt: skip
    assert entry.bytes == path.stat().st_size
    assert entry.sha256 == sha256(path) and path.name == f"train-00000-{entry.sha256[:8]}.h5"


def test_twice_gives_the_same_bytes(shard, tmp_path):
    path, entry = shard
    (tmp_path / "again").mkdir()
    again = write_shard(tmp_path / "again", "train-00000", "train", DOCUMENTS, 123, 124, "hash", 300)
    assert again == entry and (tmp_path / "again" / entry.file).read_bytes() == path.read_bytes()


def _message(path, entry, tokenizer="hash"):
    with pytest.raises(DataError) as caught:
        ShardReader(path, entry, tokenizer, 300)
    text = str(caught.value)
    assert str(path) in text and "run mlm-mpi prepare again" in text and "\n" not in text
    return text


def test_missing(shard):
    path, entry = shard
    path.unlink()
    assert f"of {entry.bytes} bytes is missing" in _message(path, entry)


@pytest.mark.parametrize("kept", [0, 1, -1])
def test_truncated(shard, kept):
    path, entry = shard
    size = kept if kept >= 0 else entry.bytes + kept
    os.truncate(path, size)
    assert f"has {size} bytes, the catalog says {entry.bytes}" in _message(path, entry)


def test_every_bit_flip_is_found(shard):
    path, entry = shard
    whole = path.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 60).astype(int):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        text = _message(path, entry)
        assert "is damaged" in text and entry.sha256[:16] in text and sha256(path)[:16] in text


def test_other_tokenizer_and_not_hdf5(shard):
    path, entry = shard
    assert "has tokenizer hash, the catalog says other" in _message(path, entry, "other")
    path.write_bytes(bytes(entry.bytes))
    entry = replace(entry, sha256=hashlib.sha256(bytes(entry.bytes)).hexdigest())
    assert "is not HDF5 as mlm-mpi writes it" in _message(path, entry)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_publish_leaves_nothing_behind(tmp_path, monkeypatch, failing):
    (tmp_path / "old").write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(DataError, match=r"cannot write 3 bytes to .*old \(No space left on device\): free space"):
        files.publish_all([(tmp_path / "old", b"new"), (tmp_path / "other", b"new")])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"old": b"old"}
