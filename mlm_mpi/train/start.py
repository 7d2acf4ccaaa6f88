"""What a run begins with: word vectors, weights of a checkpoint, a draw for the rest; and what of them is trained.

The weights that begin are those that `evaluate` measures: the moving average, where the checkpoint has one. An average
that this run keeps does not take them in, as it never does initial weights (params/average.py). Moments begin at zero.
"""

import contextlib
import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlm_mpi import config as configuration
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.errors import CheckpointError, ConfigError, DataError, nearest
from mlm_mpi.files import open_regular, sha256_of_open
from mlm_mpi.formats import vectors
from mlm_mpi.layers.adapters import is_adapters
from mlm_mpi.layers.base import Part
from mlm_mpi.params.sources import Over, Source, Without
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
    without: frozenset[str] = frozenset()  # parameters that are not taken from it
    table: str = ""  # of which as many rows are taken as both models have: of tokens, which may have sentinels behind

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of what is taken from it, by name."""
        return {name: shape for name, shape in self.manifest.shapes.items() if name not in self.without}

    def for_labels(self, labels: Sequence[str], parts: Sequence[Part]) -> "Origin":
        """The same for a task with labels: another's are told by another head, whatever their number."""
        if [*labels] == self.manifest.labels:
            return self
        return replace(self, without=frozenset(p.name for p in parts[-1].parameters()))

    def for_tokens(self, parts: Sequence[Part]) -> "Origin":
        """The same for a model that may have another number of sentinels behind the tokens that both have."""
        table: Parameter | None = getattr(parts[0], "tokens", None)
        if table is None or not self._differ(table):
            return self
        return replace(self, table=table.name)

    def _differ(self, table: Parameter) -> bool:
        """Whether only one of the two has rows behind some, and both have one for each token."""
        there, here = self.manifest.shapes.get(table.name, []), table.layout.shape
        if there[1:] != [*here[1:]] or not there:
            return False
        return there[0] != here[0] and min(there[0], here[0]) >= self.manifest.vocabulary

    @property
    def name(self) -> str:
        """What it is known by, the SHA-256 of its seal."""
        return name_of(self.manifest)

    def in_words(self, store: FlatStore) -> str:
        """For people: where weights come from, and which are drawn."""
        drawn = [p.name for p in store.model if p.name != self.table and self.shapes.get(p.name) != [*p.layout.shape]]
        more = f", and {len(drawn) - 3} more" if len(drawn) > 3 else ""
        rest = f"; drawn: {', '.join(drawn[:3])}{more}" if drawn else ""
        kind = "average of weights" if "average" in self.manifest.buffers else "weights"
        return f"{kind} of {self.path}, seal {self.name[:12]}{rest}{self._rows_in_words(store)}"

    def _rows_in_words(self, store: FlatStore) -> str:
        """Of the table of which some rows are taken."""
        if not self.table:
            return ""
        there, here = self.shapes[self.table][0], next(p.layout.shape[0] for p in store.model if p.name == self.table)
        if there > here:
            return f"; of {self.table} the first {here:,} rows, left out: {there - here:,} of sentinels"
        return f"; of {self.table} {there:,} rows, drawn: {here - there:,} of sentinels"

    @contextlib.contextmanager
    def weights(self) -> Iterator[Source]:
        """Its arrays, for `with`. Raises DamagedCheckpoint."""
        kind = "average" if "average" in self.manifest.buffers else WEIGHTS
        with Reader(self.path, self.manifest) as reader:
            yield Without(reader.buffer(kind), self.without)


@dataclass(frozen=True)
class Words:
    """Word vectors that rows of a table of tokens begin as, `known` multiplied by `factor` already."""

    path: Path
    sha256: str  # of the file
    known: vectors.Known
    factor: float
    table: str

    def in_words(self) -> str:
        """For people."""
        return f"{self.known} of {self.path}, times {self.factor:.4g}"

    def over(self, source: Source) -> Source:
        """What begins instead of a source. Raises DataError for vectors of another width."""
        return vectors.initial(self.path, self.known, source, self.table)


def fill(store: FlatStore, seed: int, origin: Origin | None, words: Words | None) -> None:
    """Initial weights of this rank: words over a checkpoint over a draw. Raises DamagedCheckpoint, DataError."""
    with contextlib.ExitStack() as stack:
        weights = None if origin is None else stack.enter_context(origin.weights())

        def over(drawn: Source) -> Source:
            found = drawn if weights is None or origin is None else Over(weights, drawn, origin.table)
            return found if words is None else words.over(found)

        store.initialise(seed, over)


