"""Checkpoints: HDF5 parts by writer, an index of virtual datasets, a manifest with hashes, one rename.

    checkpoints/step-00000100/part-0000.h5 …  each rank's rows of every parameter and moment
                              index.h5        virtual datasets: whole arrays for any HDF5 tool
                              tokenizer.json  the tokenizer, so that the model outlives its corpus
                              manifest.json   step, configuration, SHA-256 and size of every part

A part is built in memory (h5py on a full disk takes the interpreter down with it), hashed, written and
fsynced under a hidden name; when all ranks have done so rank 0 adds index and manifest, fsyncs the folder
and renames it. A folder named step-… is therefore complete, and a reader trusts only the hashes: an HDF5
file whose writer was killed may open cleanly and be incomplete. No pickle anywhere.
"""

import contextlib
import hashlib
import io
import math
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import h5py
import msgspec
import numpy as np

from mlm_mpi import hdf5
from mlm_mpi.backend.arrays import fill, snap, to_host
from mlm_mpi.comm.group import Group
from mlm_mpi.cut import cut
from mlm_mpi.errors import CheckpointError, CommError, MlmError, agreed
from mlm_mpi.files import publish, read_whole, sync_folder
from mlm_mpi.params.store import FlatStore

FORMAT = 1
_CHUNK_BYTES = 1 << 20
_PREFIX, _HIDDEN = "step-", ".writing-"
TOKENIZER_FILE = "tokenizer.json"
_TOKENIZER_BYTES = 256 << 20  # the largest in use, of 256,000 tokens, have some 35 MB
_FOLDER = re.compile(_PREFIX + "([0-9]{8}|[1-9][0-9]{8,17})")  # as `_publish` names them
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")  # of a file or a parameter: never a path
_MANIFEST_BYTES = 64 << 20  # 1,000 writers of 1,000 parameters
_LARGEST = 1 << 48  # elements of a parameter

T = TypeVar("T")
Buffers = dict[str, Any]  # "weights", "moment1", …: flat buffers of one store
Pieces = dict[str, dict[str, Any]]  # buffer -> parameter -> the rows that one writer saves
Say = Callable[[str], None]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a checkpoint, and the rows [start, stop) of each parameter it holds."""

    file: str
    bytes: int
    sha256: str
    rows: dict[str, tuple[int, int]]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a checkpoint is. `step`: updates done, and the number of the next one."""

    format: int
    step: int
    dtype: str
    shapes: dict[str, list[int]]
    buffers: list[str]
    parts: list[Part]
    config: dict[str, dict[str, Any]]
    vocabulary: int
    tokenizer: str
    catalog: str
    fingerprint: dict[str, Any]
    incomparable: str | None = None  # why bits of this run cannot be compared with others, once and for all
    corpus: str = ""  # what the catalog held and how it was made, in words
    plugins: dict[str, str] = {}  # "models/mine.py" -> SHA-256 of each file of --plugins that was used


class _Sealed(msgspec.Struct, forbid_unknown_fields=True):
    """The content of manifest.json: a manifest and the SHA-256 of its bytes."""

    sha256: str
    manifest: msgspec.Raw


class _Versioned(msgspec.Struct):
    """What the manifest of any version holds."""

    format: int


Check = Callable[[Path, Manifest], None]


class DamagedCheckpoint(CheckpointError):
    """A part or manifest that is missing, truncated or altered: the checkpoint before may still do."""


def row_ranges(store: FlatStore, writers: int, writer: int) -> dict[str, tuple[int, int]]:
    """Rows of dim 0 of each parameter that a writer saves; parameters of which it saves none are left out."""
    ranges = {span.parameter.name: cut(span.shape[0], writers, writer) for span in store.spans}
    return {name: (start, stop) for name, (start, stop) in ranges.items() if stop > start}


def pieces_of(store: FlatStore, buffers: Buffers, rows: dict[str, tuple[int, int]]) -> Pieces:
    """Views of the given rows of every buffer."""
    named = {kind: store.named(flat) for kind, flat in buffers.items()}
    return {kind: {name: views[name][a:b] for name, (a, b) in rows.items()} for kind, views in named.items()}


