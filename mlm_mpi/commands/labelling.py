"""`mlm-mpi prepare --label`, `--tags`, `--target`, `--aligned`, `--chat` and `--squad`: their arguments and report."""

import argparse
import math
import re
from pathlib import Path

from mlm_mpi.data import squad
from mlm_mpi.data.chats import FIELD, ChatColumns
from mlm_mpi.data.labelled import Cleaning
from mlm_mpi.data.labelling import Made, Recipe
from mlm_mpi.data.rows import Columns
from mlm_mpi.data.sides import NAMES, side_called
from mlm_mpi.data.template import ROLES
from mlm_mpi.data.words import WordColumns
from mlm_mpi.errors import ConfigError

HELDOUT, TEST = 0.1, 0.1  # what is cut where no sides are given
RATIO = 9.0  # as in Moses' clean-corpus-n, there of words
_MOST_LINES = 20  # labels
_WITH_SIDE = re.compile(rf"({'|'.join(map(re.escape, NAMES))})=(.+)", re.DOTALL)


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments that --label, --tags, --target, --chat and --squad bring with them."""
    group = parser.add_argument_group(
        "labelled texts and words, pairs of texts, dialogues, questions",
        "With --label or --target the inputs are tables: .csv, .tsv or .jsonl, also compressed.\n"
        "With --tags they have a word a line, its columns between tabs or blanks, and an empty line behind each\n"
        "sentence; or they are JSON lines with a list of words and one of their labels.\n"
        "With --chat they are JSON lines with a list of messages, each with a role (system, user, assistant) and a\n"
        "content; or with the messages, and a chosen and a rejected answer to them.\n"
        "With --squad they are JSON files as SQuAD's, or, with --builtin, questions made of the built-in text.\n"
        "train=FILE heldout=FILE test=FILE say on which side the rows of a file stand.",
    )
    add = group.add_argument
    add("--tags", action="store_true", help="each word has a label")
    add("--label", metavar="COLUMN", help="column with the label of each text, or of words (the last, or labels)")
    add("--target", metavar="COLUMN", help="column with what is to be made of each text, such as its translation")
    add(
        "--aligned", nargs=2, action="append", metavar=("SOURCE", "TARGET"),
        help="two text files instead of tables: what is to be made of a line is the other's line of that number",
    )  # fmt: skip
    add("--chat", action="store_true", help="each line is a dialogue, whose answers are learnt, or compared")
    add("--squad", action="store_true", help="questions whose answers stand in a text (SQuAD 1.1, 2.0)")
    add("--text", metavar="COLUMN", help="column with the text (text), words (1, or tokens) or messages (messages)")
    add("--pair", metavar="COLUMN", help="column with a second text, for tasks about two")
    add("--split", metavar="COLUMN", help="column that says train, heldout (or valid, dev) or test; otherwise cut here")
    add("--test", type=float, metavar="F", help="fraction of source strings kept for the last test (0.1)")
    add("--source", metavar="COLUMN", help="rows equal in this column stay on one side (the text)")
    add("--ratio", type=float, default=RATIO, metavar="N", help="leave out pairs of a text and one N times as long (9)")
    add("--hints", action="store_true", help="each text to translate has its translation word by word in front")
    add("--no-header", action="store_true", help="the files begin with a row; columns are called 1, 2, …")


def asked(args: argparse.Namespace) -> list[str]:
    """Which of the options is given that make the inputs rows instead of plain text; --label may come with --tags."""
    kinds = ("tags", "label", "target", "aligned", "chat", "squad")
    given = [f"--{name}" for name in kinds if getattr(args, name) not in (None, False)]
    return [option for option in given if option != "--label" or not args.tags]


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError for what these options do not go with, or what goes with them alone."""
    given = asked(args)
    if not given:
        for option in ("text", "pair", "split", "test", "source", "no_header"):
            if getattr(args, option) not in (None, False):
                name = option.replace("_", "-")
                raise ConfigError(f"--{name} is for labelled texts: give --label COLUMN or --tags too")
    elif len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} make different things of the inputs: leave one out")
    else:
        _check_rows(args, given[0])
    if given not in (["--target"], ["--aligned"]) and args.ratio != RATIO:
        raise ConfigError("--ratio is for pairs of texts: give --target COLUMN too")
    if given not in (["--target"], ["--aligned"]) and args.hints:
        raise ConfigError("--hints is for pairs of texts: give --target COLUMN too")


