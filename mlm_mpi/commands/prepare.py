"""`mlm-mpi prepare`: from text to a corpus that a training can read. Alone it needs no MPI."""

import argparse
import os
import platform
import shlex
import time
from collections.abc import Callable
from pathlib import Path

from mlm_mpi.commands import labelling
from mlm_mpi.data import builtin
from mlm_mpi.data.decoding import check_encoding
from mlm_mpi.data.labelling import prepare_labelled
from mlm_mpi.data.prepare import Made, Ranks, Recipe, Told, prepare
from mlm_mpi.data.tokenizer import FEWEST_WORDS, MADE, SMALLEST_VOCABULARY
from mlm_mpi.errors import ConfigError
from mlm_mpi.monitor.live import Live, live

_LARGEST_VOCABULARY = 1 << 20  # BPE reserves memory for all of it; four times the largest one published
_LARGEST_SHARD_MIB = 1 << 12  # a shard is made in memory

_HELDOUT = 0.05
_MOST_CUTS = 5  # lines
_MIB = 1 << 20
_EXAMPLES = """examples:
  mlm-mpi prepare novel.txt --out corpora/novel
  mlm-mpi prepare texts/ 'more/*.jsonl.zst' --out corpora/mine --vocab 8192
  mlm-mpi prepare texts/ --out corpora/words --tokenizer words --lowercase --vocab 20000    # for word vectors
  mlm-mpi run -n 4 -- prepare texts/ --out corpora/mine --heldout 0.01
  mlm-mpi prepare reviews.csv --out corpora/reviews --text review --label stars
  mlm-mpi prepare train=eng.train heldout=eng.testa test=eng.testb --out corpora/names --tags
  mlm-mpi prepare pairs.tsv --out corpora/enfr --text english --target french
  mlm-mpi prepare --aligned texts.en texts.fr --out corpora/enfr
  mlm-mpi prepare talks.jsonl --out corpora/talks --chat
  mlm-mpi prepare train=train-v1.1.json heldout=dev-v1.1.json --out corpora/squad --squad
  mlm-mpi prepare --builtin --squad --out corpora/questions"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi prepare`."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _EXAMPLES
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="text file, folder, 'glob' in quotes, .jsonl; .gz .xz .bz2 .zst too")
    add("--out", metavar="DIR", help="folder of the corpus (required): new, empty, or of an earlier corpus")
    add("--builtin", action="store_true", help="add documentation that every Python from 3.11 on ships")
    add("--tokenizer", default="bpe", metavar="bytes|bpe|words|FILE", help="FILE: a tokenizer.json (bpe)")
    add("--vocab", type=int, default=2048, metavar="N", help="tokens of a vocabulary of BPE or words, at most (2048)")
    add("--lowercase", action="store_true", help="of --tokenizer words: the same word with capitals or without")
    add(
        "--heldout", type=float, metavar="F",
        help="fraction of characters kept for evaluation (0.05); of source strings with --label and its like (0.1)",
    )  # fmt: skip
    add(
        "--cut", choices=("auto", "never", "always"), default="auto",
        help="cut long texts into documents, their tails held out (auto: those that are too long to hold out whole)",
    )  # fmt: skip
    add("--field", default="text", metavar="NAME", help="field of a JSON line that holds its text (text)")
    add("--encoding", default="utf-8", metavar="NAME", help="of files without a byte-order mark (utf-8)")
    add("--shard-mib", type=float, default=0.0, metavar="MIB", help="text per shard (0: a 16th, within 1/4 and 64)")
    add("--seed", type=int, default=0, metavar="N", help="decides which documents are held out (0)")
    add("--plugins", metavar="DIR", help="folder of your own Python: formats/*.py read the files with their SUFFIXES")
    labelling.configure(parser)


def main(args: argparse.Namespace, group: Ranks) -> int:
    """Runs the command. Collective."""
    begin = time.perf_counter()
    with group.together("checking the command line"):
        _check(args)
    shown = _Shown()
    try:
        say = _made(args, group, shown.told if group.rank == 0 else _untold)
    finally:
        shown.close()
    if group.rank == 0:
        print(say(time.perf_counter() - begin), flush=True)
    return 0


def _made(args: argparse.Namespace, group: Ranks, told: Told) -> Callable[[float], str]:
    """Makes what is asked for; gives what makes rank 0's report from the seconds that it took."""
    if not labelling.asked(args):
        plain = prepare(_recipe(args), group, told)
        return lambda seconds: _report(plain, args.out, args.field, seconds)
    made = prepare_labelled(labelling.recipe(args, _command(args)), group, told)
    return lambda seconds: labelling.report(made, args, seconds) if made else ""


