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
import math
import mmap
import shutil
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import h5py
import msgspec
import numpy as np
from h5py import h5d, h5p, h5s, h5t

from mlm_mpi.backend.arrays import new_pages, snap
from mlm_mpi.comm.group import Group
from mlm_mpi.cut import Box
from mlm_mpi.errors import CheckpointError, CommError, MlmError, agreed
from mlm_mpi.files import publish, publishing, read_whole, sync_folder
from mlm_mpi.params.ownership import Owned
from mlm_mpi.params.store import FlatStore
from mlm_mpi.train import part as part_file
from mlm_mpi.train.manifest import (
    FOLDER,
    FORMAT,
    PREFIX,
    WEIGHTS,
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


def boxes_of(store: FlatStore, owned: Owned | None = None) -> dict[str, Box]:
    """What this rank saves of each parameter; parameters of which it saves nothing are left out.

    `owned`: of what it saves the rank alone holds moments.
    """
    still = {} if store.still is None else boxes_of(store.still)
    if owned is not None:
        return owned.boxes() | still
    boxes = {span.parameter.name: span.parameter.layout.share(store.grid) for span in store.own}
    return {name: box for name, box in boxes.items() if math.prod(box.shape)} | still


def pieces_of(
    store: FlatStore, buffers: Buffers, boxes: dict[str, Box], owned: Owned | None = None
) -> list[Piece]:  # fmt: skip
    """Views of the given boxes of every buffer, one part's content."""
    held = {span.parameter.name: span.parameter.layout.box(store.grid) for span in store.spans}
    named = {
        kind: {name: (held[name], view) for name, view in store.named(flat).items()}
        if owned is None or flat.size == store.size else owned.named(flat)
        for kind, flat in buffers.items()
    }  # fmt: skip
    pieces = [
        Piece(dataset(kind, name, 0), box, view[box.within(around)[0]])
        for kind, views in named.items()
        for name, box in boxes.items()
        if name in views
        for around, view in [views[name]]
    ]
    return pieces if store.still is None else pieces + pieces_of(store.still, {WEIGHTS: store.still.data}, boxes)


class Snapshot:
    """Memory for copies of what a rank saves, kept from save to save.

    New pages cost four times what copying into old ones does (1.2 s and 0.24 s per GiB), so a thread touches them
    while the first steps run. They are pages of their own: the allocator keeps what is freed, in pieces between those
    of the steps. Huge pages are not asked for: the kernel tidied up for 0.2 to 3 s per GiB to find some.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size, self._pages = size_bytes, np.empty(0, np.uint8)
        self._thread = threading.Thread(target=self._reserve, name="snapshot", daemon=True)
        self._thread.start()

    def _reserve(self) -> None:
        with contextlib.suppress(MemoryError):  # `take` says it
            pages = new_pages(self._size)
            pages[:: mmap.PAGESIZE] = 0
            self._pages = pages

    def take(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Copies pieces, over those copied before. Raises MemoryError."""
        self._thread.join()
        if len(self._pages) < self._size:
            self._pages = new_pages(self._size)
        copies, at = [], 0
        for piece in pieces:
            copy = self._pages[at : at + piece.value.nbytes].view(piece.value.dtype).reshape(piece.box.shape)
            snap(piece.value, copy)
            copies.append(Piece(piece.path, piece.box, copy))
            at += piece.value.nbytes
        return copies


def index_image(manifest: Manifest) -> bytes:
    """An HDF5 file whose virtual datasets join the parts to whole arrays.

    h5py's own VirtualLayout takes three times as long: 1.4 ms of the interpreter's lock for every dataset.
    """
    memory = io.BytesIO()
    with h5py.File(memory, "w", libver="latest") as file:
        file.attrs["step"] = manifest.step
        places: dict[str, list[tuple[str, int, Box]]] = {name: [] for name in manifest.shapes}
        for part in manifest.parts:
            for name, number, box in part.held():
                places[name].append((part.file, number, box))
        for kind in manifest.buffers:
            group = file.create_group(kind)
            for name, shape in manifest.shapes.items():
                if kind not in manifest.holding(name):
                    continue
                whole, how = h5s.create_simple(tuple(shape)), h5p.create(h5p.DATASET_CREATE)
                for source, number, box in places[name]:
                    whole.select_hyperslab(box.starts, box.shape)
                    path = dataset(kind, name, number)
                    how.set_virtual(whole, source.encode(), path.encode(), h5s.create_simple(box.shape))
                whole.select_all()
                h5d.create(group.id, name.encode(), h5t.py_create(np.dtype(manifest.dtype)), whole, how)
    return memory.getvalue()


@dataclass
class _Save:
    """A save under way on one rank: my part and what came of it; then, on rank 0, its publication."""

    step: int
    part: Part | None = None
    error: str | None = None
    collected: bool = False  # everybody's part is known to rank 0
    errors: list[str] | None = None  # of all ranks, on rank 0 when it has published the checkpoint or removed its parts

    @property
    def written(self) -> bool:
        return self.part is not None or self.error is not None


class Saver:
    """Writes checkpoints, in the background where asked; every rank has one.

    All ranks `begin`; when all have `written` they call `tend`, which lets rank 0's thread publish; when all have
    `written` again, `tend` tells all how it went. `publish` does the rest of that at once. Only these two communicate.
    """

    def __init__(
        self, folder: Path, store: FlatStore, buffers: Buffers, tokenizer: bytes, group: Group, keep: int,
        background: bool, owned: Owned | None = None, spared: Callable[[], Collection[int]] = tuple,
    ) -> None:  # fmt: skip
        """`keep`: so many of the newest stay, and those of the steps that are `spared`."""
        self.owned, self.spared = owned, spared
        self.folder, self.store, self.buffers, self.group = folder, store, buffers, group
        self.tokenizer, self.keep, self.background = tokenizer, keep, background
        self.save: _Save | None = None
        self._boxes = boxes_of(store, owned)
        self._bytes = sum(piece.value.nbytes for piece in pieces_of(store, buffers, self._boxes, owned))
        self._snapshot = Snapshot(self._bytes) if background else None
        self._writer: threading.Thread | None = None
        self._publisher: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """A save was begun and is not yet over. The same on all ranks."""
        return self.save is not None

    @property
    def written(self) -> bool:
        """What the save under way needs of me now is done: my part is on disk or has failed; rank 0 has published."""
        save = self.save
        if save is None or not save.collected:
            return save is not None and save.written
        return save.errors is not None or self.group.rank != 0

    def begin(self, step: int) -> None:
        """Takes a snapshot of what I save and starts to write it; all ranks begin the same save."""
        save = self.save = _Save(step)
        pieces = pieces_of(self.store, self.buffers, self._boxes, self.owned)
        if self._snapshot is None:
            self._write_part(save, pieces)
            return
        try:
            if self._writer is not None and self._writer.is_alive():  # a disk that took too long: it still reads this
                self._snapshot = Snapshot(self._bytes)
            pieces = self._snapshot.take(pieces)
        except MemoryError:
            save.error = "no memory for a snapshot: set checkpoint.background=false"
            return
        self._writer = threading.Thread(target=self._write_part, args=(save, pieces), name="checkpoint", daemon=True)
        self._writer.start()

    def _write_part(self, save: _Save, pieces: list[Piece]) -> None:
        name = f"part-{self.group.rank:04}.h5"
        try:
            hidden = self._hidden(save.step)
            hidden.mkdir(parents=True, exist_ok=True)
            with publishing(hidden / name, self._bytes) as descriptor:
                size, digest = part_file.write(descriptor, pieces, self.store.dtype)
            if self.group.rank == 0:
                publish(hidden / TOKENIZER_FILE, self.tokenizer)
            ranges = {key: [list(zip(box.starts, box.stops, strict=True))] for key, box in self._boxes.items()}
            save.part = Part(name, size, digest, ranges)
        except Exception as error:  # whatever h5py raises: the save has failed, the run goes on
            save.error = _said(error)

    def tend(self, about: dict[str, Any]) -> str | None:
        """Goes on with a save that all ranks say they have `written`; nobody's disk is waited for. Collective.

        Returns what went wrong, the same everywhere, when the save is over. `about` holds the manifest's fields that
        the saver does not know.
        """
        save = self._under_way()
        if save.collected:
            return self._conclude(save)
        self._collect(save, about)
        return None

    def publish(self, about: dict[str, Any]) -> str | None:
        """Makes the save under way visible, or removes it; returns what went wrong, the same everywhere. Collective."""
        save = self._under_way()
        if not save.collected:
            self._collect(save, about)
        return self._conclude(save)

    def abandon(self) -> None:
        """Forgets the save under way when my threads are through with it, or the disk has had its time."""
        self.save = None
        for thread in (self._writer, self._publisher):
            if thread is not None:
                thread.join(self.group.timeout_s)

    def _under_way(self) -> _Save:
        assert self.save is not None, "begin comes first"
        return self.save

    def _collect(self, save: _Save, about: dict[str, Any]) -> None:
        """Everybody's part to rank 0, which starts to publish them."""
        error = self._wait(lambda: save.written, "the disk to take its part")
        save.error = save.error or error
        reports = self._patient().allgather([msgspec.to_builtins(save.part), save.error], "checkpoint parts")
        save.collected = True
        if self.group.rank == 0:
            if self._snapshot is None:
                self._finish(save, reports, about)
                return
            arguments = save, reports, about
            self._publisher = threading.Thread(target=self._finish, args=arguments, name="publication", daemon=True)
            self._publisher.start()

    def _finish(self, save: _Save, reports: list[Any], about: dict[str, Any]) -> None:
        """Rank 0 publishes the checkpoint, or removes all parts where one has failed."""
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(reports) if error is not None]
        try:
            if not errors:
                parts = [msgspec.convert(part, Part) for part, _ in reports]
                self._check_visible(save.step, parts)
                self._publish(save.step, parts, about)
        except Exception as error:
            errors = [_said(error)]
        if errors:
            shutil.rmtree(self._hidden(save.step), ignore_errors=True)
        save.errors = errors

    def _conclude(self, save: _Save) -> str | None:
        errors = None
        if self.group.rank == 0:  # a publication that comes later than this is as sound as any
            error = self._wait(lambda: save.errors is not None, "the disk to take the checkpoint's index")
            errors = save.errors if save.errors is not None else [error]
        errors = self._patient().broadcast(errors, "the publication of the checkpoint")
        self.save = None
        return errors[0] if errors else None

    def _wait(self, done: Callable[[], bool], what: str) -> str | None:
        """Waits alone, since nobody else holds this up; returns what is wrong if it takes too long."""
        self.group.note("writing its checkpoint part")
        try:
            Group(timeout_s=self.group.timeout_s).wait_until(lambda: None if done() else (), what)
        except CommError as error:
            return str(error)
        return None

    def _patient(self) -> Group:
        return self.group.with_timeout(2 * self.group.timeout_s)  # others may be as slow in their own wait

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
            shapes=self.store.shapes, frozen=[p.name for p in self.store.model if p.frozen],
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
        older = [path for path in published(self.folder) if step_of(path) <= step][self.keep :]
        spared = self.spared()
        for old in (path for path in older if step_of(path) not in spared):
            with contextlib.suppress(OSError):  # the next save tries again
                _withdraw(old)

    def _hidden(self, step: int) -> Path:
        return self.folder / f"{_HIDDEN}{PREFIX}{step:08}"


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, MlmError | OSError) else f"{type(error).__name__}: {error}"


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


