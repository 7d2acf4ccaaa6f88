"""`mlm-mpi completion SHELL`: what a shell runs to complete `mlm-mpi`, and the answers that it then asks for at TAB.

The answers are made by argcomplete from the arguments that each command declares; what a word is, its metavar says.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import argcomplete
from argcomplete import lexers
from argcomplete.completers import DirectoriesCompleter, FilesCompleter

from mlm_mpi.arguments import Parser
from mlm_mpi.config import reference
from mlm_mpi.errors import MlmError
from mlm_mpi.plug import named

_SWITCH_ON = {
    "bash": "eval \"$(mlm-mpi completion bash)\"  # also in ~/.bashrc",
    "zsh": "eval \"$(mlm-mpi completion zsh)\"  # also in ~/.zshrc, after compinit",
    "fish": "mlm-mpi completion fish | source  # also in ~/.config/fish/config.fish",
}  # fmt: skip
_FILES = ("PATH", "FILE", "INPUT")
_FOLDERS = ("DIR", "RUN")


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi completion`."""
    parser.add_argument("shell", choices=tuple(_SWITCH_ON), help="the shell that you type in")
    parser.epilog = "\n".join(["examples:", *(f"  {line}" for line in _SWITCH_ON.values())])


def main(args: argparse.Namespace) -> int:
    """Prints what the shell is to run."""
    print(argcomplete.shellcode(["mlm-mpi"], use_defaults=False, shell=args.shell))
    return 0


def answer(commands: Sequence[str], parser_of: Callable[[str], Parser]) -> NoReturn:
    """Tells the shell what may follow the line in COMP_LINE, and leaves.

    After `mlm-mpi run … --` that is what may follow `mlm-mpi`: argcomplete is told where the inner command begins.
    """
    words = lexers.split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3]
    begins = int(os.environ["_ARGCOMPLETE"])  # words before what belongs to the program: 1, or 3 of `python -m mlm_mpi`
    given, parser = words[begins:], _command_names([*commands, "help"])
    if given[:1] == ["help"]:
        begins, parser = begins + 1, _command_names(commands)
    elif given and given[0] in commands:
        inner = next((at for at, word in enumerate(given[1:], 1) if word in commands), 0) if given[0] == "run" else 0
        begins += inner + 1
        parser = parser_of(given[inner])
    for action in parser._actions:
        action.completer = _completer(action, commands)  # type: ignore[attr-defined]
    os.environ["_ARGCOMPLETE"] = str(begins)
    argcomplete.autocomplete(parser, always_complete_options="long", exclude=("-h", "--help"))
    raise SystemExit(1)  # autocomplete leaves by itself


def _command_names(names: Sequence[str]) -> Parser:
    parser = Parser("")
    parser.add_argument("command", choices=names)
    return parser


def _completer(action: argparse.Action, commands: Sequence[str]) -> Any:
    """What completes the words of an argument, as its metavar says; None: its choices, if it has any."""
    metavar = str(action.metavar or "")
    if action.choices is not None:
        return None
    if metavar.startswith("SECTION.KEY"):
        return _keys
    if metavar == "-- COMMAND":
        return lambda **_: [name for name in commands if name not in ("run", "completion")]
    if metavar == "CONFIG":
        return FilesCompleter(["toml"])
    if metavar in _FOLDERS:
        return DirectoriesCompleter()
    return FilesCompleter() if metavar.split("|")[-1] in _FILES else _nothing


def _nothing(**_: Any) -> list[str]:
    """For a number or a sentence; without it argcomplete would offer files."""
    return []


def _keys(prefix: str, action: argparse.Action, parsed_args: argparse.Namespace, **_: Any) -> dict[str, str]:
    """`section.key=` and what it means; after the `=` the values, where a key has a few."""
    try:
        plugins = named(getattr(parsed_args, "plugins", None))
        ending = "=" if str(action.metavar).endswith("VALUE") else ""
        return reference.completions(prefix, ending, plugins)
    except MlmError:  # no message fits here: the command itself will say it
        return {}
