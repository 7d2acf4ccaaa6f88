"""A corpus and a checkpoint to be altered, their hashes made right again so that readers get to the alteration."""

import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
from tiny import tiny_config
from whole import blocks_of

from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.cut import Box
from mlm_mpi.data import catalog
from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.shards import write_shard
from mlm_mpi.data.stream import TokenStream
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.files import publishing
from mlm_mpi.params.store import FlatStore
from mlm_mpi.train import checkpoint, part
from mlm_mpi.train.part import Piece

Change = Callable[[h5py.File], object]
DOCUMENTS = [np.append(np.arange(n) * 7 % 256, 256) for n in (3, 20_000, 500)]
TOKENS = sum(map(len, DOCUMENTS))
VOCABULARY = 37


def altered(image: bytes, change: Change) -> bytes:
    """The image of an HDF5 file after `change`."""
    memory = io.BytesIO(image)
    with h5py.File(memory, "r+", libver="latest") as file:
        change(file)
    return memory.getvalue()


class Corpus:
    """One training shard, one held-out shard, a byte tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def make(cls, folder: Path) -> "Corpus":
        folder.mkdir()
        tokenizer = Tokenizer.bytes()
        tokenizer.save(folder / "tokenizer.json")
        characters = TOKENS - len(DOCUMENTS)
        shards = tuple(
            write_shard(folder, f"{split}-00000", split, DOCUMENTS, characters, 2 * characters, tokenizer.hash, 257)
            for split in catalog.SPLITS
        )
        known: dict[str, Any] = {
            "format": catalog.FORMAT, "shards": shards, "totals": catalog.totals(shards), "seed": 0, "heldout": 0.5,
            "tokenizer": catalog.TokenizerEntry("tokenizer.json", tokenizer.hash, "bytes", 257, 256),
            "cleaning": catalog.Cleaning(6, 0, 0, 0, 0, 0, 0),
        }  # fmt: skip
        fields = {field.name for field in dataclasses.fields(catalog.Manifest)}
        manifest = catalog.Manifest(**known, **dict.fromkeys(fields - set(known), "0" * 64))
        (folder / "catalog.json").write_bytes(catalog.encode(manifest))
        return cls(folder)

    def copy(self, folder: Path) -> "Corpus":
        shutil.copytree(self.folder, folder)
        return Corpus(folder)

    @property
    def table(self) -> dict[str, Any]:
        return json.loads((self.folder / "catalog.json").read_bytes())

    def write(self, table: dict[str, Any]) -> None:
        (self.folder / "catalog.json").write_text(json.dumps(table))

    @property
    def shard(self) -> Path:
        return self.folder / self.table["shards"][0]["file"]

    def seal(self, image: bytes) -> None:
        """The training shard is this image from now on, and the catalog says so."""
        table = self.table
        self.shard.write_bytes(image)
        table["shards"][0] |= {"bytes": len(image), "sha256": hashlib.sha256(image).hexdigest()}
        self.write(table)

    def alter(self, change: Change) -> None:
        self.seal(altered(self.shard.read_bytes(), change))

    def read(self) -> None:
        """Everything that a training reads."""
        found = Catalog.open(self.folder)
        found.check_files()
        found.tokenizer()
        for split in catalog.SPLITS:
            stream = TokenStream(found, split)
            try:
                tokens = stream.read(0, stream.tokens)
                assert tokens.shape == (TOKENS,) and tokens.max() < 257
            finally:
                stream.close()


class Grid:
    """A mesh of one process that says it is part of a larger one: axis=(extent, coordinate)."""

    def __init__(self, **axes: tuple[int, int]) -> None:
        self.axes = axes

    def size(self, axis: str | None) -> int:
        return self.axes.get(axis or "", (1, 0))[0]

    def coord(self, axis: str | None) -> int:
        return self.axes.get(axis or "", (1, 0))[1]


def write_part(path: Path, store: FlatStore, buffers: dict[str, Any]) -> checkpoint.Part:
    """What one rank saves, and its entry in the manifest."""
    boxes = checkpoint.boxes_of(store)
    return write_pieces(path, checkpoint.pieces_of(store, buffers, boxes), {name: [box] for name, box in boxes.items()})


def write_pieces(path: Path, pieces: list[Piece], boxes: dict[str, list[Box]], dtype: str = "f4") -> checkpoint.Part:
    with publishing(path, 0) as descriptor:
        size, digest = part.write(descriptor, pieces, np.dtype(dtype))
    ranges = {name: [list(map(tuple, box.to_list())) for box in held] for name, held in boxes.items()}
    return checkpoint.Part(path.name, size, digest, ranges)


class Saved:
    """A checkpoint of step 3 as some writers would save it."""

    def __init__(self, folder: Path, writers: int = 2, layers: int = 2) -> None:
        self.folder, self.layers, self.last = folder, layers, f"part-{writers - 1:04}.h5"

    @classmethod
    def make(cls, folder: Path, writers: int = 2, layers: int = 2) -> "Saved":
        saved = cls(folder, writers, layers)
        folder.mkdir(parents=True)
        parts = []
        for writer in range(writers):
            store, buffers = saved.buffers(Grid(dp=(writers, writer)))
            store.initialise(0)
            parts.append(write_part(folder / f"part-{writer:04}.h5", store, buffers))
        manifest = checkpoint.Manifest(
            format=checkpoint.FORMAT, step=3, dtype="float32",
            shapes={s.parameter.name: list(s.shape) for s in store.spans}, buffers=list(buffers), parts=parts,
            config={"model": {"layers": 2}}, vocabulary=VOCABULARY, tokenizer="", catalog="", fingerprint={},
        )  # fmt: skip
        saved.seal(msgspec.to_builtins(manifest))
        return saved

    def buffers(self, grid: Any = None) -> tuple[FlatStore, dict[str, Any]]:
        model = tiny_config(f"model.layers={self.layers}").model
        store = FlatStore(blocks_of(model, VOCABULARY), grid or Mesh(), "float32")
        return store, {"weights": store.data, "moment1": store.new_buffer()}

    def copy(self, folder: Path) -> "Saved":
        shutil.copytree(self.folder, folder)
        return Saved(folder)

    @property
    def table(self) -> dict[str, Any]:
        return json.loads((self.folder / "manifest.json").read_bytes())["manifest"]

    def seal(self, table: dict[str, Any]) -> None:
        body = json.dumps(table)
        self.seal_text(body)

    def seal_text(self, body: str) -> None:
        seal = hashlib.sha256(body.encode()).hexdigest()
        (self.folder / "manifest.json").write_text(f'{{"sha256": "{seal}", "manifest": {body}}}')

    def seal_part(self, image: bytes) -> None:
        table = self.table
        (self.folder / self.last).write_bytes(image)
        table["parts"][-1] |= {"bytes": len(image), "sha256": hashlib.sha256(image).hexdigest()}
        self.seal(table)

    def alter(self, change: Change) -> None:
        self.seal_part(altered((self.folder / self.last).read_bytes(), change))

    def read(self) -> FlatStore:
        """Everything that a resumed training reads."""
        store, buffers = self.buffers()
        assert self.folder in checkpoint.published(self.folder.parent), "not published"
        checkpoint.restore(self.folder, checkpoint.read_manifest(self.folder), store, buffers)
        return store