def _check_rows(args: argparse.Namespace, kind: str) -> None:
    """Raises ConfigError. `kind`: the option that makes rows of the inputs."""
    if args.squad:
        _check_squad(args)
    elif args.builtin:
        what = {"--label": "labels", "--tags": "labels", "--chat": "answers"}.get(kind, "targets")
        raise ConfigError(f"--builtin has no {what}: leave it out, or leave out {kind}")
    for option in ("pair", "split", "source", "no-header") if args.tags or args.chat else ():
        if getattr(args, option.replace("-", "_")) not in (None, False):
            of = "sentences" if args.tags else "dialogues"
            raise ConfigError(f"--{option} does not go with {kind}, {of} have none: leave it out")
    for option, default, instead in (
        ("field", "text", "--text names the column"), ("cut", "auto", "labelled texts are never cut"),
        ("plugins", None, "files are read as --help says"),
    ):  # fmt: skip
        if getattr(args, option) != default:
            raise ConfigError(f"--{option} does not go with {kind}, {instead}: leave it out")
    if kind != "--label" and args.pair is not None:
        raise ConfigError(f"--pair is a second text to tell a label of, and {kind} gives none: leave it out")
    if kind == "--aligned":
        _check_aligned(args)
    if not (args.ratio == 0 or 1 <= args.ratio < math.inf):
        raise ConfigError(f"--ratio {args.ratio:g} must be 1 or more, or 0 for pairs of any lengths")
    _columns(args).check()
    _check_sides(args)


def _check_squad(args: argparse.Namespace) -> None:
    """Raises ConfigError: files of questions have no columns, and answers are told back as they stand there."""
    for option in ("text", "pair", "split", "source", "no_header"):
        if getattr(args, option) not in (None, False):
            name = option.replace("_", "-")
            raise ConfigError(f"--{name} does not go with --squad, its files have no columns: leave it out")
    if args.tokenizer == "words":
        raise ConfigError("--tokenizer words loses what stands between words, also in an answer: give bpe or bytes")


def _check_aligned(args: argparse.Namespace) -> None:
    """Raises ConfigError: files of lines have no columns."""
    if args.inputs:
        raise ConfigError(f"--aligned files are all that is read, and {args.inputs[0]!r} is given too: leave it out")
    for option in ("text", "split", "source", "no_header"):
        if getattr(args, option) not in (None, False):
            raise ConfigError(f"--{option.replace('_', '-')} is of tables, and --aligned files are none: leave it out")


def _check_sides(args: argparse.Namespace) -> None:
    """Raises ConfigError."""
    named = [*_inputs(args), *((side, source) for side, source, _ in _aligned(args))]
    sides = [side for side, _ in named] or [None]
    if None in sides and set(sides) != {None}:
        other = next(text for side, text in named if side is None)
        raise ConfigError(
            f"some inputs have a side (train=FILE, heldout=FILE, test=FILE), and {other!r} has none: give it one"
        )
    if args.split is not None and sides[0] is not None:
        raise ConfigError(f"--split {args.split} and inputs with a side (train=FILE) say the same twice: leave one out")
    if args.split is None and sides[0] is not None and "train" not in sides:
        raise ConfigError("no input is train=FILE: give one, the rows that are learnt from")
    heldout, test = _fractions(args)
    if not 0 <= test < 1:
        raise ConfigError(f"--test {test} must be in [0, 1)")
    if heldout + test >= 1:
        raise ConfigError(
            f"--heldout {heldout} and --test {test} leave nothing to learn from: their sum must be below 1"
        )


def recipe(args: argparse.Namespace, command: str) -> Recipe:
    """What the arguments ask for. `command`: the command line to be written down."""
    return Recipe(
        _inputs(args), Path(args.out), _columns(args), args.tokenizer, args.vocab, *_fractions(args), args.encoding,
        args.shard_mib, args.seed, command, args.lowercase, _aligned(args), args.ratio, args.builtin,
        args.hints,
    )  # fmt: skip


