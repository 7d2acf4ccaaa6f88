"""`mlm-mpi explain RUN TEXT --out FILE.html`: what a model looks at in a text, as a page and a picture. On one rank."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_mpi.errors import ConfigError, agreed
from mlm_mpi.plug import Plugins, named

if TYPE_CHECKING:  # --help and completion need no NumPy
    from mlm_mpi.comm.group import Group
    from mlm_mpi.inside.explanation import Explanation
    from mlm_mpi.inside.question import Question
    from mlm_mpi.train.trained import Trained

_MOST_STEPS, _MOST_TOP = 1 << 20, 100
_LOOSE = 0.01  # a gap from which a note says that the sum of attributions is no good account

_EXAMPLES = """examples:
  mlm-mpi explain runs/one "Return a list of" --out look.html          # which token follows, and why
  mlm-mpi explain runs/one "Return a list of" --at 3 --out look.html   # why the third
  mlm-mpi explain runs/reviews "A dull film." --out dull.html          # a classifier: its label
  mlm-mpi explain runs/encoder "The cat sat" --at 2 --out cat.html     # the second token, hidden
  mlm-mpi explain runs/french "Save the file" --at 3 --out save.html   # a translation: why its third token

Writes FILE.html, which needs no network and no other file, and FILE.png beside it."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi explain`."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _EXAMPLES
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder of a training, or one of its checkpoints")
    add("text", metavar="TEXT", help="what the model reads, at most 256 tokens")
    add("--pair", metavar="TEXT", help="the second text, of a model of pairs")
    add("--translation", metavar="TEXT", help="of a model that translates: explain this one, not its own (greedy) one")
    add("--out", required=True, metavar="FILE", help="where the page goes, a new .html; the picture is FILE.png")
    add(
        "--at", type=int, metavar="N",
        help="explain the N-th token of the text, of an encoder it is hidden; or of the translation (1)",
    )  # fmt: skip
    add("--target", metavar="NAME", help="explain this token or label (default: what came, else the likeliest)")
    add(
        "--score", choices=("logit", "log-probability"), default="logit",
        help="what of it the gradients are integrated of (logit)",
    )  # fmt: skip
    add(
        "--baseline", choices=("end", "zero"), default="end",
        help="what the text is compared with: ends of text in the place of its tokens, or zeros (end)",
    )  # fmt: skip
    add("--steps", type=int, default=512, metavar="N", help="at most so many gradients on the way to the text (512)")
    add("--layer", type=int, metavar="N", help="the layer of the picture, which the page opens with (the last)")
    add("--head", type=int, default=0, metavar="N", help="the head that the page opens with (0: the mean of all)")
    add("--top", type=int, default=5, metavar="N", help="so many of the likeliest tokens of each layer (5)")
    add("--best", action="store_true", help="the best checkpoint of RUN (eval.best), not the newest")
    add("--device", choices=("cpu", "gpu"), help="where to calculate (default: where it was trained)")
    add("--plugins", metavar="DIR", help="the folder of plug-ins that the model was trained with")


def main(args: argparse.Namespace, group: "Group") -> int:
    """Runs the command. Collective, to be refused together."""
    from mlm_mpi.train.search import best_of
    from mlm_mpi.train.trained import load, note

    if group.size > 1:
        raise agreed(
            ConfigError(
                f"explain is the work of one rank, the launcher gave {group.size}: start it without mlm-mpi run"
            )
        )
    out = _checked(args)
    plugins = named(args.plugins)
    trained = load(best_of(args.run) if args.best else args.run, plugins, args.device, None, group.on_node())
    question = _question(args, trained, plugins)
    made = _explained(args, trained, question)
    layer = _layer(args, made)
    _write(out, made, layer, args.head)
    for line in _lines(made, out):
        print(line)
    if made.attribution.gap > _LOOSE:
        note(f"note: the sum of attributions is {made.attribution.gap:.1%} off: set --steps {2 * args.steps} or more")
    return 0


def _checked(args: argparse.Namespace) -> Path:
    """Where the page goes. Raises ConfigError before anything is computed."""
    from mlm_mpi.inside.answer import LEAST

    out = Path(args.out)
    if not args.out or out.suffix.lower() != ".html" or not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {args.out!r} is no .html file in a folder that exists: give another path")
    for path in (out, out.with_suffix(".png")):
        if path.exists() or path.is_symlink():
            raise ConfigError(f"{path} is there already: remove it, or give another --out")
    if not args.text:
        raise ConfigError("TEXT is empty: give some words")
    for option in ("pair", "translation"):
        if getattr(args, option) == "":
            raise ConfigError(f"--{option} is empty: give some words, or leave it out")
    for name, value, least, most in (("steps", args.steps, LEAST, _MOST_STEPS), ("top", args.top, 1, _MOST_TOP)):
        if not least <= value <= most:
            raise ConfigError(f"--{name} {value} must be at least {least} and at most {most}")
    return out


