"""Options of commands whose ranks may share a trained model, however it was trained: `--pp`, `--tp`."""

import argparse
from typing import TYPE_CHECKING

from mlm_mpi.errors import ConfigError, agreed

if TYPE_CHECKING:  # --help and completion need no NumPy
    from mlm_mpi.comm.group import Group
    from mlm_mpi.comm.mesh import Mesh


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--tp", type=int, default=1, metavar="N",
        help="so many ranks share each layer of the model: heads, features, tokens (default 1; train's mesh.tp)",
    )  # fmt: skip
    parser.add_argument(
        "--pp", type=int, default=1, metavar="N",
        help="the model is cut into so many stages, one behind the other (default 1; train's mesh.pp)",
    )  # fmt: skip


def checkpoint_of(args: argparse.Namespace, group: "Group") -> str:
    """RUN, or the checkpoint in it that `--best` means, the same on all ranks. Collective. Raises ConfigError."""
    from mlm_mpi.train.search import best_of

    if not args.best:
        return str(args.run)
    found = ""
    with group.together("the best checkpoint"):
        found = str(best_of(args.run))
    return str(group.broadcast(found, "the best checkpoint"))


def mesh_of(args: argparse.Namespace, group: "Group", copies: bool) -> "Mesh":
    """That of all ranks, `--pp` times `--tp` of which share a model. Collective.

    `copies`: whether several copies have something to do. Raises ConfigError, agreed, where ranks do not fit.
    """
    from mlm_mpi.comm.mesh import mesh

    for name, value in (("--pp", args.pp), ("--tp", args.tp)):
        if value < 1:
            raise agreed(ConfigError(f"{name} {value} must be at least 1"))
    each, ranks = args.pp * args.tp, group.size
    if ranks % each or (ranks > each and not copies):
        wanted = f"a multiple of {each} ranks" if copies and each > 1 else f"{each} rank{'s' * (each > 1)}"
        fewer = max(1, ranks // each) * each if copies else each
        remedy = f"start {fewer} (mlm-mpi run -n {fewer} -- …)" if fewer > 1 else "start it without mlm-mpi run"
        remedy += ", or set --pp 1 and --tp 1" if copies or ranks == 1 else ", or another --pp and --tp"
        raise agreed(
            ConfigError(f"--pp {args.pp} and --tp {args.tp} need {wanted}, the launcher gave {ranks}: {remedy}")
        )
    return mesh(group, args.pp, args.tp)
