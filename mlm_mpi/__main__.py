"""Sub-commands and nothing else: each names the module whose `configure` and `main` serve it."""

import argparse
import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from mlm_mpi import __version__
from mlm_mpi.comm import launch
from mlm_mpi.errors import MlmError
from mlm_mpi.output import open_streams

# name -> (module, needs all ranks' group, one line); a module is imported only when its command is given
COMMANDS = {
    "prepare": ("mlm_mpi.commands.prepare", True, "text -> verified HDF5 shards and a catalog (also under mpiexec)"),
    "train": ("mlm_mpi.commands.train", False, "train a model (under mpiexec; alone it is one rank)"),
    "run": ("mlm_mpi.launcher", False, "start mpiexec well: run -n 4 -- train CONFIG --run DIR"),
    "evaluate": (
        "mlm_mpi.commands.evaluate",
        True,
        "held-out loss and bits per character of a run (also under mpiexec)",
    ),
    "generate": ("mlm_mpi.commands.generate", False, "continue a prompt with a trained run"),
    "config": ("mlm_mpi.commands.config", False, "every key of a configuration: meaning, type, bounds, default"),
    "doctor": ("mlm_mpi.doctor", False, "what this machine has, and what will hurt"),
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong once, not once per rank."""

    def error(self, message: str) -> NoReturn:
        if launch.announced()[0] != 0:
            time.sleep(launch.OTHERS_WAIT_S)
            raise SystemExit(2)
        super().error(message)


def main(argv: list[str] | None = None) -> int:
    """Runs one sub-command; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    return launch.supervise(lambda: _dispatch(words))


def _dispatch(words: list[str]) -> int:
    parser = _Parser(prog="mlm-mpi", description="Trains language models on anything mpiexec runs on.")
    parser.add_argument("--version", action="version", version=f"mlm-mpi {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    module = None
    for name, (path, _, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if words and words[0] == name:
            module = importlib.import_module(path)
            module.configure(command)
    try:
        args = parser.parse_args(words)
    except SystemExit as left:  # after its help, or a mistake
        return left.code if isinstance(left.code, int) else 2
    assert module is not None, "argparse accepts only the commands above"
    if COMMANDS[args.command][1]:
        return _together(lambda group: int(module.main(args, group)))
    return int(module.main(args))


def _together(command: Callable[[Any], int]) -> int:
    """Runs a command on all ranks; none leaves before all have come to its end."""
    group = launch.start()
    code = command(group)
    group.barrier("the end of the command")
    return code


def entry() -> NoReturn:
    """What the `mlm-mpi` script calls. Threads that still wait (a loader, a writer) do not hold the exit up."""
    open_streams(patient=sys.argv[1:2] == ["train"])
    code = main()
    with contextlib.suppress(OSError, MlmError):  # was told, or nobody is there to be told
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    entry()
