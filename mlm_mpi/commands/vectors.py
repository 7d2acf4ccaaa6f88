"""`mlm-mpi vectors RUN|FILE [WORD …]`: which words lie near others, analogies, and vectors for other programs."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_mpi.errors import ConfigError
from mlm_mpi.plug import named

if TYPE_CHECKING:  # --help and completion need no NumPy
    from mlm_mpi.formats.vectors import Vectors
    from mlm_mpi.wordspace import Score

_EXAMPLES = """examples:
  mlm-mpi vectors runs/words list tuple --top 5
  mlm-mpi vectors runs/words --analogies questions-words.txt
  mlm-mpi vectors runs/words --export words.vec
  mlm-mpi vectors glove.6B.100d.txt.gz king --limit 50000 --json"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi vectors`."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "source", metavar="RUN|FILE", help="run folder of a training, one of its checkpoints, or a file of word vectors"
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="words whose neighbours are shown")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="this many neighbours of a word (default 10)")
    parser.add_argument("--analogies", metavar="FILE", help="lines of four words, sections as `: name`: how many hold")
    parser.add_argument("--export", metavar="FILE", help="write the vectors as word2vec's text (.vec)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="the first N words only (default 0: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--plugins", metavar="DIR", help="the folder of plug-ins that the model was trained with")


def main(args: argparse.Namespace) -> int:
    """Runs the command."""
    _check(args)
    from mlm_mpi.formats import vectors
    from mlm_mpi.wordspace import WordSpace, questions

    found = _vectors(args)
    if args.export is not None:
        vectors.write(Path(args.export), found)
    space = WordSpace(found.words, found.rows)
    told: dict[str, Any] = {"words": len(found.words), "width": found.rows.shape[1]}
    near = {word: space.near(word, args.top) for word in args.words}
    scores = space.answer(questions(Path(args.analogies))) if args.analogies else []
    if args.json:
        import msgspec

        told |= {"neighbours": near, "analogies": [vars(score) for score in scores], "exported": args.export}
        print(msgspec.json.encode(told).decode())
        return 0
    print(f"{told['words']:,} words, vectors of {told['width']} numbers")
    for word, others in near.items():
        print("\n".join([word, *(f"  {cosine:6.3f}  {other}" for other, cosine in others)]))
    print("\n".join(_lines(scores)), end="\n" * bool(scores))
    if args.export is not None:
        print(f"written to {args.export}")
    return 0


def _check(args: argparse.Namespace) -> None:
    if not args.source:
        raise ConfigError("RUN|FILE is empty: give a run folder or a file of word vectors")
    for name in ("analogies", "export"):
        if getattr(args, name) == "":
            raise ConfigError(f"--{name} '' names no file: give one")
    if args.top < 1:
        raise ConfigError(f"--top {args.top} must be at least 1")
    if args.limit < 0:
        raise ConfigError(f"--limit {args.limit} must not be negative (0: all words)")
    if not (args.words or args.analogies or args.export):
        raise ConfigError("vectors has nothing to do: give words, --analogies FILE or --export FILE")


def _vectors(args: argparse.Namespace) -> "Vectors":
    """Those of a file, or of the tokens of a trained model that stand for whole words."""
    from mlm_mpi.formats.vectors import Vectors, read

    path = Path(args.source)
    if not path.is_dir():
        found = read(path, args.limit)
        if found.repeated:
            print(f"note: {found.repeated:,} words come again in {path}: the first of each counts", file=sys.stderr)
        return found
    words, rows = _trained(args)
    return Vectors(words[: args.limit or None], rows[: args.limit or None])


def _trained(args: argparse.Namespace) -> tuple[list[str], Any]:
    from mlm_mpi.backend.arrays import to_host, wide
    from mlm_mpi.formats.vectors import tokens_by_word
    from mlm_mpi.train.trained import load

    trained = load(args.source, named(args.plugins), "cpu")
    vocabulary = trained.tokenizer.vocab_size
    tables = [p for p in trained.chain.parts[0].parameters() if p.layout.shape[:-1] == (vocabulary,)]
    if not tables:
        raise ConfigError(f"the first part of the model in {args.source} has no table of tokens: give another RUN")
    found = tokens_by_word(trained.tokenizer)
    return list(found), wide(to_host(tables[0].data))[list(found.values())]


def _lines(scores: "list[Score]") -> list[str]:
    """A line for each section, and one for all."""
    if not scores:
        return []
    from mlm_mpi.wordspace import Score

    total = Score("all of them", *(sum(getattr(s, what) for s in scores) for what in ("asked", "right", "unknown")))
    width = max(len(score.name) for score in [*scores, total])
    return [
        f"{score.name:<{width}}  {score.right:,} of {score.asked:,} right"
        + (f" ({score.right / score.asked:.1%})" if score.asked else "")
        + (f", {score.unknown:,} with unknown words" if score.unknown else "")
        for score in [*scores, total]
    ]