class _Shown:
    """How far rank 0 is, in a terminal."""

    def __init__(self) -> None:
        self._phase = ""
        self._live: Live | None = None

    def told(self, phase: str, done: float, total: float) -> None:
        """Shows `done` out of `total` of a phase; a new phase takes the place of the one before."""
        if self._live is None or phase != self._phase:
            self.close()
            self._phase, self._live = phase, live(phase)
        if self._live.drawn:
            self._live.update(done, total, _amount(phase, done, total))

    def close(self) -> None:
        if self._live is not None:
            self._live.close()
            self._live = None


def _amount(phase: str, done: float, total: float) -> str:
    if phase == "shards":
        return f"{done:,.0f} of {total:,.0f}"
    if phase == "tokenizer" and done >= total:
        return "merging"
    if phase == "cleaning":
        unit, size = ("MiB", _MIB) if total >= _MIB else ("KiB", 1 << 10)
        return f"{done / size:,.1f} of {total / size:,.1f} {unit}"
    return f"{done / 1e6:,.1f} of {total / 1e6:,.1f} million characters"


def _untold(phase: str, done: float, total: float) -> None:
    """Rank 0 shows its own share."""


def _check(args: argparse.Namespace) -> None:
    if args.out is None:
        raise ConfigError("prepare needs --out DIR, the folder that the corpus is written to: --out corpora/mine")
    if not args.out:
        raise ConfigError("--out '' names no folder: give one")
    if not args.inputs and not args.builtin and not args.aligned:
        raise ConfigError("prepare has no input: give files, folders or globs, or --builtin")
    if not args.field:
        raise ConfigError("--field '' names no field: give the one that holds the text")
    if args.heldout is not None and not 0 <= args.heldout < 1:
        hint = f": {args.heldout:g} % is {args.heldout / 100:g}" if 1 <= args.heldout < 100 else ""
        raise ConfigError(f"--heldout {args.heldout} must be in [0, 1){hint}")
    if not 0 <= args.shard_mib <= _LARGEST_SHARD_MIB:
        raise ConfigError(f"--shard-mib {args.shard_mib} must be in [0, {_LARGEST_SHARD_MIB}]")
    if not 0 <= args.seed < 1 << 63:
        raise ConfigError(f"--seed {args.seed} must be in [0, {(1 << 63) - 1}]")
    least = {"bpe": SMALLEST_VOCABULARY, "words": FEWEST_WORDS}.get(args.tokenizer)
    if least is not None and not least <= args.vocab <= _LARGEST_VOCABULARY:
        raise ConfigError(f"--vocab {args.vocab} must be in [{least}, {_LARGEST_VOCABULARY}]")
    if args.lowercase and args.tokenizer != "words":
        raise ConfigError(f"--lowercase is of --tokenizer words, not {args.tokenizer}: leave it out")
    if args.tokenizer not in MADE and not os.access(args.tokenizer, os.F_OK):
        raise ConfigError(
            f"--tokenizer {args.tokenizer!r} is no file: give bpe, bytes, words, or the path of a tokenizer.json"
        )
    check_encoding(args.encoding)
    labelling.check(args)


