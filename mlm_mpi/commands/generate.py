"""`mlm-mpi generate RUN --prompt TEXT`: streams a continuation to the terminal. Needs no MPI."""

import argparse
import itertools
import sys

from mlm_mpi.errors import ConfigError
from mlm_mpi.plug import named

_EXAMPLES = """examples:
  mlm-mpi generate runs/one --prompt "Return a list of"
  mlm-mpi generate runs/one --prompt "Return a list of" --temperature 0           # always the same text
  mlm-mpi generate runs/one/checkpoints/step-00000300 --top-p 0.95 --seed 2"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi generate`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("run", metavar="RUN", help="run folder of a training, or one of its checkpoints")
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


def main(args: argparse.Namespace) -> int:
    """Runs the command."""
    from mlm_mpi.data.tokenizer import StreamDecoder  # here, not above: --help and completion need no NumPy
    from mlm_mpi.generation import Sampling, continue_prompt
    from mlm_mpi.train.trained import load, note

    if not 1 <= args.tokens <= sys.maxsize:
        raise ConfigError(f"--tokens {args.tokens} must be at least 1 and at most {sys.maxsize}")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    trained = load(args.run, named(args.plugins), args.device)
    if trained.averaged:
        note(f"note: checkpoint of step {trained.step}, moving average of its weights")
    end = trained.tokenizer.eot
    text = args.prompt.encode(errors="surrogateescape").decode(errors="replace")  # a command line may hold any bytes
    prompt = [end, *trained.tokenizer.encode(text)]
    decoder = StreamDecoder(trained.tokenizer)
    sys.stdout.write(text)
    for token in itertools.islice(
        continue_prompt(trained.chain, trained.config.model.context, prompt, sampling, place=trained.place),
        args.tokens,
    ):
        if token == end:
            break
        sys.stdout.write(decoder.push(token))
        sys.stdout.flush()
    print(decoder.flush())
    return 0
