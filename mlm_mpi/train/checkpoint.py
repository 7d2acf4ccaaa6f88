"""Checkpoints: HDF5 parts by writer, an index of virtual datasets, a manifest with hashes, one rename.

    checkpoints/step-00000100/part-0000.h5 …  boxes of every parameter and moment, from each rank those it saves
                              index.h5        virtual datasets: whole arrays for any HDF5 tool
                              tokenizer.json  the tokenizer, so that the model outlives its corpus
                              manifest.json   step, configuration, SHA-256, size and boxes of every part

A part streams into a hidden file (`train/part.py`), is hashed and fsynced; when all ranks have done so rank 0 adds
index and manifest, fsyncs the folder and renames it. A folder named step-… is therefore complete, and a reader trusts
only the hashes: an HDF5 file whose writer was killed may open cleanly and be incomplete. No pickle anywhere.

Boxes are of global arrays, so that ranks of any other mesh find theirs. A save in the background takes the memory of a
snapshot of what this rank saves, any other that of a chunk.
"""

import contextlib
import hashlib
import io
import itertools
import math
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import h5py
import msgspec
import numpy as np

from mlm_mpi.backend.arrays import new_pages, snap
from mlm_mpi.comm.group import Group
from mlm_mpi.cut import Box
from mlm_mpi.errors import CheckpointError, CommError, MlmError, agreed
from mlm_mpi.files import publish, publishing, read_whole, sync_folder
from mlm_mpi.params.store import FlatStore
from mlm_mpi.train import part as part_file
from mlm_mpi.train.manifest import (
    FOLDER,
    FORMAT,
    PREFIX,
    DamagedCheckpoint,
    Manifest,
    Part,
    dataset,
    read_manifest,
    sealed,
    step_of,
)
from mlm_mpi.train.part import Piece, Reader

_HIDDEN = ".writing-"
TOKENIZER_FILE = "tokenizer.json"
_TOKENIZER_BYTES = 256 << 20  # the largest in use, of 256,000 tokens, have some 35 MB

T = TypeVar("T")
Buffers = dict[str, Any]  # "weights", "moment1", …: flat buffers of one store
Say = Callable[[str], None]
Check = Callable[[Path, Manifest], None]


def boxes_of(store: FlatStore) -> dict[str, Box]:
    """What this rank saves of each parameter; parameters of which it saves nothing are left out."""
    boxes = {span.parameter.name: span.parameter.layout.share(store.grid) for span in store.spans}
    return {name: box for name, box in boxes.items() if math.prod(box.shape)}


def pieces_of(store: FlatStore, buffers: Buffers, boxes: dict[str, Box]) -> list[Piece]:
    """Views of the given boxes of every buffer, one part's content."""
    held = {span.parameter.name: span.parameter.layout.box(store.grid) for span in store.spans}
    named = {kind: store.named(flat) for kind, flat in buffers.items()}
    return [
        Piece(dataset(kind, name, 0), box, views[name][box.within(held[name])[0]])
        for kind, views in named.items()
        for name, box in boxes.items()
    ]


def snapshot_of(pieces: Sequence[Piece], dtype: np.dtype[Any]) -> list[Piece]:
    """The same pieces, copied into the CPU's memory. Raises MemoryError."""
    ends = [0, *itertools.accumulate(math.prod(piece.box.shape) for piece in pieces)]
    pages = new_pages(ends[-1] * dtype.itemsize).view(dtype)
    copies = []
    for piece, (start, stop) in zip(pieces, itertools.pairwise(ends), strict=True):
        copies.append(Piece(piece.path, piece.box, pages[start:stop].reshape(piece.box.shape)))
        snap(piece.value, copies[-1].value)
    return copies


