"""`mlm-mpi config`: the manual of all keys."""

import argparse

from mlm_mpi.config import reference
from mlm_mpi.errors import ConfigError
from mlm_mpi.plug import named

_EXAMPLES = """examples:
  mlm-mpi config | less
  mlm-mpi config train
  mlm-mpi config train.rows"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi config`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("name", nargs="?", metavar="SECTION.KEY", help="one key, or one section (default: all)")
    parser.add_argument("--plugins", metavar="DIR", help="also the kinds in this folder: DIR/models/mine.py, …")
    parser.add_argument("--markdown", action="store_true", help="print docs/configuration.md")


def main(args: argparse.Namespace) -> int:
    """Prints what was asked for."""
    if args.name is not None and args.markdown:
        raise ConfigError(f"--markdown prints all keys, not {args.name} alone: leave one out")
    plugins = named(args.plugins)
    if args.markdown:
        print(reference.markdown(plugins), end="")
    else:
        print(reference.overview(plugins) if args.name is None else reference.explain(args.name, plugins))
    return 0