def _recipe(args: argparse.Namespace) -> Recipe:
    return Recipe(
        tuple(args.inputs), Path(args.out), args.builtin, args.tokenizer, args.vocab, _heldout(args), args.cut,
        args.field, args.encoding, args.shard_mib, args.seed, args.plugins, _command(args), args.lowercase,
    )  # fmt: skip


def _heldout(args: argparse.Namespace) -> float:
    return _HELDOUT if args.heldout is None else float(args.heldout)


def _command(args: argparse.Namespace) -> str:
    """The command line that prepares the same corpus, options with their default left out."""
    parser = argparse.ArgumentParser()
    configure(parser)
    parser.set_defaults(heldout=None if args.heldout is None or labelling.asked(args) else _HELDOUT)
    words = ["mlm-mpi", "prepare", *(f"./{text}" if text.startswith("-") else text for text in args.inputs)]
    flags = ("builtin", "lowercase", "no-header", "tags", "chat", "squad", "hints")
    words += [f"--{flag}" for flag in flags if getattr(args, flag.replace("-", "_"))]
    plain = ("out", "tokenizer", "vocab", "heldout", "cut", "field", "encoding", "shard_mib", "seed", "plugins")
    words += [word for pair in args.aligned or () for word in ("--aligned", *pair)]
    for name in (*plain, "label", "target", "text", "pair", "split", "test", "source", "ratio"):
        value = getattr(args, name)
        if value != parser.get_default(name):
            flag = "--" + name.replace("_", "-")
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return os.fsencode(shlex.join(words)).decode(errors="replace")


def _cuts(made: Made) -> list[str]:
    """What became of long texts: a line for each source, a last one for those that are too many."""
    lines = []
    for name, cut in made.cuts[:_MOST_CUTS]:
        lines.append(f"cut         {f'{cut.texts:,} texts of ' if cut.texts > 1 else ''}{name} {cut}")
    more = [cut for _, cut in made.cuts[_MOST_CUTS:]]
    if more:
        documents, held = sum(cut.documents for cut in more), sum(cut.held for cut in more)
        lines.append(f"cut         {len(more):,} more files into {documents:,} documents, {held:,} of them held out")
    return lines


def _report(made: Made, out: str, field: str, seconds: float) -> str:
    cleaning, totals, tokenizer = made.manifest.cleaning, made.manifest.totals, made.manifest.tokenizer
    skipped, place = made.skipped
    kept = sum(part.documents for part in totals.values())
    characters = sum(part.characters for part in totals.values())
    lines = [
        f"documents   {cleaning.documents:,} read, {kept:,} kept, {characters:,} characters",
        *_cuts(made),
        f"removed     {cleaning.duplicates:,} exact duplicates, {cleaning.empty:,} empty documents",
        *([f"skipped     {skipped:,} lines without text in field {field!r}, first: {place}"] if skipped else []),
        f"repaired    {cleaning.invalid_utf8:,} invalid UTF-8, {cleaning.control_characters:,} control characters",
        f"similar     {cleaning.near_documents:,} documents in {cleaning.near_clusters:,} near-duplicate clusters",
        f"tokenizer   {tokenizer.kind}, vocabulary {tokenizer.vocab_size:,}",
    ]
    for split, part in totals.items():
        ratio = part.characters / part.tokens if part.tokens else 0.0
        lines.append(
            f"{split:<12}{part.tokens:,} tokens, {part.documents:,} documents, {part.characters:,} characters "
            f"({part.characters / characters:.1%}), {ratio:.2f} characters per token, shards: {part.shards}"
        )
    if made.missing:
        lines.append(
            f"built-in    {made.missing:,} of {builtin.count():,} documents are not in Python "
            f"{platform.python_version()}: hashes cannot be compared with those of other Pythons"
        )
    if made.is_replaced:
        lines.append(f"replaced    the corpus that was in {out}")
    return "\n".join([*lines, f"{out} is ready after {seconds:.1f} s, content {made.manifest.content[:12]}"])