def index_image(manifest: Manifest) -> bytes:
    """An HDF5 file whose virtual datasets join the parts to whole arrays."""
    memory = io.BytesIO()
    with h5py.File(memory, "w", libver="latest") as file:
        file.attrs["step"] = manifest.step
        places: dict[str, list[tuple[Part, int, Box]]] = {name: [] for name in manifest.shapes}
        for part in manifest.parts:
            for name, number, box in part.held():
                places[name].append((part, number, box))
        for kind in manifest.buffers:
            for name, shape in manifest.shapes.items():
                layout = h5py.VirtualLayout(tuple(shape), dtype=manifest.dtype)
                for part, number, box in places[name]:
                    path = dataset(kind, name, number)
                    layout[box.slices] = h5py.VirtualSource(part.file, path, box.shape, manifest.dtype)
                file.create_virtual_dataset(f"{kind}/{name}", layout)
    return memory.getvalue()


@dataclass
class _Write:
    """One rank's part under way: a snapshot, the thread that writes it, what came of it."""

    step: int
    thread: threading.Thread | None = None
    part: Part | None = None
    error: str | None = None

    @property
    def over(self) -> bool:
        return self.part is not None or self.error is not None


class Saver:
    """Writes checkpoints, in the background where asked; every rank has one. Only `publish` communicates."""

    def __init__(
        self, folder: Path, store: FlatStore, buffers: Buffers, tokenizer: bytes, group: Group, keep: int,
        background: bool,
    ) -> None:  # fmt: skip
        self.folder, self.store, self.buffers, self.group = folder, store, buffers, group
        self.tokenizer, self.keep, self.background = tokenizer, keep, background
        self.write: _Write | None = None

    @property
    def busy(self) -> bool:
        """A save was begun and is not yet published. The same on all ranks."""
        return self.write is not None

    @property
    def written(self) -> bool:
        """My part of the save under way is on disk, or has failed."""
        return self.write is not None and self.write.over

    def begin(self, step: int) -> None:
        """Takes a snapshot of what I save and starts to write it; all ranks begin the same save."""
        boxes = boxes_of(self.store)
        write = self.write = _Write(step)
        pieces = pieces_of(self.store, self.buffers, boxes)
        if not self.background:
            self._write_part(write, pieces, boxes)
            return
        try:
            pieces = snapshot_of(pieces, self.store.dtype)
        except MemoryError:
            write.error = "no memory for a snapshot: set checkpoint.background=false"
            return
        write.thread = threading.Thread(
            target=self._write_part, args=(write, pieces, boxes), name="checkpoint", daemon=True
        )
        write.thread.start()

    def _write_part(self, write: _Write, pieces: list[Piece], boxes: dict[str, Box]) -> None:
        name = f"part-{self.group.rank:04}.h5"
        try:
            hidden = self._hidden(write.step)
            hidden.mkdir(parents=True, exist_ok=True)
            about = sum(math.prod(piece.box.shape) for piece in pieces) * self.store.dtype.itemsize
            with publishing(hidden / name, about) as descriptor:
                size, digest = part_file.write(descriptor, pieces, self.store.dtype)
            if self.group.rank == 0:
                publish(hidden / TOKENIZER_FILE, self.tokenizer)
            ranges = {parameter: [list(zip(box.starts, box.stops, strict=True))] for parameter, box in boxes.items()}
            write.part = Part(name, size, digest, ranges)
        except MlmError as error:
            write.error = str(error)
        except Exception as error:  # whatever h5py raises: the save has failed, the run goes on
            write.error = f"{type(error).__name__}: {error}"

    def publish(self, about: dict[str, Any]) -> str | None:
        """Makes the save under way visible, or removes it; returns what went wrong, the same everywhere. Collective.

        `about` holds the manifest's fields that the saver does not know.
        """
        write = self.write
        assert write is not None, "publish follows begin"
        self.write = None
        self.group.note("writing its checkpoint part")
        try:  # alone: nobody else holds this up
            Group(timeout_s=self.group.timeout_s).wait_until(
                lambda: None if write.over else (), "the disk to take its part"
            )
        except CommError as error:
            write.error = str(error)
        patient = self.group.with_timeout(2 * self.group.timeout_s)  # others may be as slow in their own wait
        reports = patient.allgather([msgspec.to_builtins(write.part), write.error], "checkpoint parts")
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(reports) if error is not None]
        if self.group.rank == 0:
            try:
                if not errors:
                    parts = [msgspec.convert(part, Part) for part, _ in reports]
                    self._check_visible(write.step, parts)
                    self._publish(write.step, parts, about)
            except (MlmError, OSError) as error:
                errors = [str(error)]
            if errors:
                shutil.rmtree(self._hidden(write.step), ignore_errors=True)
        errors = patient.broadcast(errors, "whether the checkpoint was published")
        return errors[0] if errors else None

    def _check_visible(self, step: int, parts: list[Part]) -> None:
        """Rank 0 must see what the others wrote: on node-local folders each would publish a torn checkpoint."""
        for rank, part in enumerate(parts):
            path = self._hidden(step) / part.file
            if not path.is_file() or path.stat().st_size != part.bytes:
                raise CheckpointError(
                    f"{path}, written by rank {rank}, is not visible to rank 0: --run must lie on a shared file system"
                )

    def _publish(self, step: int, parts: list[Part], about: dict[str, Any]) -> None:
        manifest = Manifest(
            format=FORMAT, step=step, dtype=self.store.dtype.name,
            shapes={s.parameter.name: list(s.parameter.layout.shape) for s in self.store.spans},
            buffers=list(self.buffers), parts=parts, tokenizer=hashlib.sha256(self.tokenizer).hexdigest(), **about,
        )  # fmt: skip
        hidden, final = self._hidden(step), self.folder / f"{PREFIX}{step:08}"
        publish(hidden / "index.h5", index_image(manifest))
        publish(hidden / "manifest.json", sealed(manifest))
        if final.exists():  # the same step, saved by an earlier start of this run
            _withdraw(final)
        hidden.rename(final)
        sync_folder(self.folder)
        # a later one is damaged, or this run would have gone on from it: it may not push this one out
        for old in [path for path in published(self.folder) if step_of(path) <= step][self.keep :]:
            with contextlib.suppress(OSError):  # the next save tries again
                _withdraw(old)

    def _hidden(self, step: int) -> Path:
        return self.folder / f"{_HIDDEN}{PREFIX}{step:08}"


