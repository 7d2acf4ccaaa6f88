"""Sub-commands and nothing else: each names the module whose `configure` and `main` serve it."""

import signal
import sys

if sys.argv[0].endswith(("/mlm-mpi", "/mlm_mpi/__main__.py")):  # as a program: Ctrl-C during imports is no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import importlib
import os
from collections.abc import Callable
from typing import Any, NoReturn

from mlm_mpi import __version__
from mlm_mpi.arguments import Parser
from mlm_mpi.comm import launch
from mlm_mpi.errors import ConfigError, MlmError, nearest
from mlm_mpi.output import open_streams

# name -> (module, needs all ranks' group, one line); a module is imported only when its command is given
COMMANDS = {
    "prepare": ("mlm_mpi.commands.prepare", True, "text -> verified HDF5 shards and a catalog (also under mpiexec)"),
    "train": ("mlm_mpi.commands.train", False, "train a model (under mpiexec; alone it is one rank)"),
    "finetune": (
        "mlm_mpi.commands.finetune",
        False,
        "train on from the weights of another run, all of them or adapters (also under mpiexec)",
    ),
    "run": ("mlm_mpi.launcher", False, "start mpiexec well: run -n 4 -- train CONFIG --run DIR"),
    "evaluate": (
        "mlm_mpi.commands.evaluate",
        True,
        "held-out loss and bits per character of a run (also under mpiexec)",
    ),
    "generate": ("mlm_mpi.commands.generate", True, "continue a prompt with a trained run (also under mpiexec)"),
    "chat": ("mlm_mpi.commands.chat", True, "talk with a model of dialogues, in a terminal or through a pipe"),
    "predict": ("mlm_mpi.commands.predict", True, "labels of the texts in a file (also under mpiexec)"),
    "explain": (
        "mlm_mpi.commands.explain",
        True,
        "attention, logit lens and attributions of a text, as a page and a picture",
    ),
    "merge": ("mlm_mpi.commands.merge", True, "put the adapters of a fine-tuned run into its weights"),
    "vectors": ("mlm_mpi.commands.vectors", False, "neighbours of words, analogies, .vec files"),
    "sweep": ("mlm_mpi.commands.sweep", False, "try values of keys: successive halving, and a table"),
    "chaos": (
        "mlm_mpi.commands.chaos",
        False,
        "let things go wrong in a training, and demand the bits of an undisturbed one",
    ),
    "compare": ("mlm_mpi.commands.compare", False, "where runs differ in their settings, and what became of it"),
    "verify": ("mlm_mpi.commands.verify", False, "prove that a run used each sample exactly once"),
    "config": ("mlm_mpi.commands.config", False, "every key of a configuration: meaning, type, bounds, default"),
    "doctor": ("mlm_mpi.doctor", False, "what this machine has, and what will hurt"),
    "completion": ("mlm_mpi.commands.completion", False, "let bash, zsh or fish complete commands, options and keys"),
}

_FIRST_STEPS = """
first steps:
  mlm-mpi doctor
  mlm-mpi prepare my-texts/ --out corpora/mine
  mlm-mpi run -n 2 -- train jobs/configs/tiny.toml --run runs/mine --set data.dir=corpora/mine
  mlm-mpi generate runs/mine --prompt "Once upon a time"

`mlm-mpi help COMMAND` has the options of each, with examples."""


def main(argv: list[str] | None = None) -> int:
    """Runs one sub-command; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    return launch.supervise(lambda: _dispatch(words))


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help") or words == ["help"]:
        print(overview())
        return 0 if words else 2  # a script whose variable is empty has asked for nothing
    if words[0] == "--version":
        print(f"mlm-mpi {__version__}")
        return 0
    name, *rest = [words[1], "--help"] if words[0] == "help" else words
    parser, module = command(name)
    try:
        args = parser.parse(rest)
    except SystemExit as left:  # after its help
        return left.code if isinstance(left.code, int) else 2
    if COMMANDS[name][1]:
        return _together(lambda group: int(module.main(args, group)))
    return int(module.main(args))


def command(name: str) -> tuple[Parser, Any]:
    """A sub-command's arguments and the module that serves it. Raises ConfigError."""
    if name not in COMMANDS:
        raise ConfigError(f"no command {name!r}{nearest(name, [*COMMANDS, 'help'])}")
    path, _, text = COMMANDS[name]
    module = importlib.import_module(path)
    parser = Parser(name, text)
    module.configure(parser)
    return parser, module


def overview() -> str:
    """All sub-commands, a line each."""
    lines = ["usage: mlm-mpi COMMAND …", "", "Trains language models on anything mpiexec runs on.", ""]
    return "\n".join([*lines, *(f"  {name:<11} {text}" for name, (_, _, text) in COMMANDS.items()), _FIRST_STEPS])


def _together(main: Callable[[Any], int]) -> int:
    """Runs a command on all ranks; none leaves before all have come to its end."""
    group = launch.start()
    code = main(group)
    group.barrier("the end of the command")
    return code


def entry() -> NoReturn:
    """What the `mlm-mpi` script calls. Threads that still wait (a loader, a writer) do not hold the exit up."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow, and reads no messages
        from mlm_mpi.commands import completion

        completion.answer(tuple(COMMANDS), lambda name: command(name)[0])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    open_streams(patient=sys.argv[1:2] in (["train"], ["finetune"]))
    code = main()
    with contextlib.suppress(OSError, MlmError):  # was told, or nobody is there to be told
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    entry()
