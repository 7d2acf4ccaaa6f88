"""Options of commands that let a trained model write: which model, and how its tokens are drawn."""

import argparse
import sys
from typing import TYPE_CHECKING

from mlm_mpi.errors import ConfigError

if TYPE_CHECKING:  # --help and completion need no NumPy
    from mlm_mpi.generation import Sampling


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds RUN and the options."""
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder of a training, or one of its checkpoints")
    add("--best", action="store_true", help="the best checkpoint of RUN (eval.best), not the newest")
    add("--device", choices=("cpu", "gpu"), help="where to calculate (default: where it was trained)")
    add("--plugins", metavar="DIR", help="the folder of plug-ins that the model was trained with")
    add("--tokens", type=int, default=200, metavar="N", help="at most this many new tokens (default 200)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0: always the likeliest token (default 0.8)")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest (default 0: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that make up P")
    add("--seed", type=int, default=0, metavar="N", help="another seed, another text")


def sampling(args: argparse.Namespace) -> "Sampling":
    """How tokens are drawn. Raises ConfigError."""
    from mlm_mpi.generation import Sampling

    if not 1 <= args.tokens <= sys.maxsize:
        raise ConfigError(f"--tokens {args.tokens} must be at least 1 and at most {sys.maxsize}")
    return Sampling(args.temperature, args.top_k, args.top_p, args.seed)
