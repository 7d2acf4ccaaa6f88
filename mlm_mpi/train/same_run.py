"""Whether a checkpoint and this start are one run, and whether their bits may be compared."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlm_mpi import config as configuration
from mlm_mpi.comm.group import Group
from mlm_mpi.config import Config
from mlm_mpi.errors import CheckpointError
from mlm_mpi.plug import Plugins
from mlm_mpi.train import Start, checkpoint
from mlm_mpi.train.checkpoint import Manifest, Say
from mlm_mpi.train.fingerprint import differences
from mlm_mpi.train.task import Task

# keys that may differ on resume without another run being meant
_FREE = (
    "backend.", "checkpoint.", "comm.", "data.dir", "data.mixture", "data.prefetch", "eval.", "guard.", "log.",
    "mesh.", "numerics.", "start.checkpoint", "start.partial", "start.vectors:", "train.recompute",
    "train.schedule",
)  # fmt: skip


def check_wish(wish: str, run: Path, checkpoints: Path) -> None:
    """Refuses a run folder that --resume does not allow, before it is made. Raises CheckpointError."""
    saved = checkpoint.published(checkpoints)
    if wish == "never" and saved:
        raise CheckpointError(
            f"{run} holds {saved[0].name} and --resume is never: give another --run, or --resume auto"
        )
    if wish == "must" and not saved:
        raise CheckpointError(f"{checkpoints} holds no checkpoint and --resume is must: use --resume auto")


def check_same_run(path: Path, manifest: Manifest, config: Config, task: Task, plugins: Plugins, say: Say) -> None:
    """Refuses what would make another run of it, says what may change bits. Raises CheckpointError."""
    task.refuse_other(path, manifest)
    checkpoint.read_tokenizer(path, manifest)
    changed = [d for d in config_differences(manifest.config, config) if not d.startswith(_FREE)]
    steps = [d for d in changed if d.startswith("train.steps")]
    others = [d for d in changed if d not in steps]
    if others:
        raise CheckpointError(
            f"{path} was saved with other settings ({others[0]}): restore them, or give another --run"
        )
    check_plugins(path, manifest.plugins, plugins.used)
    if manifest.step > config.train.steps:
        raise CheckpointError(
            f"{path} stands at step {manifest.step}, train.steps = {config.train.steps}: raise train.steps"
        )
    if steps:
        say(f"note: {steps[0]}: the learning-rate schedule changes from step {manifest.step} on")


def check_plugins(path: Path, saved: dict[str, str], used: dict[str, str], rooms: Sequence[str] = ()) -> None:
    """The files of --plugins must be those that a checkpoint was made with. `rooms`: only these.

    Raises CheckpointError.
    """
    for name in sorted({*saved, *used}):
        if saved.get(name) != used.get(name) and (not rooms or name.partition("/")[0] in rooms):
            was = f"with {name} of SHA-256 {saved[name][:12]}" if name in saved else f"without {name}"
            now = f"it has {used[name][:12]} now" if name in used else "it is not used now"
            raise CheckpointError(
                f"{path} was made {was} (--plugins), {now}: give the folder that it was trained with, or another --run"
            )


def compare_fingerprints(group: Group, facts: dict[str, Any]) -> str | None:
    """Why bits cannot be compared with other runs of this configuration; None if they can. Collective."""
    everybody = group.allgather(facts, "numerics fingerprints")
    for rank, other in enumerate(everybody):
        if other != everybody[0]:
            return f"rank {rank} differs from rank 0 in {differences(everybody[0], other)[0]}"
    return None


def config_differences(saved: dict[str, Any], config: Config) -> list[str]:
    """`section.key: saved → now` for each key that differs from a saved configuration.

    A version that did not know a key of [start] began without what it asks for.
    """
    plain = configuration.to_table(replace(config, start=Start()))["start"]
    saved = saved | {"start": plain | saved.get("start", {})}
    return [
        f"{section}.{key}: {saved.get(section, {}).get(key)} → {value}"
        for section, values in configuration.to_table(config).items()
        for key, value in values.items()
        if saved.get(section, {}).get(key) != value
    ]