def restore(
    checkpoint: Path, manifest: Manifest, store: FlatStore, buffers: Buffers, owned: Owned | None = None
) -> None:  # fmt: skip
    """Fills this rank's boxes of flat buffers from whatever parts hold them, each verified before it is parsed.

    Works for any mesh of writers and any of readers, in the memory of a few chunks. What raises may have filled some.
    Raises DamagedCheckpoint naming the file, CheckpointError if the model is another one.
    """
    shapes = store.shapes
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
            if owned is None or flat.size == store.size:
                store.fill(reader.buffer(kind), flat)
            else:
                owned.fill(reader.buffer(kind), flat)
        if store.still is not None:
            store.still.fill(reader.buffer(WEIGHTS))
    store.refresh()


def check(checkpoint: Path, manifest: Manifest) -> None:
    """Reads every byte that the manifest vouches for. Raises DamagedCheckpoint naming the file."""
    read_tokenizer(checkpoint, manifest)
    with Reader(checkpoint, manifest) as reader:
        for part in manifest.parts:
            reader.file(part)


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


def newest_sound(
    folder: Path, load: Callable[[Path, Manifest], T], say: Say, group: Group | None = None
) -> T:  # fmt: skip
    """What `load`, which sends nothing, makes of the newest checkpoint that all ranks can restore. Collective.

    A damaged one is named and the one before is tried: each rank may have read other files of it. Raises
    CheckpointError if there is none.
    """
    group, problems = group or Group(), list[str]()
    for name in _names_for_all(folder, group):
        path, damage, found = folder / name, None, list[T]()
        with group.together(f"checkpoint {name}"):
            try:
                found.append(load(path, read_manifest(path)))
            except DamagedCheckpoint as error:
                damage = str(error)
        damaged = [text for text in group.allgather(damage, f"damage of {name}") if text is not None]
        if not damaged:
            return found[0]
        if group.broadcast(not path.exists(), f"another look at {name}"):  # a live run has replaced it meanwhile
            return newest_sound(folder, load, say, group)
        problems.append(damaged[0])
        say(_passed_over(name, damaged[0]))
    raise agreed(CheckpointError(_none_left(folder, problems)))


def _names_for_all(folder: Path, group: Group) -> list[str]:
    """Of the checkpoints that rank 0 sees, the newest first. Collective."""
    seen: list[Path] = []
    with group.together("a look at the checkpoints"):
        seen = published(folder)
    names: list[str] = group.broadcast([path.name for path in seen], "checkpoints")
    return names


def _passed_over(name: str, damage: str) -> str:
    return f"ALARM checkpoint {name} is damaged ({damage}): trying the one before"


def _none_left(folder: Path, problems: Sequence[str]) -> str:
    if problems:
        return f"every checkpoint in {folder} is damaged ({problems[0]}): restore one, or start another --run"
    return f"{folder} holds no checkpoint: train first, or give the --run folder of a run that saved one"


def resume(
    folder: Path, store: FlatStore, buffers: Buffers, group: Group, say: Say,
    check: Check = lambda path, manifest: None, owned: Owned | None = None,
) -> tuple[Path, Manifest] | None:  # fmt: skip
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
                restore(folder / name, manifest, store, buffers, owned)
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
