"""Options of commands by which a model writes texts: `--beams`, `--length-penalty`."""

import argparse
from typing import TYPE_CHECKING

from mlm_mpi.errors import ConfigError

if TYPE_CHECKING:  # --help and completion need no NumPy
    from mlm_mpi.beams import Beams


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--beams", type=int, metavar="N",
        help="of a model that translates: go on with the N likeliest beginnings (1: greedy search)",
    )  # fmt: skip
    parser.add_argument(
        "--length-penalty", type=float, metavar="A",
        help="with --beams: log-probabilities are divided by ((5 + tokens) / 6)^A (0.6; 0: short texts win)",
    )  # fmt: skip


def given(args: argparse.Namespace) -> list[str]:
    """Those that are on the command line."""
    options = {"--beams": args.beams, "--length-penalty": args.length_penalty}
    return [option for option, value in options.items() if value is not None]


def beams_of(args: argparse.Namespace) -> "Beams":
    """What they mean. Raises ConfigError."""
    from mlm_mpi.beams import Beams

    width = 1 if args.beams is None else args.beams
    if args.length_penalty is None:
        return Beams(width)
    beams = Beams(width, args.length_penalty)
    if width == 1:
        raise ConfigError(
            f"--length-penalty {args.length_penalty} compares the texts of several beams: give --beams 4, or leave it "
            "out"
        )
    return beams
