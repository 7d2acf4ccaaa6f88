"""What a run begins with: weights of a checkpoint where it has them, a draw for the rest; and what of them is trained.

The weights that begin are those that `evaluate` measures: the moving average, where the checkpoint has one. An average
that this run keeps does not take them in, as it never does initial weights (params/average.py). Moments begin at zero.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlm_mpi import config as configuration
from mlm_mpi.errors import CheckpointError, ConfigError, nearest
from mlm_mpi.layers.adapters import is_adapters
from mlm_mpi.layers.base import Part
from mlm_mpi.params.store import FlatStore, Parameter
from mlm_mpi.plug import Plugins
from mlm_mpi.train import Start, checkpoint
from mlm_mpi.train.checkpoint import Manifest
from mlm_mpi.train.folder import checkpoints_of, is_checkpoint
from mlm_mpi.train.manifest import WEIGHTS, name_of
from mlm_mpi.train.part import Reader
from mlm_mpi.train.trained import parts_of

_OTHER = "give another start.checkpoint"


@dataclass(frozen=True)
class Origin:
    """A checkpoint that a run begins with."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """What its weights are known by, SHA-256."""
        return name_of(self.manifest)

    def in_words(self, store: FlatStore) -> str:
        """For people: where weights come from, and which are drawn."""
        drawn = [p.name for p in store.model if self.manifest.shapes.get(p.name) != list(p.layout.shape)]
        more = f", and {len(drawn) - 3} more" if len(drawn) > 3 else ""
        rest = f"; drawn: {', '.join(drawn[:3])}{more}" if drawn else ""
        kind = "average of weights" if "average" in self.manifest.buffers else "weights"
        return f"{kind} {self.name[:12]} of {self.path}{rest}"

    def fill(self, store: FlatStore, seed: int) -> None:
        """Initial weights of this rank. Raises DamagedCheckpoint."""
        kind = "average" if "average" in self.manifest.buffers else WEIGHTS
        with Reader(self.path, self.manifest) as reader:
            store.initialise(seed, reader.buffer(kind))


def origin_at(path: str) -> Origin:
    """A checkpoint, or the newest of a run folder whose manifest can be read. Raises ConfigError, CheckpointError."""
    folder = Path(path)
    if is_checkpoint(folder):
        return Origin(folder, checkpoint.read_manifest(folder))
    problem = f"{folder} holds no checkpoint: {_OTHER}"
    try:
        named = checkpoint.published(checkpoints_of(folder))
    except ConfigError as error:
        raise ConfigError(f'start.checkpoint = "{path}": {error}') from None
    for found in named:
        try:
            return Origin(found, checkpoint.read_manifest(found))
        except checkpoint.DamagedCheckpoint as error:
            problem = f"{error}: {_OTHER}"
    raise CheckpointError(problem)


def check_origin(origin: Origin, start: Start, parts: Sequence[Part], tokenizer: bytes, plugins: Plugins) -> None:
    """Raises CheckpointError where a model cannot begin with a checkpoint: another tokenizer or architecture."""
    path, shapes = origin.path, origin.manifest.shapes
    if hashlib.sha256(tokenizer).hexdigest() != origin.manifest.tokenizer:
        raise CheckpointError(
            f"{path} was trained with another tokenizer than the corpus has: prepare the corpus with --tokenizer "
            f"{path / checkpoint.TOKENIZER_FILE}"
        )
    model = [parameter for part in parts for parameter in part.parameters()]
    missing = [p.name for p in model if shapes.get(p.name) != list(p.layout.shape)]
    wanted = {p.name for p in model}
    left = [name for name in shapes if name not in wanted]
    if start.partial and len(missing) == len(model):
        raise CheckpointError(f"{path} holds nothing of this model: {_OTHER}")
    if start.partial or not (missing or left):
        return
    drawn = {p.name for p in parts[-1].parameters()} | {name for name in wanted if is_adapters(name)}
    spared = _head_of(origin, plugins) if left else frozenset()
    if {*missing} <= drawn and {*left} <= spared:
        return
    found = (
        [f"{len(missing)} of {len(model)} weights are missing there{_first(missing, origin, model)}"] if missing else []
    )
    found += [f"{len(left)} are left over ({left[0]})"] if left else []
    remedy = f"{_OTHER}, the same [model], or start.partial = true"
    if any(is_adapters(name) for name in left):
        remedy = "it has adapters: make a model without them by mlm-mpi merge"
    raise CheckpointError(f"{path} is of another architecture: {', '.join(found)}: {remedy}")


def _first(missing: Sequence[str], origin: Origin, model: Sequence[Parameter]) -> str:
    name = missing[0]
    here, there = next(list(p.layout.shape) for p in model if p.name == name), origin.manifest.shapes.get(name)
    return f" ({name}{f' has shape {there} there, {here} here' if there else ''})"


def _head_of(origin: Origin, plugins: Plugins) -> frozenset[str]:
    """The parameters of a checkpoint's own head, which another head may leave over."""
    path, manifest = origin.path, origin.manifest
    config = configuration.from_table(manifest.config, f"{path}/manifest.json", plugins)
    return frozenset(p.name for p in parts_of(path, manifest, config, plugins)[-1].parameters())


def freeze(parts: Sequence[Part], start: Start, known: Collection[str] | None) -> None:
    """Marks the parameters that training leaves as they are: those that `start.freeze` names, and beside adapters all
    that a checkpoint has.

    `known`: the parameters of that checkpoint; None: there is none. Raises ConfigError for a name that none has, or
    where nothing is left to learn.
    """
    model = [parameter for part in parts for parameter in part.parameters()]
    for pattern in start.freeze:
        if not any(_matches(p.name, pattern) for p in model):
            holders = {p.name.rsplit(".", dots)[0] for p in model for dots in range(p.name.count(".") + 1)}
            raise ConfigError(f'start.freeze = "{pattern}" is no parameter{nearest(pattern, holders, every=False)}')
    for parameter in model:
        beside = start.lora_rank > 0 and not is_adapters(parameter.name)
        named = any(_matches(parameter.name, pattern) for pattern in start.freeze)
        parameter.frozen = named or (beside and (known is None or parameter.name in known))
    _check_learning(model, start)


def _matches(name: str, pattern: str) -> bool:
    if pattern.endswith("*"):
        return name.startswith(pattern[:-1])
    return name == pattern or name.startswith(f"{pattern}.")


def _check_learning(model: Sequence[Parameter], start: Start) -> None:
    if all(parameter.frozen for parameter in model):
        raise ConfigError(f"start.freeze = {list(start.freeze)} leaves nothing to learn: take a part out of it")


def freeze_again(parts: Sequence[Part], frozen: Collection[str]) -> None:
    """Marks what a run that goes on has left as it was."""
    for parameter in (parameter for part in parts for parameter in part.parameters()):
        parameter.frozen = parameter.name in frozen


def check_same_origin(path: Path, manifest: Manifest, start: Start) -> None:
    """Refuses a start that a run did not begin with. The checkpoint may be gone, or may lie elsewhere now.

    Raises CheckpointError.
    """
    began = manifest.config.get("start", {}).get("checkpoint", "")
    if start.checkpoint == began:
        return
    if began and start.checkpoint and origin_at(start.checkpoint).name == manifest.start:
        return
    what = f'with "{began}" (weights {manifest.start[:12]})' if began else "with a draw"
    raise CheckpointError(
        f'{path} began {what}, start.checkpoint = "{start.checkpoint}" is another: restore it, or give another --run'
    )