def report(made: Made, args: argparse.Namespace, seconds: float) -> str:
    """What a person is told at the end."""
    manifest, found = made.manifest, made.manifest.cleaning
    kept = sum(map(sum, manifest.counts.values()))
    lengths, tokenizer = manifest.lengths, manifest.tokenizer
    trained = ", trained on the training side" if tokenizer.kind in ("bpe", "words") else ""
    lines = [
        *_read(made),
        *([f"skipped     {found.unlabelled:,} rows without a label, first: {made.firsts['unlabelled']}"]
          if found.unlabelled and manifest.labels else []),
        *([f"skipped     {found.out_of_ratio:,} pairs of a text and one over {args.ratio:g} times as long, first: "
           f"{made.firsts['out_of_ratio']}"] if found.out_of_ratio else []),
        f"repaired    {found.invalid_utf8:,} invalid UTF-8, {found.control_characters:,} control characters",
        *_warnings(found, made.firsts, manifest.has_pairs or args.source is not None or args.chat),
        *(_labels(made) if manifest.labels else []),
        f"lengths     median {lengths.median:,} tokens, 95 % at most {lengths.most:,}, longest {lengths.longest:,}",
        f"tokenizer   {tokenizer.kind}, vocabulary {tokenizer.vocab_size:,}{trained}",
        *([f"hints       by a dictionary of {len(manifest.hints):,} words of the training side"]
          if manifest.hints else []),
    ]  # fmt: skip
    what = {"words": "words", "dialogues": "dialogues", "preferences": "pairs"}.get(manifest.kind, "examples")
    for split, counts in manifest.counts.items():
        shards = [shard for shard in manifest.shards if shard.split == split]
        sentences = f"{sum(shard.documents for shard in shards):,} sentences, " if manifest.of_words else ""
        lines.append(
            f"{split:<12}{sentences}{sum(counts):,} {what} "
            f"({sum(counts) / kept:.1%}), {sum(shard.tokens for shard in shards):,} tokens, shards: {len(shards)}"
        )
    lines.append(f"split       {_how(made, args)}, digest {manifest.split[:12]}")
    if made.is_replaced:
        lines.append(f"replaced    the corpus that was in {args.out}")
    return "\n".join([*lines, f"{args.out} is ready after {seconds:.1f} s, content {manifest.content[:12]}"])


def _read(made: Made) -> list[str]:
    """What came in, and what of it was left out."""
    manifest, found = made.manifest, made.manifest.cleaning
    kept = sum(map(sum, manifest.counts.values()))
    if manifest.kind in ("dialogues", "preferences"):
        return _read_dialogues(found, made.firsts, kept)
    if manifest.kind == "questions":
        return _read_questions(found, made.firsts, kept)
    if not manifest.of_words:
        first = f", first: {made.firsts['unpaired']}" if found.unpaired else ""
        return [
            f"rows        {found.rows:,} read, {kept:,} kept",
            f"removed     {found.duplicates:,} exact duplicates (text and {'label' if manifest.labels else 'target'}), "
            f"{found.empty + found.unpaired:,} empty texts{first}",
        ]
    lost = f"; {found.empty:,} words are nothing but control characters" if found.empty else ""
    return [
        f"sentences   {found.rows:,} read, {kept:,} words{lost}",
        *([f"duplicates  {found.duplicates:,} sentences are there twice on a side, kept: {made.firsts['duplicates']}"]
          if found.duplicates else []),
    ]  # fmt: skip


_NO_CHOICE = {
    "one_sided": "dialogues with a chosen or a rejected answer alone", "undecided": "pairs of equal answers",
}  # fmt: skip


def _read_dialogues(found: Cleaning, firsts: dict[str, str], kept: int) -> list[str]:
    empty, odd = (f", first: {firsts[name]}" if name in firsts else "" for name in ("empty", "odd_roles"))
    return [
        f"dialogues   {found.rows:,} read, {kept:,} kept",
        f"removed     {found.duplicates:,} exact duplicates, {found.empty:,} with an empty message or no answer{empty}",
        *([f"skipped     {found.odd_roles:,} dialogues with a role other than {', '.join(ROLES)}, or with {ROLES[0]} "
           f"behind the first message{odd}"] if found.odd_roles else []),
        *([f"left out    {found.unanswered:,} messages behind the last answer of their dialogue"]
          if found.unanswered else []),
        *(f"{'skipped':<12}{getattr(found, name):,} {text}, first: {firsts[name]}"
          for name, text in _NO_CHOICE.items() if getattr(found, name)),
    ]  # fmt: skip


