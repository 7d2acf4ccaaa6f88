"""What the weights that a run begins with say of its samples, for a task that compares with it (`task.Refers`).

It is measured once, before the first step, by the evaluation that gives every number of ranks and any mesh the same
bits, and kept as RUN/reference.json: a start that goes on, and `evaluate`, read it, whatever has become of the
checkpoint that the run began with. The file names that checkpoint and the corpus, and seals its own numbers.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

from mlm_mpi.backend.arrays import Place
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.errors import CheckpointError
from mlm_mpi.files import publish, read_whole
from mlm_mpi.layers.chain import Chain
from mlm_mpi.train.manifest import Manifest
from mlm_mpi.train.measure import measure
from mlm_mpi.train.task import Refers

_MOST_BYTES = 1 << 32
_REMEDY = "put it back as it was, or begin again with another --run"

Found = Mapping[str, np.ndarray]  # split -> (n, 2) float64


class _File(msgspec.Struct, frozen=True):
    """`start`: the manifest's. `catalog`: of the corpus. `sha256`: of all numbers in the order of splits."""

    start: str
    catalog: str
    sha256: str
    splits: dict[str, list[tuple[float, float]]]


def measured(task: Refers, chain: Chain, rows: int, mesh: Mesh, place: Place) -> dict[str, np.ndarray]:
    """The reference of all splits under the weights at hand. Collective.

    Raises CheckpointError, on every rank alike, where they give numbers that are none.
    """
    found = {}
    for split in task.splits:
        sums = measure(chain, task.samples(split), rows, 0, mesh, place)
        found[split] = np.zeros((0, 2)) if sums is None or sums.outcomes is None else sums.outcomes[:, :2]
    with mesh.world.together("the reference"):
        if not all(np.isfinite(numbers).all() for numbers in found.values()):
            raise CheckpointError(
                "the weights that the run begins with give answers no finite probability: give another start.checkpoint"
            )
    return found


def write(path: Path, start: str, catalog: str, found: Found) -> None:
    """Raises StorageError."""
    splits = {split: [tuple(pair) for pair in numbers.tolist()] for split, numbers in found.items()}
    publish(path, msgspec.json.encode(_File(start, catalog, _digest(found), splits)) + b"\n")


def read(path: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """What a run with this manifest has written. Raises CheckpointError."""
    try:
        file = msgspec.json.decode(read_whole(path, _MOST_BYTES), type=_File)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}), which holds what the model is compared with: {_REMEDY}"
        ) from None
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): {_REMEDY}") from None
    found = {split: np.array(pairs, "f8").reshape(-1, 2) for split, pairs in file.splits.items()}
    if _digest(found) != file.sha256:
        raise CheckpointError(f"{path} is damaged (its numbers are not those that were written): {_REMEDY}")
    if (file.start, file.catalog) != (manifest.start, manifest.catalog):
        what = "corpus" if file.start == manifest.start else "start"
        raise CheckpointError(f"{path} is of another {what} than the run's: {_REMEDY}")
    return found


def _digest(found: Found) -> str:
    whole = hashlib.sha256()
    for split, numbers in found.items():
        whole.update(f"{split} {len(numbers)}\n".encode() + numbers.astype("<f8").tobytes())
    return whole.hexdigest()
