"""`mlm-mpi merge RUN --out DIR`: a fine-tuned model with its adapters in its weights. Needs no MPI."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_mpi.errors import ConfigError, agreed
from mlm_mpi.plug import named

if TYPE_CHECKING:  # --help and completion need no NumPy
    from mlm_mpi.comm.group import Group

_EXAMPLES = """examples:
  mlm-mpi merge runs/lora --out runs/merged
  mlm-mpi merge runs/lora --out runs/merged --best
  mlm-mpi generate runs/merged --prompt "Return a list of"

A map W with adapters A and B of rank r becomes W + (alpha / r) A B. DIR is a run folder like any other: its checkpoint
has the step of RUN's, no adapters, nothing frozen, and moments of zero."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi merge`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("run", metavar="RUN", help="run folder of a training with start.lora_rank, or a checkpoint")
    parser.add_argument("--out", required=True, metavar="DIR", help="run folder to make, with one checkpoint")
    parser.add_argument("--best", action="store_true", help="the best checkpoint of RUN, which best.json names")
    parser.add_argument("--plugins", metavar="DIR", help="the folder of plug-ins that the model was trained with")


def main(args: argparse.Namespace, group: "Group") -> int:
    """Runs the command."""
    from mlm_mpi.train.merging import merged
    from mlm_mpi.train.search import best_of

    if group.size > 1:
        raise agreed(
            ConfigError(f"merge works on one rank, the launcher gave {group.size}: start it without mlm-mpi run")
        )
    if not args.out:
        raise ConfigError("--out '' is empty, which would be the current folder: name a folder")
    run = best_of(args.run) if args.best else args.run
    path, weights = merged(run, Path(args.out), named(args.plugins))
    print(f"{path}: the weights of {run} without adapters")
    print(f"weights sha256 {weights}")
    return 0
