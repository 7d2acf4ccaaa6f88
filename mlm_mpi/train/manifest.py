"""A checkpoint's manifest: what it holds, which boxes of which arrays lie in which file; read with suspicion.

Global arrays, boxes of them and nothing of the mesh that wrote them: any other mesh finds what it needs.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mlm_mpi.cut import Box
from mlm_mpi.errors import CheckpointError
from mlm_mpi.files import read_whole

FORMAT = 2
PREFIX = "step-"
WEIGHTS = "weights"  # the buffer that every checkpoint has
FOLDER = re.compile(PREFIX + "([0-9]{8}|[1-9][0-9]{8,17})")  # as a save names them
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")  # of a file or a parameter: never a path
_SEARCH = {"figure": str, "best": int, "value": float, "worse": int, "at": int}
_MANIFEST_BYTES = 64 << 20  # 1,000 writers of 1,000 parameters
_LARGEST = 1 << 48  # elements of a parameter
_CORNERS = 1 << 21  # of all boxes: what 1,000 writers of 1,000 parameters cut along one dim have


class DamagedCheckpoint(CheckpointError):
    """A part or manifest that is missing, truncated or altered: the checkpoint before may still do."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a checkpoint, and the boxes, [start, stop) of each dim, of every parameter it holds."""

    file: str
    bytes: int
    sha256: str
    boxes: dict[str, list[list[tuple[int, int]]]]

    def held(self) -> Iterator[tuple[str, int, Box]]:
        """(parameter, number among its boxes, box) of everything in this file."""
        for name, boxes in self.boxes.items():
            for number, box in enumerate(boxes):
                yield name, number, Box.from_list(box)


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a checkpoint is. `step`: updates done, and the number of the next one. `shapes`: of whole arrays."""

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
    levels: dict[str, float] = {}  # of loss and gradient, as train/guard.py keeps them
    labels: list[str] = []  # of a task that has some
    pairs: bool = False  # whether its texts are pairs
    frozen: list[str] = []  # parameters that training left as they were: of the buffers only "weights" has them
    start: str = ""  # SHA-256 of the manifest of the checkpoint that the run began with, if there was one
    vectors: str | msgspec.UnsetType = msgspec.UNSET  # SHA-256 of the file of word vectors that it began with;
    # left out where there was none, so that `name_of` gives checkpoints that lack it the name that they had
    hints: dict[str, str] | msgspec.UnsetType = (
        msgspec.UNSET
    )  # word -> its translation, as its corpus had them; likewise
    search: dict[str, Any] = {}  # for the best checkpoint, as train/search.py keeps it
    plugins: dict[str, str] = {}  # "models/mine.py" -> SHA-256 of each file of --plugins that was used

    def holding(self, name: str) -> list[str]:
        """The buffers that have an array of this parameter."""
        return [WEIGHTS] if name in self.frozen else self.buffers


class _Sealed(msgspec.Struct, forbid_unknown_fields=True):
    """The content of manifest.json: a manifest and the SHA-256 of its bytes."""

    sha256: str
    manifest: msgspec.Raw


class _Versioned(msgspec.Struct):
    """What the manifest of any version holds."""

    format: int


def dataset(buffer: str, name: str, number: int) -> str:
    """Where a part keeps a box: /<buffer>/<parameter>, and a parameter's second box under …@1."""
    return f"{buffer}/{name}" + (f"@{number}" if number else "")


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix(PREFIX))


def name_of(manifest: Manifest) -> str:
    """SHA-256 that names what a manifest vouches for: the hashes of all parts are in it."""
    return hashlib.sha256(msgspec.json.encode(manifest, order="sorted")).hexdigest()


