"""`mlm-mpi evaluate RUN`: held-out quality of a trained model, on any number of ranks. Alone it needs no MPI."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_mpi.commands import searching, sharing
from mlm_mpi.errors import ConfigError, DataError, agreed
from mlm_mpi.plug import Plugins, named

if TYPE_CHECKING:  # --help and completion need no NumPy
    from mlm_mpi.comm.group import Group
    from mlm_mpi.data.objectives import Samples
    from mlm_mpi.train.task import Task
    from mlm_mpi.train.trained import Trained

_SOURCES_AT_ONCE = 64  # of each copy of the model; predict's --rows
_TOKENS_AT_ONCE = 1 << 16  # whatever `eval.rows` says in a checkpoint from elsewhere

_EXAMPLES = """examples:
  mlm-mpi evaluate runs/one --baselines
  mlm-mpi evaluate runs/one --data corpora/other --json
  mlm-mpi evaluate runs/reviews --split test --confusion reviews.png
  mlm-mpi evaluate runs/french --split test --translate --beams 4 --baselines
  mlm-mpi run -n 4 -- evaluate runs/one          # the same figures, sooner
  mlm-mpi run -n 4 -- evaluate runs/one --tp 2   # of a model that is too large for one rank"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi evaluate`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("run", metavar="RUN", help="run folder of a training, or one of its checkpoints")
    parser.add_argument("--best", action="store_true", help="the best checkpoint of RUN (eval.best), not the newest")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="where to calculate (default: where it was trained)")
    parser.add_argument("--data", metavar="DIR", help="another prepared corpus with the same tokenizer")
    parser.add_argument("--baselines", action="store_true", help="also what simple methods reach on the same data")
    parser.add_argument(
        "--split",
        choices=("heldout", "test"),
        default="heldout",
        help="of labelled texts also the one kept to the last",
    )
    parser.add_argument("--confusion", metavar="FILE.png", help="of a classifier: which labels it takes for which")
    parser.add_argument(
        "--translate", action="store_true", help="of a model that translates: BLEU and chrF of what it writes"
    )
    searching.configure(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--plugins", metavar="DIR", help="the folder of plug-ins that the model was trained with")
    sharing.configure(parser)


def main(args: argparse.Namespace, group: "Group") -> int:
    """Runs the command. Collective."""
    from mlm_mpi.train.task import Refers
    from mlm_mpi.train.trained import load, note, open_task

    mesh, on_node, plugins = sharing.mesh_of(args, group, copies=True), group.on_node(), Plugins()
    with group.together("the plug-ins"):
        plugins = named(args.plugins)
        _check_translating(args)
    trained = load(sharing.checkpoint_of(args, group), plugins, args.device, None, on_node, mesh)
    say = note if group.rank == 0 else _silent
    with group.together("opening the data"):
        task = open_task(trained, args.data, say)
        if args.baselines and not hasattr(task, "baselines"):
            raise DataError(f'--baselines: task.kind = "{trained.config.task.kind}" knows none: leave it out')
        if args.baselines and len(trained.config.data.mixture) > 1 and args.data is None:
            raise DataError("--baselines are of one corpus, the model was trained on several: give one by --data DIR")
        if args.translate and not hasattr(task, "translated"):
            raise DataError(f'--translate: task.kind = "{trained.config.task.kind}" writes no texts: leave it out')
        if args.confusion is not None:
            _check_picture(args.confusion, trained)
        if isinstance(task, Refers):
            task.refer(_reference(trained, task))
        samples = task.samples(args.split)
    numbers, own = _measured(trained, task, samples, args.split)
    if args.translate:
        own |= _translated(args, trained, task)
    if group.rank == 0:
        _tell(args, trained, task, numbers | own, list(own))
    with group.together("writing the picture"):
        if group.rank == 0 and args.confusion is not None:
            from mlm_mpi.figures import pictures

            pictures.confusion(Path(args.confusion), own["confusion"], trained.manifest.labels)
    return 0


def _reference(trained: "Trained", task: "Task") -> dict[str, Any]:
    """What the weights that the run began with say. Raises DataError, CheckpointError."""
    from mlm_mpi.train import reference
    from mlm_mpi.train.folder import RunFolder

    if task.about()["catalog"] != trained.manifest.catalog:
        raise DataError("--data: the weights that the run began with were asked of its own pairs alone: leave it out")
    return reference.read(RunFolder(trained.checkpoint.parent.parent).reference, trained.manifest)


def _silent(text: str) -> None:
    """Rank 0 speaks for all."""


def _check_translating(args: argparse.Namespace) -> None:
    """Raises ConfigError before a model is loaded."""
    searching.beams_of(args)
    if args.translate:
        from mlm_mpi.figures import translations

        translations.check("--translate")
    elif searching.given(args):
        raise ConfigError(f"{searching.given(args)[0]} is for what a model writes: give --translate too")


def _check_picture(path: str, trained: "Trained") -> None:
    """Raises ConfigError before anything is computed."""
    if not trained.manifest.labels:
        raise ConfigError(f"--confusion {path} is for models that tell labels, and this one is none: leave it out")
    place = Path(path).absolute()
    if place.suffix.lower() != ".png" or not place.parent.is_dir() or (place.exists() and not place.is_file()):
        raise ConfigError(f"--confusion {path!r} is no .png file in a folder that exists: give another path")


def _measured(
    trained: "Trained", task: "Task", samples: "Samples", split: str
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Every target of a split: what all tasks have, and what this one says of it."""
    from mlm_mpi.monitor.live import Live, Plain, live
    from mlm_mpi.train.measure import measure

    rows = min(trained.config.eval.rows, max(1, _TOKENS_AT_ONCE // task.row_tokens))
    bar: Live = live("held-out") if trained.mesh.world.rank == 0 else Plain()

    def tell(done: int, total: int) -> None:
        bar.update(done, total, f"{done:,} of {total:,} micro-batches")

    try:
        sums = measure(trained.chain, samples, rows, 0, trained.mesh, trained.place, tell)
    finally:
        bar.close()
    if sums is None:
        raise agreed(
            DataError(
                f"{split} has {task.tokens(split)} tokens, a target needs 2: "
                f"prepare with a larger --{split} or more text"
            )
        )
    numbers: dict[str, Any] = {"step": trained.step, "weights": "average" if trained.averaged else "last"}
    numbers |= {"split": split} if split != "heldout" else {}
    numbers |= {"loss": sums.mean, "tokens": sums.targets}
    if sums.parts:
        numbers["loss_by_corpus"] = {name: part.mean for name, part in sums.parts.items()}
    return numbers, task.quality(sums)


def _translated(args: argparse.Namespace, trained: "Trained", task: "Task") -> dict[str, Any]:
    """Figures of what the model makes of a split's sources. Collective."""
    from mlm_mpi.prediction import write

    sources = task.sources(args.split)  # type: ignore[attr-defined]  # as `translated`
    rounds = write(
        trained.chain, trained.tokenizer, iter(sources), list, task.row_tokens, _SOURCES_AT_ONCE,
        searching.beams_of(args), trained.mesh, trained.place,
    )  # fmt: skip
    texts = [text for found in rounds for text in found.texts]
    return task.translated(args.split, texts)  # type: ignore[attr-defined]  # some tasks have it


def _tell(args: argparse.Namespace, trained: "Trained", task: "Task", numbers: dict[str, Any], own: list[str]) -> None:
    from mlm_mpi.train.task import plain_lines

    about = task.about()
    numbers |= {"catalog": about["catalog"], "trained_on": trained.manifest.catalog}
    if args.baselines:
        numbers |= task.baselines(args.split)
    if args.json:
        import msgspec

        print(msgspec.json.encode(numbers).decode())
        return
    of = f"checkpoint of step {trained.step}" + (", moving average of its weights" if trained.averaged else "")
    for line in task.lines(numbers, of) or plain_lines(numbers, of, own):
        print(line)