def sha256_of_vectors(path: str) -> str:
    """Of a file. Raises DataError."""
    try:
        descriptor = open_regular(Path(path))
        try:
            return sha256_of_open(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f'start.vectors = "{path}" cannot be read: {error.strerror}') from None


def words_of(start: Start, parts: Sequence[Part], tokenizer: bytes, sha256: str) -> Words:
    """The vectors of a model's tokens. `sha256`: of rank 0's file.

    Raises DataError for another file here, one that cannot be used, or a model without a table of tokens.
    """
    path, tokens = Path(start.vectors), Tokenizer(tokenizer)
    if sha256_of_vectors(start.vectors) != sha256:
        raise DataError(f"{path} is another file here than on rank 0: give all ranks the same")
    table = _table_of(parts[0], tokens.vocab_size)
    if table is None:
        raise DataError(f'the model has no table of tokens for start.vectors = "{path}": set start.vectors = ""')
    found = vectors.known(path, tokens)
    vectors.check_width(path, found, table.name, table.layout.shape)
    factor = start.vectors_scale or _factor(path, found, table)
    scaled = found.times(factor)
    if not np.isfinite(scaled.rows).all():
        raise DataError(
            f"{path} has numbers too large for float32 when multiplied by {factor:g}: lower start.vectors_scale"
        )
    return Words(path, sha256, scaled, factor, table.name)


def _table_of(part: Part, vocabulary: int) -> Parameter | None:
    """The table of the tokens, behind whose rows a model may have some of sentinels."""
    found = next((p for p in part.parameters() if p.layout.shape[:-1] == (vocabulary,)), None)
    longer: Parameter | None = getattr(part, "tokens", None)
    return longer if found is None and longer is not None and longer.layout.shape[0] > vocabulary else found


def _factor(path: Path, found: vectors.Known, table: Parameter) -> float:
    """What gives vectors the standard deviation of the draw of their table, around 0 as that is."""
    size = found.root_mean_square()
    if not isinstance(table.init, float) or not table.init:
        raise DataError(f"{table.name} is drawn as {table.init}, which gives no scale: set start.vectors_scale")
    if not size:
        raise DataError(f"{path} has zeros only for the tokens that it knows: give another file")
    return table.init / size


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
    path, shapes = origin.path, origin.shapes
    if hashlib.sha256(tokenizer).hexdigest() != origin.manifest.tokenizer:
        raise CheckpointError(
            f"{path} was trained with another tokenizer than the corpus has: prepare the corpus with --tokenizer "
            f"{path / checkpoint.TOKENIZER_FILE}"
        )
    model = [parameter for part in parts for parameter in part.parameters()]
    missing = [p.name for p in model if p.name != origin.table and shapes.get(p.name) != list(p.layout.shape)]
    wanted = {p.name for p in model}
    left = [name for name in origin.manifest.shapes if name not in wanted]
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
    """Refuses a start that a run did not begin with. What it was may be gone, or may lie elsewhere now.

    Raises CheckpointError.
    """
    _check_same_checkpoint(path, manifest, start)
    _check_same_vectors(path, manifest, start)


def _check_same_vectors(path: Path, manifest: Manifest, start: Start) -> None:
    began = manifest.config.get("start", {}).get("vectors", "")
    if start.vectors == began and not Path(began).is_file():
        return
    if began and start.vectors and sha256_of_vectors(start.vectors) == manifest.vectors:
        return
    what = f'with the vectors of "{began}" (SHA-256 {str(manifest.vectors)[:12]})' if began else "without vectors"
    other = "has changed since" if start.vectors == began else "is another"
    raise CheckpointError(
        f'{path} began {what}, start.vectors = "{start.vectors}" {other}: restore it, or give another --run'
    )


def _check_same_checkpoint(path: Path, manifest: Manifest, start: Start) -> None:
    began = manifest.config.get("start", {}).get("checkpoint", "")
    if start.checkpoint == began:
        return
    if began and start.checkpoint and origin_at(start.checkpoint).name == manifest.start:
        return
    what = f'with "{began}" (seal {manifest.start[:12]})' if began else "with a draw"
    raise CheckpointError(
        f'{path} began {what}, start.checkpoint = "{start.checkpoint}" is another: restore it, or give another --run'
    )
