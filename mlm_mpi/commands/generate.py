"""`mlm-mpi generate RUN --prompt TEXT`: streams a continuation to the terminal. Alone it needs no MPI."""

import argparse
import itertools
import sys
from typing import TYPE_CHECKING

from mlm_mpi.commands import drawing, sharing
from mlm_mpi.errors import ConfigError, agreed
from mlm_mpi.plug import Plugins, named

if TYPE_CHECKING:  # --help and completion need no NumPy
    from mlm_mpi.comm.group import Group

_EXAMPLES = """examples:
  mlm-mpi generate runs/one --prompt "Return a list of"
  mlm-mpi generate runs/one --prompt "Return a list of" --temperature 0           # always the same text
  mlm-mpi generate runs/one/checkpoints/step-00000300 --top-p 0.95 --seed 2
  mlm-mpi run -n 2 -- generate runs/one --tp 2 --prompt "Return a list of"        # a model that two ranks share"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi generate`."""
    parser.epilog = _EXAMPLES
    drawing.configure(parser)
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what to continue (default: a new document)")
    sharing.configure(parser)


def main(args: argparse.Namespace, group: "Group") -> int:
    """Runs the command. Collective."""
    from mlm_mpi.data.tokenizer import StreamDecoder  # here, not above: --help and completion need no NumPy
    from mlm_mpi.generation import Sampling, continue_prompt
    from mlm_mpi.train.trained import load, note

    mesh, sampling, plugins = sharing.mesh_of(args, group, copies=False), Sampling(), Plugins()
    with group.together("the arguments"):
        sampling = drawing.sampling(args)
        plugins = named(args.plugins)
    trained = load(sharing.checkpoint_of(args, group), plugins, args.device, None, group.on_node(), mesh)
    kind = trained.config.task.kind
    task = trained.plugins.find("tasks", kind, "task.kind")
    if (
        getattr(task, "BOTH_WAYS", False)
        or getattr(task, "NEEDS", ())
        or (mesh.size("pp") == 1 and not hasattr(trained.chain.parts[-1], "logits"))
    ):
        raise agreed(
            ConfigError(f'{args.run} was trained for task.kind = "{kind}", which continues no text: give another run')
        )
    if trained.averaged and group.rank == 0:
        note(f"note: checkpoint of step {trained.step}, moving average of its weights")
    end = trained.tokenizer.eot
    text = args.prompt.encode(errors="surrogateescape").decode(errors="replace")  # a command line may hold any bytes
    prompt = [end, *trained.tokenizer.encode(text)]
    decoder = StreamDecoder(trained.tokenizer)
    say = _shown if group.rank == 0 else len  # rank 0 speaks for all
    say(text)
    context, place = trained.config.model.context, trained.place
    for token in itertools.islice(
        continue_prompt(trained.chain, context, prompt, sampling, place=place, mesh=trained.mesh), args.tokens
    ):
        if token == end:
            break
        say(decoder.push(token))
        sys.stdout.flush()
    say(decoder.flush() + "\n")
    return 0


def _shown(text: str) -> int:
    """Writes text to stdout; no control character of it reaches a terminal, where it would be obeyed."""
    from mlm_mpi.data.text import clean
    from mlm_mpi.monitor.live import on_terminal

    return sys.stdout.write(clean(text).text if on_terminal() else text)
