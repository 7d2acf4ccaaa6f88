"""`mlm-mpi generate RUN --prompt TEXT`: streams a continuation to the terminal. Alone it needs no MPI."""

import argparse
import itertools
import sys
from typing import TYPE_CHECKING

from mlm_mpi.commands import sharing
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
    parser.add_argument("run", metavar="RUN", help="run folder of a training, or one of its checkpoints")
    parser.add_argument("--best", action="store_true", help="the best checkpoint of RUN (eval.best), not the newest")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="where to calculate (default: where it was trained)")
    parser.add_argument("--plugins", metavar="DIR", help="the folder of plug-ins that the model was trained with")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what to continue (default: a new document)")
    parser.add_argument(
        "--tokens", type=int, default=200, metavar="N", help="at most this many new tokens (default 200)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0: always the likeliest token (default 0.8)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest (default 0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that make up P")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, another text")
    sharing.configure(parser)


def main(args: argparse.Namespace, group: "Group") -> int:
    """Runs the command. Collective."""
    from mlm_mpi.data.tokenizer import StreamDecoder  # here, not above: --help and completion need no NumPy
    from mlm_mpi.generation import Sampling, continue_prompt
    from mlm_mpi.train.trained import load, note

    mesh, sampling, plugins = sharing.mesh_of(args, group, copies=False), Sampling(), Plugins()
    with group.together("the arguments"):
        if not 1 <= args.tokens <= sys.maxsize:
            raise ConfigError(f"--tokens {args.tokens} must be at least 1 and at most {sys.maxsize}")
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
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
    say = sys.stdout.write if group.rank == 0 else len  # rank 0 speaks for all
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