def _withdraw(checkpoint: Path) -> None:
    """Removes a checkpoint, its name first: neither a reader nor a kill leaves half of one under it."""
    hidden = checkpoint.with_name(f"{_HIDDEN}old-{checkpoint.name}")
    _remove(hidden)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def read_tokenizer(checkpoint: Path, manifest: Manifest) -> bytes:
    """The content of a checkpoint's tokenizer.json, verified. Raises DamagedCheckpoint."""
    path = checkpoint / TOKENIZER_FILE
    try:
        content = read_whole(path, _TOKENIZER_BYTES, checkpoint)
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror}): copy its corpus' tokenizer there") from None
    if hashlib.sha256(content).hexdigest() != manifest.tokenizer:
        raise DamagedCheckpoint(f"{path} does not match the SHA-256 in its manifest")
    return content


def published(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest first; none where there is no folder. Raises CheckpointError."""
    try:
        named = [path for path in folder.iterdir() if FOLDER.fullmatch(path.name) and path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}: give another --run") from None
    return sorted(named, key=step_of, reverse=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what saves that never ended left behind; only for the owner of the run's lock."""
    for left in folder.glob(f"{_HIDDEN}*"):
        _remove(left)


def _remove(path: Path) -> None:
    """Removes a folder with all that is in it; a link is removed itself, wherever it leads."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def restore(checkpoint: Path, manifest: Manifest, store: FlatStore, buffers: Buffers) -> None:
    """Fills this rank's boxes of flat buffers from whatever parts hold them, each verified before it is parsed.

    Works for any mesh of writers and any of readers, in the memory of a few chunks. What raises may have filled some.
    Raises DamagedCheckpoint naming the file, CheckpointError if the model is another one.
    """
    shapes = {span.parameter.name: list(span.parameter.layout.shape) for span in store.spans}
    if shapes != manifest.shapes:
        raise CheckpointError(
            f"{checkpoint}: {_shape_difference(manifest.shapes, shapes)}: "
            "give the configuration it was saved with, or another --run"
        )
    if not set(buffers) <= set(manifest.buffers):
        raise CheckpointError(
            f"{checkpoint} holds {', '.join(manifest.buffers)}, this run needs {', '.join(buffers)}: keep optim.name"
        )
    if manifest.dtype != store.dtype.name:
        raise CheckpointError(
            f"{checkpoint} holds {manifest.dtype}, this run computes in {store.dtype.name}: keep train.dtype"
        )
    with Reader(checkpoint, manifest) as reader:
        for kind, flat in buffers.items():
            store.fill(reader.buffer(kind), flat)


def _shape_difference(saved: dict[str, list[int]], now: dict[str, list[int]]) -> str:
    for name in sorted({*saved, *now}):
        if saved.get(name) != now.get(name):
            return f"{name} has shape {saved.get(name)} there and {now.get(name)} in this run"
    return "parameters come in another order there"


def newest_manifest(folder: Path) -> Manifest | None:
    """The newest manifest that can be read, whatever the parts beside it are worth; None if there is none."""
    for path in published(folder):
        with contextlib.suppress(CheckpointError):
            return read_manifest(path)
    return None


def newest_sound(folder: Path, load: Callable[[Path, Manifest], T], say: Say) -> T:
    """What `load` makes of the newest checkpoint it can restore; for a process alone.

    A damaged one is named and the one before is tried. Raises CheckpointError if there is none.
    """
    problems: list[str] = []
    for path in published(folder):
        try:
            return load(path, read_manifest(path))
        except DamagedCheckpoint as error:
            if not path.exists():  # a live run has replaced it meanwhile
                return newest_sound(folder, load, say)
            problems.append(str(error))
            say(_passed_over(path.name, str(error)))
    raise CheckpointError(_none_left(folder, problems))


def _passed_over(name: str, damage: str) -> str:
    return f"ALARM checkpoint {name} is damaged ({damage}): trying the one before"


def _none_left(folder: Path, problems: Sequence[str]) -> str:
    if problems:
        return f"every checkpoint in {folder} is damaged ({problems[0]}): restore one, or start another --run"
    return f"{folder} holds no checkpoint: train first, or give the --run folder of a run that saved one"


def resume(
    folder: Path, store: FlatStore, buffers: Buffers, group: Group, say: Say, check: Check = lambda path, manifest: None
) -> tuple[Path, Manifest] | None:
    """Restores the newest sound checkpoint on all ranks; None if there is none at all. Collective.

    `check` may refuse a manifest before its parts are read. A damaged checkpoint is named and the one before
    is tried. Raises CheckpointError, agreed, if all are damaged or the model is another one.
    """
    names = group.broadcast([path.name for path in published(folder)] if group.rank == 0 else None, "checkpoints")
    problems: list[str] = []
    for name in names:
        damage, manifest = None, None
        with group.together(f"checkpoint {name}"):
            try:
                manifest = read_manifest(folder / name)
                check(folder / name, manifest)
                restore(folder / name, manifest, store, buffers)
            except DamagedCheckpoint as error:
                damage = str(error)
        found = [text for text in group.allgather(damage, f"damage of {name}") if text is not None]
        if not found and manifest is not None:
            return folder / name, manifest
        problems.append(found[0])
        say(_passed_over(name, found[0]))
    if problems:
        raise agreed(CheckpointError(_none_left(folder, problems)))
    return None
