"""A trained model, or this rank's part of it, read from its run folder: settings, tokenizer, weights."""

import hashlib
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from mlm_mpi import __version__
from mlm_mpi import config as configuration
from mlm_mpi.backend import Device
from mlm_mpi.backend.arrays import Place
from mlm_mpi.backend.choice import place_of
from mlm_mpi.comm import Axes
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.config import Config
from mlm_mpi.config.rules import check_sharing, shares
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.errors import CheckpointError, ConfigError, DataError
from mlm_mpi.layers.adapters import adapt
from mlm_mpi.layers.base import Part, Sizes
from mlm_mpi.layers.chain import Chain
from mlm_mpi.params.store import FlatStore
from mlm_mpi.plug import Plugins
from mlm_mpi.train import checkpoint
from mlm_mpi.train.build import check_cuts, stage_of
from mlm_mpi.train.checkpoint import Manifest, Say
from mlm_mpi.train.corpus import origin
from mlm_mpi.train.folder import checkpoints_of, is_checkpoint
from mlm_mpi.train.same_run import check_plugins, config_differences
from mlm_mpi.train.task import Task


@dataclass(frozen=True)
class Trained:
    """A model with the weights of a sound checkpoint; all of it from that checkpoint's folder.

    `chain` and its weights are those of this rank of `mesh`, all of them where no axis cuts the model.
    """

    checkpoint: Path
    manifest: Manifest
    config: Config
    tokenizer: Tokenizer
    chain: Chain
    place: Place
    plugins: Plugins
    mesh: Mesh

    @property
    def averaged(self) -> bool:
        """Whether the weights are the moving average of those that were trained."""
        return bool(self.config.optim.average)

    @property
    def step(self) -> int:
        return self.manifest.step


def load(
    run: str | Path, plugins: Plugins, device: Device | None = None, say: Say | None = None,
    on_node: tuple[int, int] = (0, 1), mesh: Mesh | None = None,
) -> Trained:  # fmt: skip
    """The newest sound checkpoint of a run folder, or the one that `run` itself is. Settings are the sealed ones.

    `device`: "cpu" or "gpu", by default where it was trained. `say` takes notes, by default rank 0's on stderr: a
    damaged checkpoint, the one before which is tried, and a config.toml that differs. `on_node`: as in `place_of`.
    `mesh`: of the ranks that share the model, each of which reads its part of it; by default there is one. Collective
    over its world. Raises ConfigError, CheckpointError.
    """
    mesh = mesh or Mesh()
    group, say = mesh.world, say or (note if mesh.world.rank == 0 else _unheard)
    one = group.broadcast(is_checkpoint(Path(run)), "a look at RUN")
    with group.together("the run folder"):
        folder = Path(named(run, "RUN"))
        folder = folder if one else checkpoints_of(folder)
    if one:
        with group.together("loading the model"):
            return _restored(folder, checkpoint.read_manifest(folder), plugins, device, on_node, mesh)
    trained = checkpoint.newest_sound(
        folder, lambda path, manifest: _restored(path, manifest, plugins, device, on_node, mesh), say, group
    )
    with group.together("a look at config.toml"):
        _compare_settings(folder.parent / "config.toml", trained, plugins, say)
    return trained


def named(path: str | Path, what: str) -> str:
    """The same path. Raises ConfigError for an empty one, which would be the working directory."""
    if not str(path):
        raise ConfigError(f"{what} is empty: give a folder")
    return str(path)


def note(text: str) -> None:
    """A line that is no result."""
    print(text, file=sys.stderr)


def _unheard(text: str) -> None:
    """Rank 0 speaks for all."""


def _restored(
    path: Path, manifest: Manifest, plugins: Plugins, device: Device | None, on_node: tuple[int, int], mesh: Mesh
) -> Trained:
    config = _runnable(_settings(path, manifest, plugins), device)
    place = place_of(config, on_node=on_node)
    tokenizer = Tokenizer(checkpoint.read_tokenizer(path, manifest), f"{path}/{checkpoint.TOKENIZER_FILE}")
    if tokenizer.vocab_size != manifest.vocabulary:
        raise CheckpointError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model {manifest.vocabulary}: "
            "not saved by mlm-mpi; give another"
        )
    parts = parts_of(path, manifest, config, plugins)
    mesh = mesh.with_timeout(config.comm.timeout_s)
    if not mesh.is_plain:
        _check_shared(config, plugins, parts, mesh)
    chain, borrowed = stage_of(parts, mesh, getattr(config.model, "width", 0), place)
    model = [parameter for part in parts for parameter in part.parameters()]
    check_plugins(path, manifest.plugins, plugins.used, ("models", "tasks", "objectives"))
    try:
        store = FlatStore(chain.parameter_blocks(), mesh, config.train.dtype, place, model, borrowed)
    except MemoryError:
        raise CheckpointError(f"{path}: its weights do not fit into the memory that is free here") from None
    checkpoint.restore(path, manifest, store, {"average" if config.optim.average else "weights": store.data})
    return Trained(path, manifest, config, tokenizer, chain, place, plugins, mesh)