def _question(args: argparse.Namespace, trained: "Trained", plugins: Plugins) -> "Question":
    """What this model can be asked. Raises ConfigError where that is nothing, DataError of the text."""
    from mlm_mpi.data.text import clean
    from mlm_mpi.inside.question import hidden_token, label_of, next_token

    task = plugins.find("tasks", trained.config.task.kind, "task.kind")
    kind, labels = trained.config.task.kind, trained.manifest.labels
    if not hasattr(trained.chain.parts[-1], "logits_backward"):
        raise ConfigError(
            f'{args.run} was trained for task.kind = "{kind}", which says nothing of a text: give another'
        )
    text = clean(args.text).text  # as the corpus was; a command line may hold any bytes
    pair = None if args.pair is None else clean(args.pair).text
    context = trained.config.model.context
    if getattr(task, "WRITES", False):
        return _written(args, trained, text)
    if args.translation is not None:
        raise ConfigError(f"--translation is of models that translate, and {args.run} is none: leave it out")
    if "a source text" in getattr(task, "NEEDS", ()):
        raise ConfigError(
            f'{args.run} was trained for task.kind = "{kind}", whose texts have holes: give a run that was fine-tuned '
            "from it to translate"
        )
    if labels:
        if args.at is not None:
            raise ConfigError(f"--at {args.at} is of models of tokens, and {args.run} tells labels: leave it out")
        if trained.manifest.pairs != (pair is not None):
            remedy = "give the second text by --pair" if trained.manifest.pairs else "leave --pair out"
            raise ConfigError(f"{args.run} tells labels of {'single texts' if pair else 'pairs'}: {remedy}")
        return label_of(trained.tokenizer, text, pair, context, labels, args.target)
    if pair is not None:
        raise ConfigError(f"--pair is of classifiers of pairs, and {args.run} is none: leave it out")
    ask = hidden_token if getattr(task, "BOTH_WAYS", False) else next_token
    return ask(trained.tokenizer, text, context, args.at, args.target)


def _written(args: argparse.Namespace, trained: "Trained", text: str) -> "Question":
    """Of a translation, by greedy search if none is given."""
    from mlm_mpi.beams import written
    from mlm_mpi.data.text import clean
    from mlm_mpi.inside.question import room, source_of, written_token

    if args.pair is not None:
        raise ConfigError(f"--pair is of classifiers of pairs, and {args.run} translates: give --translation")
    tokenizer, context = trained.tokenizer, trained.config.model.context
    source = source_of(tokenizer, text, context, trained.manifest.hints or None)
    if args.translation is not None:
        return written_token(tokenizer, source, clean(args.translation).text, context, args.at, args.target)
    (ids,) = written(trained.chain, source[None], room(context), tokenizer.eot, place=trained.place)
    return written_token(tokenizer, source, ids, context, args.at, args.target)


def _explained(args: argparse.Namespace, trained: "Trained", question: "Question") -> "Explanation":
    from mlm_mpi.inside.answer import Integration, explain

    name = f"{Path(args.run).resolve().name}, step {trained.step}"
    name += ", moving average of its weights" if trained.averaged else ""
    integration = Integration(args.score, args.baseline, args.steps)
    return explain(trained.chain.parts, question, trained.place, trained.tokenizer.eot, integration, args.top, name)


def _layer(args: argparse.Namespace, made: "Explanation") -> int:
    """The number of a map, from 0. Raises ConfigError for a layer or head that is none."""
    count = len(made.maps)
    if not count:
        if args.layer is not None or args.head:
            raise ConfigError(f"{args.run} has no attention: leave --layer and --head out")
        return 0
    layer = count if args.layer is None else args.layer
    if not 1 <= layer <= count:
        raise ConfigError(f"--layer {layer} is none of {args.run}: give 1 to {count}")
    heads = len(list(made.maps.values())[layer - 1].probabilities)
    if not 0 <= args.head <= heads:
        raise ConfigError(f"--head {args.head} is none of layer {layer}: give 1 to {heads}, or 0 for their mean")
    return layer - 1


def _write(out: Path, made: "Explanation", layer: int, head: int) -> None:
    """Both files or none."""
    from mlm_mpi.files import publish_all
    from mlm_mpi.inside.page import page
    from mlm_mpi.inside.picture import picture

    publish_all([(out, page(made, layer, head)), (out.with_suffix(".png"), picture(made, layer))])


def _lines(made: "Explanation", out: Path) -> list[str]:
    a: Any = made.attribution
    best = ", ".join(f"{name!r} {p:.3f}" for name, p in made.lens[-1].top[_place(made)][:3])
    source = [f"source        {len(made.source)} positions"] if made.source else []
    return [
        f"model         {made.model}",
        *source,
        f"question      {made.question}, of {len(made.tokens)} positions",
        f"answer        {best}",
        f"explained     {a.output!r}, probability {a.probability:.3f}, {a.score} {a.value:.4f}",
        f"attributions  {a.total:.4f} in all, {a.difference:.4f} more than {a.baseline} have; {a.steps} gradients",
        f"attention     {len(made.maps)} layers" if made.maps else "attention     none in this model",
        f"written to {out} ({out.stat().st_size / 1000:,.0f} kB) and {out.with_suffix('.png').name}",
    ]


def _place(made: "Explanation") -> int:
    """Which of the places of the lens is asked for."""
    return 0 if made.at is None else made.at