def part_image(pieces: Pieces, rows: dict[str, tuple[int, int]]) -> bytes:
    """An HDF5 file with /<buffer>/<parameter> of the given rows, as bytes; no timestamps, all checksummed.

    Raises FormatError where `restore` could not read it: an HDF5 that writes something else.
    """
    dtype = next(np.dtype(value.dtype) for values in pieces.values() for value in values.values())
    memory = io.BytesIO()
    with h5py.File(memory, "w", libver="latest") as file:
        for kind, values in pieces.items():
            for name, value in values.items():
                row_bytes = max(1, value[:1].nbytes)
                chunk = (max(1, min(len(value), _CHUNK_BYTES // row_bytes)), *value.shape[1:])
                dataset = file.create_dataset(
                    f"{kind}/{name}", data=to_host(value), chunks=chunk, fletcher32=True, track_times=False
                )
                dataset.attrs["first_row"] = rows[name][0]
    image = memory.getvalue()
    _examine(image, {kind: {name: v.shape for name, v in values.items()} for kind, values in pieces.items()}, dtype)
    return image


def _examine(
    image: bytes, shapes: dict[str, dict[str, tuple[int, ...]]], dtype: np.dtype[Any]
) -> dict[str, hdf5.Dataset]:
    """The datasets of a part by path, `shapes` being those of its rows. Raises FormatError."""
    expected = {
        f"{kind}/{name}": hdf5.Expected(shape, dtype, hdf5.SUMMED)
        for kind, named in shapes.items()
        for name, shape in named.items()
    }
    view = memoryview(image)
    return hdf5.examine(lambda offset, size: view[offset : offset + size], len(image), expected)[0]


def index_image(manifest: Manifest) -> bytes:
    """An HDF5 file whose virtual datasets join the parts to whole arrays."""
    memory = io.BytesIO()
    with h5py.File(memory, "w", libver="latest") as file:
        file.attrs["step"] = manifest.step
        for kind in manifest.buffers:
            for name, shape in manifest.shapes.items():
                layout = h5py.VirtualLayout(tuple(shape), dtype=manifest.dtype)
                for part in manifest.parts:
                    if name in part.rows:
                        start, stop = part.rows[name]
                        source = h5py.VirtualSource(
                            part.file, f"{kind}/{name}", (stop - start, *shape[1:]), manifest.dtype
                        )
                        layout[start:stop] = source
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
        """Takes a snapshot of my rows and starts to write it; all ranks begin the same save."""
        rows = row_ranges(self.store, self.group.size, self.group.rank)
        write = self.write = _Write(step)
        pieces = pieces_of(self.store, self.buffers, rows)
        if not self.background:
            self._write_part(write, pieces, rows)
            return
        try:
            snapshot = {kind: {name: snap(value) for name, value in p.items()} for kind, p in pieces.items()}
        except MemoryError:
            write.error = "no memory for a snapshot: set checkpoint.background=false"
            return
        write.thread = threading.Thread(
            target=self._write_part, args=(write, snapshot, rows), name="checkpoint", daemon=True
        )
        write.thread.start()

    def _write_part(self, write: _Write, pieces: Pieces, rows: dict[str, tuple[int, int]]) -> None:
        name = f"part-{self.group.rank:04}.h5"
        try:
            hidden = self._hidden(write.step)
            hidden.mkdir(parents=True, exist_ok=True)
            image = part_image(pieces, rows)
            digest = publish(hidden / name, image)
            if self.group.rank == 0:
                publish(hidden / TOKENIZER_FILE, self.tokenizer)
            write.part = Part(name, len(image), digest, rows)
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
            shapes={s.parameter.name: list(s.shape) for s in self.store.spans},
            buffers=list(self.buffers), parts=parts, tokenizer=hashlib.sha256(self.tokenizer).hexdigest(), **about,
        )  # fmt: skip
        hidden, final = self._hidden(step), self.folder / f"{_PREFIX}{step:08}"
        publish(hidden / "index.h5", index_image(manifest))
        body = msgspec.json.encode(manifest, order="sorted")
        seal = hashlib.sha256(body).hexdigest()
        publish(hidden / "manifest.json", msgspec.json.encode({"sha256": seal, "manifest": msgspec.Raw(body)}))
        if final.exists():  # the same step, saved by an earlier start of this run
            _withdraw(final)
        hidden.rename(final)
        sync_folder(self.folder)
        # a later one is damaged, or this run would have gone on from it: it may not push this one out
        for old in [path for path in published(self.folder) if _step_of(path) <= step][self.keep :]:
            with contextlib.suppress(OSError):  # the next save tries again
                _withdraw(old)

    def _hidden(self, step: int) -> Path:
        return self.folder / f"{_HIDDEN}{_PREFIX}{step:08}"


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
        named = [path for path in folder.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}: give another --run") from None
    return sorted(named, key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


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


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest, its seal checked and its numbers sane. Raises DamagedCheckpoint."""
    path = checkpoint / "manifest.json"
    try:
        sealed = msgspec.json.decode(read_whole(path, _MANIFEST_BYTES, checkpoint.parent), type=_Sealed)
        body = bytes(sealed.manifest)
        if sealed.sha256 != hashlib.sha256(body).hexdigest():
            raise DamagedCheckpoint(f"{path} does not match its own SHA-256")
        found = msgspec.json.decode(body, type=_Versioned).format
        if found != FORMAT:
            raise CheckpointError(
                f"{path} has format {found}, this version reads {FORMAT}: use the version that wrote it"
            )
        manifest = msgspec.json.decode(body, type=Manifest)
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from None
    step = _step_of(checkpoint) if _FOLDER.fullmatch(checkpoint.name) else manifest.step  # a copy may have any name
    wrong = next(_oddities(manifest, step), None)
    if wrong is not None:
        raise DamagedCheckpoint(f"{path} {wrong}")
    return manifest


def _oddities(manifest: Manifest, step: int) -> Iterator[str]:
    """What is wrong with a manifest whose seal is right: whoever writes one can seal it too."""
    if manifest.step != step:
        yield f"is of step {manifest.step}, its folder of step {step}"
    if manifest.dtype not in ("float32", "float64"):
        yield f"has the type {manifest.dtype!r}, neither float32 nor float64"
    if manifest.vocabulary < 1:
        yield f"has a vocabulary of {manifest.vocabulary}"
    for kind, names in (
        ("parameter", list(manifest.shapes)), ("buffer", manifest.buffers), ("file", [p.file for p in manifest.parts])
    ):  # fmt: skip
        odd = [name for name in names if not _NAME.fullmatch(name)]
        if odd or not names or len(set(names)) != len(names):
            yield f"names a {kind} {odd[0]!r}" if odd else f"names no {kind}, or one twice"
    for name, shape in manifest.shapes.items():
        if not shape or len(shape) > 8 or min(shape) < 1 or math.prod(shape) > _LARGEST:
            yield f"gives {name} the shape {shape}"
    yield from _uncovered(manifest)
    for part in manifest.parts:
        most = _most_bytes(part, manifest)
        if not 0 <= part.bytes <= most:
            yield f"gives {part.file} {part.bytes} bytes, its rows need at most {most}"


def _uncovered(manifest: Manifest) -> Iterator[str]:
    """Rows of a parameter that no part holds, or two, or that are not there."""
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in manifest.shapes}
    for part in manifest.parts:
        for name, rows in part.rows.items():
            if name not in ranges:
                yield f"has rows of {name!r} in {part.file}, which has no shape"
                return
            ranges[name].append(rows)
    for name, parts in ranges.items():
        at = 0
        for start, stop in sorted(parts):
            if start != at or stop <= start:
                yield f"has rows {start} to {stop} of {name} where {at} should begin"
                return
            at = stop
        if at != manifest.shapes[name][0]:
            yield f"has parts with {at} rows of {name}, which has {manifest.shapes[name][0]}"


def _most_bytes(part: Part, manifest: Manifest) -> int:
    """What a part can need: chunks of up to twice its rows, and headers."""
    item = np.dtype(manifest.dtype).itemsize
    rows = sum((stop - start) * math.prod(manifest.shapes[name][1:]) for name, (start, stop) in part.rows.items())
    return len(manifest.buffers) * (2 * rows * item + len(part.rows) * 4096) + (1 << 16)


def restore(checkpoint: Path, manifest: Manifest, store: FlatStore, buffers: Buffers) -> None:
    """Fills flat buffers from every part, each verified before a byte of it is parsed.

    Works for any number of writers and readers. Raises DamagedCheckpoint naming the file, CheckpointError
    if the model is another one.
    """
    shapes = {span.parameter.name: list(span.shape) for span in store.spans}
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
    views = {kind: store.named(flat) for kind, flat in buffers.items()}
    for part in manifest.parts:
        path = checkpoint / part.file
        content = _verified(path, part)
        try:
            _fill(views, content, part, manifest)
        except hdf5.FormatError as error:
            raise DamagedCheckpoint(f"{path} {error}") from None
    store.refresh()


def _fill(views: Pieces, content: bytes, part: Part, manifest: Manifest) -> None:
    """Copies a part's rows into their places in `views`, straight from the verified bytes. Raises FormatError."""
    shapes = {name: (stop - start, *manifest.shapes[name][1:]) for name, (start, stop) in part.rows.items()}
    found = _examine(content, dict.fromkeys(manifest.buffers, shapes), np.dtype(manifest.dtype))
    view = memoryview(content)
    for kind, named in views.items():
        for name, (start, _) in part.rows.items():
            dataset = found[f"{kind}/{name}"]
            if dataset.attributes != {"first_row": start}:
                raise hdf5.FormatError(f"does not begin with row {start} of {kind}/{name}")
            for row, values in dataset.chunks(lambda offset, size: view[offset : offset + size]):
                fill(named[name][start + row : start + row + len(values)], values)


def _verified(path: Path, part: Part) -> bytes:
    try:
        content = read_whole(path, part.bytes, path.parent)
    except OSError as error:
        raise DamagedCheckpoint(
            f"{path} cannot be read: {error.strerror}; its manifest says {part.bytes} bytes"
        ) from None
    if len(content) != part.bytes:
        raise DamagedCheckpoint(f"{path} has {len(content)} bytes, its manifest says {part.bytes}")
    if hashlib.sha256(content).hexdigest() != part.sha256:
        raise DamagedCheckpoint(f"{path} does not match the SHA-256 in its manifest")
    return content


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
