"""A model with adapters -> the same model without, in a run folder of its own."""

from dataclasses import replace
from pathlib import Path

from mlm_mpi import config as configuration
from mlm_mpi.comm.group import Group
from mlm_mpi.errors import CheckpointError, ConfigError
from mlm_mpi.files import publish
from mlm_mpi.layers.adapters import merge
from mlm_mpi.params.sources import Arrays
from mlm_mpi.params.store import FlatStore
from mlm_mpi.plug import Plugins
from mlm_mpi.train import Start, checkpoint
from mlm_mpi.train.folder import RunFolder
from mlm_mpi.train.manifest import PREFIX, WEIGHTS, Manifest
from mlm_mpi.train.trained import Trained, load


def merged(run: str | Path, out: Path, plugins: Plugins) -> tuple[Path, str]:
    """(the checkpoint that was made in the run folder `out`, SHA-256 of its weights).

    It holds what `evaluate` measures: of a run that keeps an average of its weights that average, as both. Raises
    ConfigError, CheckpointError.
    """
    trained = load(run, plugins, "cpu")
    if not trained.config.start.lora_rank:
        raise ConfigError(f"{trained.checkpoint} has no adapters (start.lora_rank = 0): there is nothing to merge")
    folder = RunFolder(out, "--out")
    if checkpoint.published(folder.checkpoints):
        raise ConfigError(f"{out} holds a run already: give another --out")
    folder.acquire()
    store = _without_adapters(trained)
    manifest, config = trained.manifest, replace(trained.config, start=Start())
    table = manifest.config | {"start": configuration.to_table(config)["start"]}
    weights = {WEIGHTS, "average"}
    buffers = {kind: store.data if kind in weights else store.new_buffer() for kind in manifest.buffers}
    saver = checkpoint.Saver(
        folder.checkpoints, store, buffers, trained.tokenizer.content, Group(), 1, background=False
    )
    saver.begin(manifest.step)
    problem = saver.publish(_about(manifest, table))
    if problem is not None:
        raise CheckpointError(f"the merged model was not saved: {problem}")
    sealed = configuration.from_table(table, str(trained.checkpoint), plugins)
    publish(out / "config.toml", configuration.to_toml(sealed).encode())
    return folder.checkpoints / f"{PREFIX}{manifest.step:08}", store.weights_sha256()


def _without_adapters(trained: Trained) -> FlatStore:
    """A store of the merged weights, nothing of it frozen."""
    parts = trained.chain.parts
    merge(parts)
    blocks = [part.parameters() for part in parts]
    arrays = Arrays({p.name: p.data.copy() for block in blocks for p in block})
    store = FlatStore(blocks, trained.mesh, trained.config.train.dtype, trained.place)
    store.fill(arrays)
    return store


def _about(manifest: Manifest, table: dict[str, dict[str, object]]) -> dict[str, object]:
    """The manifest's fields that are those of the run with adapters, and its configuration without."""
    return {
        "config": table, "vocabulary": manifest.vocabulary, "catalog": manifest.catalog, "corpus": manifest.corpus,
        "fingerprint": manifest.fingerprint, "incomparable": manifest.incomparable, "plugins": manifest.plugins,
        "labels": manifest.labels, "pairs": manifest.pairs, "hints": manifest.hints,
    }  # fmt: skip