def _read_questions(found: Cleaning, firsts: dict[str, str], kept: int) -> list[str]:
    told = {
        "unlabelled": "questions without an answer that do not say so are left out",
        "unfound": "questions of which no answer stands in its text are left out",
        "lost": "answers stand nowhere in their text",
        "moved": "answers stand elsewhere than was said, the nearest place is taken",
        "widened": "answers begin or end inside a token, all of it is taken",
    }
    return [
        f"questions   {found.rows:,} read, {kept:,} kept, {found.impossible:,} have no answer on purpose",
        f"removed     {found.duplicates:,} exact duplicates, {found.unpaired:,} empty questions or texts",
        *(f"{'answers':<12}{getattr(found, name):,} {text}, first: {firsts[name]}"
          for name, text in told.items() if getattr(found, name)),
        *([f"ids         {found.same_ids:,} questions have the id of an earlier one, first: {firsts['same_ids']}"]
          if found.same_ids else []),
    ]  # fmt: skip


def _warnings(found: Cleaning, firsts: dict[str, str], has_sources: bool) -> list[str]:
    lines = []
    if found.conflicts:
        lines.append(f"conflicts   {found.conflicts:,} texts have several labels, all kept: {firsts['conflicts']}")
    if found.leaks:
        lines.append(f"leak        {found.leaks:,} texts stand on two sides, not moved: {firsts['leaks']}")
    if has_sources and found.leaking_sources:
        lines.append(
            f"leak        {found.leaking_sources:,} source strings stand on two sides, not moved: "
            f"{firsts['leaking_sources']}"
        )
    return lines


def _labels(made: Made) -> list[str]:
    """How many there are, and the count of each in each split, the frequent ones first."""
    labels, counts = made.manifest.labels, made.manifest.counts
    train = counts["train"]
    lines = [f"labels      {len(labels):,}, largest : smallest is {max(train) / min(train):.1f} : 1 in train"]
    order = sorted(range(len(labels)), key=lambda number: (-train[number], number))
    for number in order[:_MOST_LINES]:
        shown = ", ".join(f"{split} {counts[split][number]:,}" for split in counts)
        lines.append(f"  {labels[number]:<10}{shown}" if len(labels[number]) < 10 else f"  {labels[number]}  {shown}")
    if len(order) > _MOST_LINES:
        lines.append(f"  {len(order) - _MOST_LINES:,} more labels with at most {train[order[_MOST_LINES]]:,} in train")
    return lines


def _how(made: Made, args: argparse.Namespace) -> str:
    cut = [name for name in ("heldout", "test") if getattr(made.manifest, name)]
    if not cut:
        return "as given" if made.is_given else "all for training"
    by = "first user message" if args.chat else "context" if args.squad else "text"
    by = by if args.source is None else f"column {args.source!r}"
    whole = "as given, " if made.is_given else ""
    return f"{whole}{' and '.join(cut)} cut by {by} with seed {args.seed}"


def _columns(args: argparse.Namespace) -> Columns | WordColumns | ChatColumns | squad.Columns:
    if args.squad:
        return squad.Columns()
    if args.chat:
        return ChatColumns(FIELD if args.text is None else args.text)
    if args.tags:
        return WordColumns(args.text, args.label)
    text = "text" if args.text is None else args.text
    return Columns(text, args.pair, args.label, args.split, args.source, not args.no_header, args.target)


def _inputs(args: argparse.Namespace) -> tuple[tuple[str | None, str], ...]:
    """(side, file) of each input."""
    return tuple(map(_sided, args.inputs))


def _aligned(args: argparse.Namespace) -> tuple[tuple[str | None, str, str], ...]:
    """(side, file, file of its targets) of each pair; the side stands before the former."""
    return tuple((*_sided(source), target) for source, target in args.aligned or ())


def _sided(text: str) -> tuple[str | None, str]:
    match = _WITH_SIDE.fullmatch(text)
    return (side_called(match[1]), match[2]) if match else (None, text)


def _fractions(args: argparse.Namespace) -> tuple[float, float]:
    """(heldout, test): nothing is cut where sides are given, unless it is asked for."""
    is_given = args.split is not None or any(side for side, *_ in (*_inputs(args), *_aligned(args)))
    heldout, test = (0.0, 0.0) if is_given else (HELDOUT, TEST)
    return heldout if args.heldout is None else args.heldout, test if args.test is None else args.test
