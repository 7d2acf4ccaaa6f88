"""Our reader of HDF5 against the library's, over every shape of index that the library writes for our files."""

import io
import tempfile

import h5py
import numpy as np
import pytest

from mlm_mpi import hdf5
from mlm_mpi.cut import Box
from mlm_mpi.data import shards
from mlm_mpi.train import part
from mlm_mpi.train.part import Piece


def fetch(image):
    return lambda offset, size: image[offset : offset + size]


def read(found, image):
    return {path: np.concatenate([rows for _, rows in dataset.chunks(fetch(image))]) for path, dataset in found.items()}


def part_image(pieces):
    """A part as bytes, of buffer -> parameter -> (box, value)."""
    listed = [Piece(f"{kind}/{name}", *piece) for kind, named in pieces.items() for name, piece in named.items()]
    with tempfile.TemporaryFile() as file:
        part.write(file.fileno(), listed, listed[0].value.dtype)
        file.seek(0)
        return file.read()


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 16 * 1024, 16 * 1024 + 1, 16 * 9000 + 7])
@pytest.mark.parametrize("vocabulary", [256, 40_000, 70_000])
def test_a_shard_of_any_number_of_chunks(tokens, vocabulary, monkeypatch):
    """One chunk, a page of chunks (1,024), several pages, more pages than a byte of their bitmap has bits."""
    monkeypatch.setattr(shards, "_CHUNK_TOKENS", 16)
    dtype = shards.token_type(vocabulary)
    data = np.random.default_rng(tokens).integers(0, vocabulary, tokens).astype(dtype)
    image = shards._image(
        {"tokens": data, "offsets": np.array([0, tokens], "u8")}, {"a": np.bytes_("é".encode()), "b": -5}
    )
    expected = {
        "tokens": hdf5.Expected((tokens,), dtype, hdf5.PACKED),
        "offsets": hdf5.Expected((2,), np.dtype("u8"), hdf5.PACKED),
    }
    found, attributes = hdf5.examine(fetch(image), len(image), expected)
    assert attributes == {"a": "é", "b": -5}
    values = read(found, image)
    assert values["tokens"].dtype == dtype and np.array_equal(values["tokens"], data)
    assert values["offsets"].tolist() == [0, tokens]


@pytest.mark.parametrize("count", [1, 8, 9, 45, 46, 1200, pytest.param(4000, marks=pytest.mark.slow)])
def test_a_part_of_any_number_of_parameters(count):
    """Links in the header up to 8; then a heap of 1 to 5 rows and a tree of 1 to 3 levels."""
    random = np.random.default_rng(count)
    pieces = {
        kind: {f"block{n}.attention.qkv{n}": random.normal(size=(1 + n % 3, 5)).astype("f4") for n in range(count)}
        for kind in ("weights", "moment1")
    }
    boxes = {name: Box((n, 0), (n + len(value), 5)) for n, (name, value) in enumerate(pieces["weights"].items())}
    image = part_image({kind: {name: (boxes[name], value) for name, value in p.items()} for kind, p in pieces.items()})
    expected = {
        f"{kind}/{name}": hdf5.Expected(value.shape, value.dtype, hdf5.SUMMED)
        for kind, named in pieces.items()
        for name, value in named.items()
    }
    found, _ = hdf5.examine(fetch(image), len(image), expected)
    values = read(found, image)
    assert all(np.array_equal(values[f"{kind}/{n}"], v) for kind, named in pieces.items() for n, v in named.items())
    assert [found[f"weights/{name}"].attributes for name in boxes] == [
        {"box": f"{box.starts[0]}:{box.stops[0]},0:5"} for box in boxes.values()
    ]


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("shape", [(1,), (7,), (300_000,), (1, 3), (5000, 700), (3, 1 << 19), (4, 5, 6)])
def test_a_parameter_of_any_shape(shape, dtype):
    value = np.random.default_rng(1).normal(size=shape).astype(dtype)
    image = part_image({"weights": {"a": (Box.whole(shape), value)}})
    found, _ = hdf5.examine(fetch(image), len(image), {"weights/a": hdf5.Expected(shape, value.dtype, hdf5.SUMMED)})
    with h5py.File(io.BytesIO(image)) as file:
        assert np.array_equal(file["weights/a"][...], value)
    assert np.array_equal(read(found, image)["weights/a"], value)


def test_what_hdf5_could_write_otherwise_is_not_saved(monkeypatch):
    monkeypatch.setattr(hdf5, "examine", lambda *_: (_ for _ in ()).throw(hdf5.FormatError("is another")))
    with pytest.raises(hdf5.FormatError, match="is another"):
        part_image({"weights": {"a": (Box.whole((2, 2)), np.zeros((2, 2), "f4"))}})
    with pytest.raises(shards.DataError, match="made a shard that is another: install an earlier h5py"):
        shards.write_shard(None, "x", "train", [np.arange(3)], 1, 1, "hash", 300)
