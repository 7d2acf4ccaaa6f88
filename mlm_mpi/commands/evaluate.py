"""`mlm-mpi evaluate RUN`: held-out quality of a trained model, on any number of ranks. Alone it needs no MPI."""

import argparse
from typing import TYPE_CHECKING, Any

from mlm_mpi.commands import sharing
from mlm_mpi.errors import DataError, agreed
from mlm_mpi.plug import Plugins, named

if TYPE_CHECKING:  # --help and completion need no NumPy
    from mlm_mpi.comm.group import Group
    from mlm_mpi.train.task import Task
    from mlm_mpi.train.trained import Trained

_TOKENS_AT_ONCE = 1 << 16  # whatever `eval.rows` says in a checkpoint from elsewhere

_EXAMPLES = """examples:
  mlm-mpi evaluate runs/one --baselines
  mlm-mpi evaluate runs/one --data corpora/other --json
  mlm-mpi run -n 4 -- evaluate runs/one          # the same figures, sooner
  mlm-mpi run -n 4 -- evaluate runs/one --tp 2   # of a model that is too large for one rank"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi evaluate`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("run", metavar="RUN", help="run folder of a training, or one of its checkpoints")
    parser.add_argument("--best", action="store_true", help="the best checkpoint of RUN (eval.best), not the newest")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="where to calculate (default: where it was trained)")
    parser.add_argument("--data", metavar="DIR", help="another prepared corpus with the same tokenizer")
    parser.add_argument("--baselines", action="store_true", help="also unigram tokens and xz on the same text")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--plugins", metavar="DIR", help="the folder of plug-ins that the model was trained with")
    sharing.configure(parser)


def main(args: argparse.Namespace, group: "Group") -> int:
    """Runs the command. Collective."""
    from mlm_mpi.train.trained import load, note, open_corpora

    mesh, on_node, plugins = sharing.mesh_of(args, group, copies=True), group.on_node(), Plugins()
    with group.together("the plug-ins"):
        plugins = named(args.plugins)
    trained = load(sharing.checkpoint_of(args, group), plugins, args.device, None, on_node, mesh)
    say = note if group.rank == 0 else _silent
    with group.together("opening the data"):
        corpora = open_corpora(trained, args.data, say)
        if args.baselines and len(corpora.catalogs) > 1:
            raise DataError("--baselines are of one corpus, the model was trained on several: give one by --data DIR")
        task = trained.task_over(corpora)
    numbers, own = _measured(trained, task)
    if group.rank == 0:
        _tell(args, trained, task, numbers | own, list(own))
    return 0


def _silent(text: str) -> None:
    """Rank 0 speaks for all."""


def _measured(trained: "Trained", task: "Task") -> tuple[dict[str, Any], dict[str, Any]]:
    """Every target of the held-out split: what all tasks have, and what this one says of it."""
    from mlm_mpi.monitor.live import Live, Plain, live
    from mlm_mpi.train.measure import measure

    rows = min(trained.config.eval.rows, max(1, _TOKENS_AT_ONCE // task.row_tokens))
    bar: Live = live("held-out") if trained.mesh.world.rank == 0 else Plain()

    def tell(done: int, total: int) -> None:
        bar.update(done, total, f"{done:,} of {total:,} micro-batches")

    try:
        sums = measure(trained.chain, task.samples("heldout"), rows, 0, trained.mesh, trained.place, tell)
    finally:
        bar.close()
    if sums is None:
        raise agreed(
            DataError(
                f"heldout has {task.tokens('heldout')} tokens, a target needs 2: "
                "prepare with a larger --heldout or more text"
            )
        )
    numbers: dict[str, Any] = {"step": trained.step, "weights": "average" if trained.averaged else "last"}
    numbers |= {"loss": sums.mean, "tokens": sums.targets}
    if sums.parts:
        numbers["loss_by_corpus"] = {name: part.mean for name, part in sums.parts.items()}
    return numbers, task.quality(sums)


def _tell(
    args: argparse.Namespace, trained: "Trained", task: "Task", numbers: dict[str, Any], own: list[str]
) -> None:  # fmt: skip
    from mlm_mpi.data import baselines
    from mlm_mpi.train.trained import open_corpora

    about = task.about()
    numbers |= {"catalog": about["catalog"], "trained_on": trained.manifest.catalog}
    if args.baselines:
        (catalog,), tokenizer = open_corpora(trained, args.data, _silent).catalogs, trained.tokenizer
        numbers["unigram_bits_per_character"] = baselines.unigram_bits_per_character(catalog, tokenizer.vocab_size)
        alone, after = baselines.xz_bits_per_character(catalog, tokenizer)
        numbers |= {"xz_bits_per_character": alone, "xz_after_training_bits_per_character": after}
    if args.json:
        import msgspec

        print(msgspec.json.encode(numbers).decode())
        return
    of = f"checkpoint of step {trained.step}" + (", moving average of its weights" if trained.averaged else "")
    if "bits_per_character" not in numbers:  # another task, with figures of its own
        print(f"held-out            {numbers['tokens']:,} targets; {of}")
        print(f"loss                {numbers['loss']:.4f} nats per target")
        for name in own:
            print(f"{name}  {numbers[name]:.4g}")
        return
    size = f"{numbers['tokens']:,} tokens, {numbers['characters']:,} characters"
    print(f"held-out text       {size}; {of}")
    print(f"loss                {numbers['loss']:.4f} nats per token, perplexity {numbers['perplexity']:.2f}")
    print(f"bits per character  {numbers['bits_per_character']:.3f}")
    for name, loss in numbers.get("loss_by_corpus", {}).items():
        print(f"  {name}  {loss:.4f} nats per token")
    if args.baselines:
        print(f"  unigram tokens    {numbers['unigram_bits_per_character']:.3f}")
        print(f"  xz -9e            {alone:.3f}; {after:.3f} with the training text in its window")