def sealed(manifest: Manifest) -> bytes:
    """The content of manifest.json."""
    body = msgspec.json.encode(manifest, order="sorted")
    return msgspec.json.encode({"sha256": hashlib.sha256(body).hexdigest(), "manifest": msgspec.Raw(body)})


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest, its seal checked and its numbers sane. Raises DamagedCheckpoint."""
    path = checkpoint / "manifest.json"
    try:
        seal = msgspec.json.decode(read_whole(path, _MANIFEST_BYTES, checkpoint.parent), type=_Sealed)
        body = bytes(seal.manifest)
        if seal.sha256 != hashlib.sha256(body).hexdigest():
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
    step = step_of(checkpoint) if FOLDER.fullmatch(checkpoint.name) else manifest.step  # a copy may have any name
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
    if not {*manifest.frozen} <= {*manifest.shapes} or (manifest.frozen and WEIGHTS not in manifest.buffers):
        yield f"has frozen parameters, {manifest.frozen[0]} for one, without weights"
    if manifest.search and {name: type(found) for name, found in manifest.search.items()} != _SEARCH:
        yield f"has judgements {manifest.search}"
    if not all(math.isfinite(level) and level >= 0 for level in manifest.levels.values()):
        yield f"has levels {manifest.levels}"
    yield from _misplaced(manifest)
    for part in manifest.parts:
        most = _most_bytes(part, manifest)
        if not 0 <= part.bytes <= most:
            yield f"gives {part.file} {part.bytes} bytes, its boxes need at most {most}"


def _misplaced(manifest: Manifest) -> Iterator[str]:
    """Boxes that are none, lie outside of their arrays, or do not hold every element once."""
    placed: dict[str, list[list[tuple[int, int]]]] = {name: [] for name in manifest.shapes}
    for part in manifest.parts:
        for name, boxes in part.boxes.items():
            shape = manifest.shapes.get(name)
            if shape is None:
                yield f"has boxes of {name!r} in {part.file}, which has no shape"
                return
            for box in boxes:
                if len(box) != len(shape) or not all(0 <= a < b <= n for (a, b), n in zip(box, shape, strict=True)):
                    yield f"has the box {list(map(list, box))} of {name} in {part.file}, its shape is {shape}"
                    return
            placed[name] += boxes
    edges = {name: np.array(placed[name], np.int64).reshape(-1, len(n), 2) for name, n in manifest.shapes.items()}
    corners = sum(len(found) << len(_cut_dims(manifest.shapes[name], found)) for name, found in edges.items())
    if corners > _CORNERS:
        yield f"lists boxes with {corners} corners, at most {_CORNERS} are read"
        return
    for name, shape in manifest.shapes.items():
        wrong = miscounted(shape, edges[name])
        if wrong is not None:
            element, count = wrong
            yield f"has {count or 'no'} boxes with element {element} of {name}, whose shape is {shape}"


def _cut_dims(shape: Sequence[int], boxes: np.ndarray) -> np.ndarray:
    """The dims of which some box does not have everything."""
    return np.flatnonzero((boxes != np.stack([np.zeros_like(shape), shape], 1)).any(axis=(0, 2)))


def miscounted(shape: Sequence[int], boxes: np.ndarray) -> tuple[list[int], int] | None:
    """The first element in C order that does not lie in exactly one of the boxes, and in how many; None if all do.

    Shapes: (boxes, dims, 2), [start, stop) in the array, none empty. A box is the sum of its corners with alternating
    signs (its indicator, differenced along every dim), so boxes tile an array if and only if all corners but the
    array's own cancel: work grows with the number of boxes, not with that of their pairs. Before the first corner left
    over nothing is wrong, so the sum there is how far the count is off. A dim that no box cuts needs no corners.
    """
    dims = _cut_dims(shape, boxes)
    edges = np.concatenate([boxes, [Box.whole(shape).to_list()]])[:, dims]
    signs = np.append(np.ones(len(boxes), np.int64), -1)
    ends = list(itertools.product((0, 1), repeat=len(dims)))
    corners = np.concatenate([edges[:, range(len(dims)), end] for end in ends])
    counts = np.concatenate([-signs if sum(end) % 2 else signs for end in ends])
    order = np.lexsort(corners.T[::-1]) if len(dims) else slice(None)
    corners, counts = corners[order], counts[order]
    places = np.flatnonzero(np.append(True, (corners[1:] != corners[:-1]).any(axis=1)))
    totals = np.add.reduceat(counts, places)
    if not totals.any():
        return None
    odd = np.flatnonzero(totals)[0]
    element = np.zeros(len(shape), np.int64)
    element[dims] = corners[places[odd]]
    return element.tolist(), 1 + int(totals[odd])


def _most_bytes(part: Part, manifest: Manifest) -> int:
    """What a part can need: chunks of up to twice its rows, and headers."""
    item = np.dtype(manifest.dtype).itemsize
    sizes = [math.prod(stop - start for start, stop in box) for boxes in part.boxes.values() for box in boxes]
    return len(manifest.buffers) * (2 * sum(sizes) * item + len(sizes) * 4096) + (1 << 16)
