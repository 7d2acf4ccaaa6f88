"""`mlm-mpi finetune RUN CONFIG`: a training that begins with the weights of another, and with its model."""

import argparse
from pathlib import Path
from typing import Any

from mlm_mpi.commands import train
from mlm_mpi.config import Config
from mlm_mpi.config.reader import Pin
from mlm_mpi.errors import ConfigError
from mlm_mpi.plug import Plugins

_EXAMPLES = """examples:
  mlm-mpi finetune runs/one tuned.toml --run runs/tuned
  mlm-mpi finetune runs/one tuned.toml --run runs/tuned --best              # not the newest weights, the best ones
  mlm-mpi run -n 4 -- finetune runs/one tuned.toml --run runs/lora --set start.lora_rank=8
  mlm-mpi merge runs/lora --out runs/merged                                 # a model without adapters

It is `train CONFIG --set start.checkpoint=RUN`, where [model] has the checkpoint's keys but for those that CONFIG or
--set gives. CONFIG names the corpus, which is prepared with the tokenizer of RUN (docs/finetuning.md)."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi finetune`."""
    parser.add_argument(
        "origin", metavar="RUN", help="run folder whose newest weights begin, or one of its checkpoints"
    )
    train.configure(parser)
    parser.add_argument(
        "--best", action="store_true", help="begin with the best checkpoint of RUN, which best.json names"
    )
    parser.epilog = _EXAMPLES


def main(args: argparse.Namespace) -> int:
    """Runs the command on this rank."""
    return train.begin(args, settings)


def settings(args: argparse.Namespace, plugins: Plugins, pin: Pin | None = None) -> Config:
    """As `train.settings`, over what the checkpoint says. Raises ConfigError, CheckpointError."""
    if not args.origin:
        raise ConfigError("RUN is empty: give a run folder, or one of its checkpoints")
    return train.settings(args, plugins, pin, lambda: _beneath(args))


def _beneath(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """[model] and [start] of a run that begins with RUN; of one that goes on its own, since RUN may be gone."""
    from mlm_mpi.train import checkpoint  # here, not above: NumPy may load now
    from mlm_mpi.train.search import best_of
    from mlm_mpi.train.start import origin_at

    path = str(Path(args.origin).absolute())
    own = checkpoint.newest_manifest(Path(args.run) / "checkpoints")
    if own is not None:
        start = own.config.get("start", {}).get("checkpoint", "")
        same = Path(path) == Path(start) or (args.best and Path(path) in Path(start).parents)
        return {"model": own.config["model"], "start": {"checkpoint": start if same else path}}
    if args.best:
        path = str(best_of(path))
    return {"model": origin_at(path).manifest.config["model"], "start": {"checkpoint": path}}