def _settings(path: Path, manifest: Manifest, plugins: Plugins) -> Config:
    """The sealed settings; another version may not know them."""
    try:
        return configuration.from_table(manifest.config, f"{path}/manifest.json", plugins)
    except ConfigError as error:
        wrote = manifest.fingerprint.get("mlm_mpi", __version__)
        other = f"; mlm-mpi {wrote} saved it, this is {__version__}: use that one" if wrote != __version__ else ""
        raise ConfigError(f"{error}{other}") from None


def _check_shared(config: Config, plugins: Plugins, parts: list[Part], mesh: Mesh) -> None:
    """Raises ConfigError where ranks cannot share this model so: what training says of [mesh], of the options here."""
    axes = Axes(pp=mesh.size("pp"), tp=mesh.size("tp"))
    try:
        check_sharing(replace(config, mesh=axes, comm=replace(config.comm, reduction="canonical")), plugins)
        check_cuts(parts, mesh, trained=True)
    except ConfigError as error:
        raise ConfigError(re.sub(r"mesh\.([pt]p)( =)?", r"--\1", str(error))) from None


def parts_of(path: Path, manifest: Manifest, config: Config, plugins: Plugins) -> list[Part]:
    """The model of a checkpoint's settings, if its parameters are those that the checkpoint lists."""
    task = plugins.find("tasks", config.task.kind, "task.kind")
    sizes = Sizes(manifest.vocabulary, shares(config), len(manifest.labels))
    if task.least(config, plugins, sizes, 1).parts <= len(manifest.shapes):  # more might have no end
        parts: list[Part] = task.parts(config, plugins, sizes)
        if config.start.lora_rank:
            adapt(parts, config.start.lora_rank, config.start.lora_alpha, config.start.lora_targets)
        shapes = {p.name: list(p.layout.shape) for part in parts for p in part.parameters()}
        if shapes == manifest.shapes:
            return parts
    raise CheckpointError(f"{path}: its parameters are not those of its settings: not saved by mlm-mpi; give another")


def _runnable(config: Config, device: Device | None) -> Config:
    if device is not None:
        config = replace(config, backend=replace(config.backend, device=device))
    if config.backend.device == "cpu":  # any CPU may read what a GPU or a CPU with bf16 has trained
        config = replace(config, numerics=replace(config.numerics, products="float32"))
    return config


def _compare_settings(path: Path, trained: Trained, plugins: Plugins, say: Say) -> None:
    sealed = configuration.from_table(trained.manifest.config, str(trained.checkpoint), plugins)
    try:
        changes = config_differences(configuration.to_table(configuration.load(path, (), plugins)), sealed)
    except ConfigError as error:
        changes = [str(error)]
    if changes:
        say(f"note: the settings are those of {trained.checkpoint.name}, not of {path}: {', '.join(changes)}")


def open_task(trained: Trained, folder: str | None = None, say: Say = note) -> Task:
    """The task that a model was trained for, over its own data or those in `folder`; other data are noted.

    Raises DataError, naming the model's data and how to get them back, if they are gone or have another tokenizer.
    """
    manifest, data = trained.manifest, trained.config.data
    wanted = f"the model was trained on {origin(manifest)}"
    if folder is not None:
        data = replace(data, dir=folder, mixture=(), weights=())
    config = replace(trained.config, data=data)
    try:
        task: Task = trained.plugins.find("tasks", config.task.kind, "task.kind").build(config, trained.plugins)
    except DataError as error:
        if folder is not None:
            raise DataError(str(error).replace("data.dir", "--data")) from None
        raise DataError(f"{error}; {wanted}: make it again there, or give its folder by --data DIR") from None
    names, about = " and ".join(data.mixture) or data.dir, task.about()
    if hashlib.sha256(task.tokenizer).hexdigest() != manifest.tokenizer:
        raise DataError(
            f"{names} has another tokenizer than the model; {wanted}: give its folder by --data DIR, or for "
            f"another text prepare it with --tokenizer {trained.checkpoint / checkpoint.TOKENIZER_FILE}"
        )
    if about.get("labels", []) != manifest.labels:
        raise DataError(f"{names} has other labels than the model; {wanted}: give its folder by --data DIR")
    if ("hints" in about) != bool(manifest.hints):
        has = "has no hints in front of its sources, and the model wants them: prepare it with --hints"
        hasnt = "has hints in front of its sources, and the model knows none: prepare it without --hints"
        raise DataError(f"{names} {has if manifest.hints else hasnt}, or give another corpus by --data")
    if about["catalog"] != manifest.catalog:
        say(f"note: the figures are of another text, corpus {about['catalog'][:12]} in {names}; {wanted}")
    return task
