"""`mlm-mpi prepare --label`: from a user's table to tokenised examples with labels, cut into train, heldout and test.
With `--tags` from sentences whose words have labels.

`prepare --target` and `--aligned` go the same way with pairs of texts, the second of which is to be made of the first,
`--chat` with dialogues, whose answers are to be learnt or compared, and `--squad` with questions, whose answers stand
in their contexts.

    gather   rows are read, cleaned, put on their side; what is empty, unlabelled or there twice is left out, counted
             (sentences that are there twice stay: published figures are of all of them)
    train    the tokenizer, from the training side
    shards   examples are tokenised and written into DIR/.staging
    publish  tokenizer, shards and catalog are put in place, an earlier corpus is removed

Rank 0 does all of it, tokenising on all cores that it may use, while the others wait. So the bytes are the same on any
number of ranks. A million texts of 15 words, 92 MB, take 190 s of CPU time and 1 GB of memory, where all texts lie.
"""

import hashlib
import math
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from mlm_mpi import __version__
from mlm_mpi.data import catalog, chats, labelled, rows, sources, squad, template, templates, words
from mlm_mpi.data.dictionary import BYTES_A_MEETING, Lexicon, hinted, meetings, translated
from mlm_mpi.data.labelled import MOST_LABELS, Cleaning, Lengths, Manifest
from mlm_mpi.data.prepare import PATIENCE_S, TRAINING_CHARACTERS, Ranks, Told
from mlm_mpi.data.shards import ShardEntry, write_shard
from mlm_mpi.data.sides import NAMES, SPLITS, side_called, side_of, split_digest
from mlm_mpi.data.staging import FOLDER, PREPARED, CorpusFolder, Prepared
from mlm_mpi.data.template import Message, Template
from mlm_mpi.data.tokenizer import MADE, Tokenizer, made
from mlm_mpi.data.tokenizing import bounds_of, characters_of, encode, encode_pairs, encode_words, tokens_of
from mlm_mpi.errors import DataError
from mlm_mpi.files import publish_all

_MIB = 1 << 20
_FOLDS = 10  # of the training pairs, whose hints come from the other nine
_Columns = rows.Columns | words.WordColumns | chats.ChatColumns | squad.Columns
_Row = rows.Row | words.Sentence | chats.Dialogue | squad.Question


@dataclass(frozen=True)
class Recipe:
    """What labelled texts are to be made of, and how; `mlm-mpi prepare --help` says what the values mean.

    `inputs`: (side or None, file, folder or glob). `heldout`, `test`: fractions, cut from the rows of no given side and
    from those that are given as training rows. `columns`: of texts with a label, of words with one each, of dialogues
    or of questions. `aligned`: (side or None, file, file whose lines belong to those of the former). `ratio`: of pairs
    one text may have so many times the characters of the other; 0: any. `hints`: of pairs the sources have their
    translation word by word in front.
    """

    inputs: tuple[tuple[str | None, str], ...]
    out: Path
    columns: _Columns
    tokenizer: str
    vocab: int
    heldout: float
    test: float
    encoding: str
    shard_mib: float
    seed: int
    command: str
    lowercase: bool
    aligned: tuple[tuple[str | None, str, str], ...] = ()
    ratio: float = 0.0
    has_builtin: bool = False  # questions over the built-in text, too
    hints: bool = False

    @property
    def of_pairs(self) -> bool:
        """Whether texts have targets instead of labels."""
        return bool(self.columns.target or self.aligned)

    @property
    def of_questions(self) -> bool:
        """Whether an example is a question and the text that its answer stands in."""
        return isinstance(self.columns, squad.Columns)

    @property
    def format(self) -> str:
        """That of the catalog."""
        if self.of_words:
            return labelled.TAGGED
        return labelled.CHATS if self.of_chats else labelled.ASKED if self.of_questions else labelled.FORMAT

    @property
    def has_labels(self) -> bool:
        """Whether texts or words have labels."""
        return not (self.of_pairs or self.of_questions or self.of_chats)

    @property
    def wanted(self) -> str:
        """What a text must have."""
        return "label" if self.has_labels else "target" if self.of_pairs else "answer"

    @property
    def has_seconds(self) -> bool:
        """Whether an example is two texts."""
        return self.of_pairs or self.of_questions or self.columns.pair is not None

    @property
    def of_words(self) -> bool:
        """Whether each word has a label."""
        return isinstance(self.columns, words.WordColumns)

    @property
    def of_chats(self) -> bool:
        """Whether rows are dialogues."""
        return isinstance(self.columns, chats.ChatColumns)


@dataclass(frozen=True)
class Made:
    """What there is to tell of labelled texts that are in their place.

    `firsts`: field of `Cleaning` -> where the first of its kind stands; `is_given`: sides came with the rows;
    `is_replaced`: an earlier corpus was in the folder.
    """

    manifest: Manifest
    firsts: dict[str, str]
    is_given: bool
    is_replaced: bool = False


@dataclass(frozen=True, slots=True)
class _Example:
    place: str
    text: str
    second: str
    labels: tuple[str, ...]
    side: str
    source: bytes  # SHA-256
    words: tuple[str, ...] = ()  # of the text, where each has a label
    messages: tuple[Message, ...] = ()  # of a dialogue
    rejected: str | None = None  # instead of its last answer
    answers: tuple[squad.Answer, ...] = ()  # in the second text
    hint: str | None = None


def prepare_labelled(recipe: Recipe, group: Ranks, told: Told) -> Made | None:
    """Prepares labelled texts in `recipe.out`; `told` hears how far it is. Gives what was made on rank 0, else None.

    Collective. Raises DataError or ConfigError on all ranks.
    """
    made = None
    with group.with_timeout(PATIENCE_S).together("preparing labelled texts"):
        if group.rank == 0:
            made = _prepare(recipe, told)
    return made


def _prepare(recipe: Recipe, told: Told) -> Made:
    if recipe.tokenizer not in MADE:
        given = Tokenizer.load(recipe.tokenizer)  # a bad one is told now
        if recipe.of_chats:
            Template(given)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # the other ranks only wait
    folder = CorpusFolder(recipe.out)
    try:
        made = _stage(recipe, told)
        files = [made.manifest.tokenizer.file, *(shard.file for shard in made.manifest.shards)]
        made = replace(made, is_replaced=folder.publish(files))
    except BaseException:
        folder.abandon()
        raise
    folder.close()
    return made


def _stage(recipe: Recipe, told: Told) -> Made:
    """What is staged."""
    staging = recipe.out / FOLDER
    found = _gather(recipe, told)
    labels, hints = found.labels(), found.give_hints() if recipe.hints else {}
    tokenizer = _tokenizer(recipe, [example for example in found.examples if example.side == "train"], told)
    shards, digests, lengths = _shards(recipe, found, labels, tokenizer, told)
    name = template.NAME if recipe.of_chats else ""
    form = labelled.PREFERRED if found.of_preferences else recipe.format
    names = (name,) if form == labelled.CHATS else (name, form) if form == labelled.PREFERRED else labels
    manifest = Manifest(
        format=form,
        content=labelled.content_digest(tokenizer.hash, names, digests),
        split=split_digest({split: (e.source for e in found.on(split)) for split in SPLITS}),
        tokenizer=catalog.TokenizerEntry(
            f"tokenizer-{tokenizer.hash[:8]}.json", tokenizer.hash,
            recipe.tokenizer if recipe.tokenizer in MADE else "file", tokenizer.vocab_size, tokenizer.eot,
        ),
        labels=labels,
        counts=_counts(found, labels),
        has_pairs=recipe.has_seconds,
        shards=tuple(shards),
        lengths=_summary(lengths),
        cleaning=found.cleaning(),
        seed=recipe.seed,
        heldout=recipe.heldout,
        test=recipe.test,
        template=name,
        hints=hints,
    )  # fmt: skip
    prepared = Prepared(recipe.command, platform.python_version(), __version__, manifest.content)
    publish_all([
        (staging / manifest.tokenizer.file, tokenizer.content),
        (staging / catalog.FILE_NAME, msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"),
        (staging / PREPARED, msgspec.json.format(msgspec.json.encode(prepared), indent=1) + b"\n"),
    ])  # fmt: skip
    return Made(manifest, found.firsts, bool(found.given))


class _Found:
    """Rows that become examples, in their order, and what was counted on the way."""

    def __init__(self, recipe: Recipe) -> None:
        self.examples: list[_Example] = []
        self.given: set[str] = set()  # sides that came with rows
        self.firsts: dict[str, str] = {}
        self._recipe = recipe
        self._counts: Counter[str] = Counter()
        self._kept: set[tuple[object, ...]] = set()
        self._labels: set[str] = set()
        self._texts: dict[tuple[str, str], _Example] = {}  # the first example of each
        self._sources: dict[bytes, _Example] = {}
        self._odd: dict[str, set[object]] = {"conflicts": set(), "leaks": set(), "leaking_sources": set()}

    def add(self, row: _Row, given: str | None) -> None:
        """`given`: the side that came with the row's file. Raises DataError for an unknown side, or too many labels."""
        self._counts["rows"] += 1
        if isinstance(row, words.Sentence):
            self._counts["empty"] += row.lost
        messages, rejected = (row.messages, row.rejected) if isinstance(row, chats.Dialogue) else ((), None)
        if isinstance(row, squad.Question):
            self._count_answers(row)
        self._counts["invalid_utf8"] += row.replaced
        self._counts["control_characters"] += row.controls
        given = self._given(row, given)
        if lacks := self._lacks(row):
            self._count(lacks, row.place)
            return
        source, recipe = row.source or row.text, self._recipe
        labels = row.labels if recipe.has_labels else ("",)
        side = side_of(source, recipe.seed, recipe.heldout, recipe.test) if given in (None, "train") else str(given)
        digest = hashlib.sha256(source.encode()).digest()
        example = _Example(
            row.place, row.text, row.second, labels, side, digest, row.words, messages, rejected, row.answers
        )  # fmt: skip
        key = (side, row.text, row.second, labels, row.answers)
        if key in self._kept:
            self._count("duplicates", row.place)
            if not recipe.of_words:
                return
        self._kept.add(key)
        self._counts["unanswered"] += row.unanswered if isinstance(row, chats.Dialogue) else 0
        self._labels.update(labels)
        if len(self._labels) > MOST_LABELS:
            raise DataError(
                f"{row.place} has label number {len(self._labels):,}, at most {MOST_LABELS:,} can be told apart: is "
                "--label the right column?"
            )
        self._compare(example)
        self.examples.append(example)

    @property
    def of_preferences(self) -> bool:
        """Whether an example has two last answers."""
        return self.examples[0].rejected is not None

    def on(self, side: str) -> list[_Example]:
        """The examples of a side."""
        return [example for example in self.examples if example.side == side]

    def check(self) -> None:
        """Raises DataError for what nothing can be learnt from or measured with."""
        if not self.examples and self._recipe.of_chats:
            odd = f"; {self._counts['odd_roles']:,} have odd roles" if self._counts["odd_roles"] else ""
            same = self._counts["one_sided"] + self._counts["undecided"]
            odd += f"; {same:,} have no two different answers to choose from" if same else ""
            raise DataError(
                f"no dialogue has an answer and no empty message{odd}: give others, whose roles are "
                f"{', '.join(template.ROLES)}"
            )
        if not self.examples and self._recipe.of_questions:
            raise DataError("no question has a text and an answer in it: give other files")
        if not self.examples:
            what = self._recipe.wanted
            long = f", or --ratio above {self._recipe.ratio:g}" if self._counts["out_of_ratio"] else ""
            raise DataError(
                f"no row has a text and a {what}: give other files, other columns with --text and --{what}{long}"
            )
        if len(self._labels) == 1 and self._recipe.has_labels:
            what = "words of all" if self._recipe.of_words else "all"
            raise DataError(
                f"{what} {len(self.examples):,} examples have the label {self.examples[0].labels[0]!r}, and two are "
                "needed to tell apart: give rows of another one, or another --label"
            )
        for side in ("heldout", "test"):
            if side in self.given and getattr(self._recipe, side):
                raise DataError(
                    f"--{side} {getattr(self._recipe, side)} would cut from the training rows what is given: "
                    f"rows of {side} are there, leave --{side} out"
                )
        self._check_answers()
        counts = Counter(example.side for example in self.examples)
        for side in SPLITS:
            wanted = side == "train" or side in self.given or getattr(self._recipe, side)
            if wanted and not counts[side]:
                raise DataError(self._lacking(side))
        self._check_labels()

    def give_hints(self) -> dict[str, str]:
        """Each example gets its hint; the dictionary of the training side. Raises DataError where that is empty.

        A training pair's is by a dictionary that has not seen it, nor what has its source string: otherwise a model
        would learn to trust hints more than it should.
        """
        train = self.on("train")
        pairs = [(example.text, example.second) for example in train]
        _check_lexicon(meetings(pairs))
        lexicon = Lexicon(pairs)
        whole = lexicon.without()
        if not whole:
            raise DataError("--hints: no pair on side train has words in both of its texts: leave --hints out")
        numbers = [example.source[0] * _FOLDS // 256 for example in train]
        others = [lexicon.without(np.array(numbers) == fold) for fold in range(_FOLDS)]
        of_train = iter(numbers)
        self.examples = [
            replace(one, hint=translated(one.text, others[next(of_train)] if one.side == "train" else whole))
            for one in self.examples
        ]
        return whole

    def labels(self) -> tuple[str, ...]:
        """All labels in order: whole numbers by their value, others by their characters."""
        if not self._recipe.has_labels:
            return ()
        if all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in self._labels):
            return tuple(sorted(self._labels, key=lambda label: (int(label), label)))
        return tuple(sorted(self._labels))

    def cleaning(self) -> Cleaning:
        odd = {name: len(found) for name, found in self._odd.items()}
        plain = ("rows", "empty", "unlabelled", "duplicates", "invalid_utf8", "control_characters")
        answers = ("odd_roles", "unanswered", "impossible", "unfound", "moved", "lost", "widened", "same_ids")
        ours = ("unpaired", "out_of_ratio", *answers, "one_sided", "undecided")
        return Cleaning(**odd, **{name: self._counts[name] for name in (*plain, *ours)})

    def _lacks(self, row: _Row) -> str:
        """Why a row becomes no example, a field of `Cleaning`; "" if it does."""
        if isinstance(row, chats.Dialogue):
            return next((name for name, is_so in _faults(row).items() if is_so), "")
        if self._recipe.of_pairs:
            if not (row.text and row.second):
                return "unpaired"
            lengths = sorted((len(row.text), len(row.second)))
            return "out_of_ratio" if 0 < self._recipe.ratio * lengths[0] < lengths[1] else ""
        if isinstance(row, squad.Question):
            if not (row.text and row.second):
                return "unpaired"
            return "" if row.answers or row.impossible else "unfound" if row.lost else "unlabelled"
        if not row.text:
            return "empty"
        return "" if row.labels else "unlabelled"

    def _count_answers(self, row: squad.Question) -> None:
        of_row = {"impossible": row.impossible, "moved": row.moved, "lost": row.lost, "same_ids": row.again}
        for what, count in of_row.items():
            self._counts[what] += count
            if count:
                self.firsts.setdefault(what, row.place)

    def count(self, what: str, place: str) -> None:
        """One more of what cleaning counts, a field of `Cleaning`."""
        self._count(what, place)

    def _count(self, what: str, place: str) -> None:
        self._counts[what] += 1
        self.firsts.setdefault(what, place)

    def _given(self, row: _Row, given: str | None) -> str | None:
        """The side that came with a row, or with its file."""
        column = self._recipe.columns.split
        if column is not None:
            given = side_called(row.split or "")
            if given is None:
                raise DataError(
                    f"{row.place} has {row.split or ''!r} in column {column!r}, which is no split: "
                    f"use {', '.join(NAMES)}"
                )
        if given is not None:
            self.given.add(given)
        return given

    def _compare(self, example: _Example) -> None:
        """With the first one of its text, and of its source string."""
        key = (example.text, example.second)
        first = self._texts.setdefault(key, example)
        if first.labels != example.labels:
            self._note("conflicts", key, first, example)
        if first.side != example.side:
            self._note("leaks", key, first, example)
        first = self._sources.setdefault(example.source, example)
        if first.side != example.side:
            self._note("leaking_sources", example.source, first, example)

    def _note(self, what: str, key: object, first: _Example, second: _Example) -> None:
        self._odd[what].add(key)
        self.firsts.setdefault(what, f"{first.place} and {second.place}")

    def _lacking(self, side: str) -> str:
        count = len(self._sources)
        if self.given and not getattr(self._recipe, side, 0.0):
            remedy = "give it some" if side == "train" else "give it some, or leave it out"
            what = "an answer" if self._recipe.of_chats else f"a text and a {self._recipe.wanted}"
            return f"split {side} has no row with {what}: {remedy}"
        share = {"train": "what --heldout and --test leave", "heldout": "--heldout", "test": "--test"}[side]
        size = getattr(self._recipe, side, 1 - self._recipe.heldout - self._recipe.test)
        return (
            f"split {side} has no example: {share} ({size:g}) of {count:,} different texts or sources is none: give "
            "more rows, another share, or another --seed"
        )

    def _check_answers(self) -> None:
        """Dialogues and preferences are learnt from by different losses."""
        first, kind = self.examples[0], self.of_preferences
        other = next((one for one in self.examples if (one.rejected is not None) != kind), None)
        if other is not None:
            with_two, without = (first, other) if kind else (other, first)
            raise DataError(
                f"{with_two.place} has a chosen and a rejected answer, {without.place} has none: prepare them into two "
                "folders"
            )

    def _check_labels(self) -> None:
        """A model that has never seen a label can only be wrong about it."""
        known = {label for example in self.examples if example.side == "train" for label in example.labels}
        unknown = [(label, example) for example in self.examples for label in example.labels if label not in known]
        if unknown:
            (label, first), others = unknown[0], len({label for label, _ in unknown}) - 1
            more = f" (and {others:,} more labels)" if others else ""
            remedy = "leave such rows out" if self.given else "give more rows of it, another --seed, or leave it out"
            raise DataError(
                f"label {label!r} of {first.place}, which is on side {first.side}, has no row on side "
                f"train{more}: {remedy}"
            )


def _check_lexicon(count: int) -> None:
    """Raises DataError where a dictionary of so many meetings does not fit this machine."""
    needs, has = BYTES_A_MEETING * count, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needs > has:
        raise DataError(
            f"--hints: words of the training pairs meet {count:,} times, which takes {needs / 1e9:.0f} GB of memory, "
            f"and this machine has {has / 1e9:.0f}: leave long texts out, or --hints"
        )


def _faults(row: chats.Dialogue) -> dict[str, bool]:
    """Why a dialogue becomes no example, the fields of `Cleaning`; the first counts."""
    return {
        "one_sided": row.one_sided, "odd_roles": row.is_odd, "empty": row.is_empty or row.rejected == "",
        "undecided": row.undecided,
    }  # fmt: skip


def _tables(recipe: Recipe) -> list[tuple[str | None, tuple[Path, ...]]]:
    """(side or None, a table or two aligned files) of all that is read. Raises DataError where nothing is."""
    named: list[tuple[str | None, tuple[Path, ...]]]
    named = [(side, (path,)) for side, text in recipe.inputs for path in sources.files([text], recipe.out)]
    named += [(side, (Path(source), Path(target))) for side, source, target in recipe.aligned]
    if recipe.has_builtin:
        named.append((None, ()))
    if not named:
        texts = ", ".join(repr(text) for _, text in recipe.inputs[:3])
        raise DataError(f"no file in {texts} (hidden ones, corpora and --out are no input): give other files")
    return list(dict.fromkeys(named))


def _gather(recipe: Recipe, told: Told) -> _Found:
    tables = _tables(recipe)
    found, done = _Found(recipe), 0
    total = sum(path.stat().st_size for _, paths in tables for path in paths if path.is_file())

    def heard(size: int) -> None:
        nonlocal done
        done = min(done + size, total)  # a format may look at a beginning twice
        told("cleaning", done, total)

    for side, paths in tables:
        for row in _rows(paths, recipe, heard):
            found.add(row, side)
    found.check()
    return found


def _rows(
    paths: tuple[Path, ...], recipe: Recipe, heard: Callable[[int], None]
) -> Iterator[_Row]:  # fmt: skip
    """What may become an example, of a table, of two aligned files, or, without any, of the built-in text."""
    if not paths:
        yield from templates.questions(recipe.seed)
        return
    if isinstance(recipe.columns, squad.Columns):
        yield from squad.read(paths[0], recipe.encoding, heard)
        return
    if len(paths) == 2:
        yield from rows.aligned(paths[0], paths[1], recipe.encoding, heard)
        return
    if isinstance(recipe.columns, chats.ChatColumns):
        yield from chats.read(paths[0], recipe.columns, recipe.encoding, heard)
        return
    if not isinstance(recipe.columns, words.WordColumns):
        yield from rows.read(paths[0], recipe.columns, recipe.encoding, heard)
        return
    for sentence in words.read(paths[0], recipe.columns, recipe.encoding, heard):
        if sentence.words not in ((), (words.DOCUMENT,)):
            yield sentence


def _counts(found: _Found, labels: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Split -> examples of each label, or words; of all examples where there are no labels."""
    counts = Counter((example.side, label) for example in found.examples for label in example.labels)
    each = labels or ("",)
    sides = [split for split in SPLITS if any(counts[split, label] for label in each)]
    return {split: tuple(counts[split, label] for label in each) for split in sides}


def _tokenizer(recipe: Recipe, training: Sequence[_Example], told: Told) -> Tokenizer:
    total = sum(len(example.text) + len(example.second) for example in training)
    every = -(-total // TRAINING_CHARACTERS)

    def texts() -> Iterator[str]:
        if recipe.of_chats:
            yield from 2 * [template.header(role) for role in template.ROLES]  # a word that comes up once is unknown
        done = 0
        for example in training[::every]:
            told("tokenizer", done, total)
            done += every * (len(example.text) + len(example.second))
            yield from filter(None, (example.text, example.second))
        told("tokenizer", total, total)

    return made(recipe.tokenizer, texts(), recipe.vocab, recipe.lowercase)


def _shards(
    recipe: Recipe, found: _Found, labels: tuple[str, ...], tokenizer: Tokenizer, told: Told
) -> tuple[list[ShardEntry], dict[str, list[bytes]], list[int]]:  # fmt: skip
    """(entries, digests of the examples of each split, tokens of all examples)."""
    stored: Callable[..., _Stored] = _stored_texts
    if recipe.of_words:
        stored = _stored_words
    elif recipe.of_chats:
        stored = _stored_preferences if found.of_preferences else _stored_dialogues
    elif recipe.of_questions:
        stored = partial(_stored_questions, heard=found.count)
    entries: list[ShardEntry] = []
    digests: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    lengths: list[int] = []
    parts = [(split, number, part) for split in SPLITS for number, part in enumerate(_parts(recipe, found, split))]
    for done, (split, number, part) in enumerate(parts):
        told("shards", done, len(parts))
        ids, found_digests, extra = stored(part, labels, tokenizer, recipe.has_seconds)
        digests[split] += found_digests
        lengths += extra["columns"]["answers"].tolist() if recipe.of_questions else map(len, ids)
        entries.append(
            write_shard(
                recipe.out / FOLDER, f"{split}-{number:05d}", split, ids,
                sum(len(example.text) + len(example.second) for example in part), sum(map(_size, part)),
                tokenizer.hash, tokenizer.vocab_size, **extra,
            )
        )  # fmt: skip
    return entries, digests, lengths


# ids of each example, their digests, what else a shard holds: "columns" or "marks"
_Stored = tuple[list[np.ndarray], list[bytes], dict[str, dict[str, np.ndarray]]]


def _stored_texts(part: Sequence[_Example], labels: tuple[str, ...], tokenizer: Tokenizer, pairs: bool) -> _Stored:
    numbers = {label: number for number, label in enumerate(labels or ("",))}
    ids, seconds = _encoded(part, tokenizer, of_pairs=not labels)
    targets = [numbers[example.labels[0]] for example in part]
    values, kinds = {"labels": targets, "seconds": seconds}, labelled.column_types(len(labels), pairs)
    columns = {name: np.array(values[name], kinds[name]) for name in kinds}
    return ids, list(map(labelled.example_digest, ids, seconds, targets)), {"columns": columns}


def _stored_words(part: Sequence[_Example], labels: tuple[str, ...], tokenizer: Tokenizer, pairs: bool) -> _Stored:
    numbers = {label: number + 1 for number, label in enumerate(labels)}
    every, tags = [], []
    found = encode_words(tokenizer, [example.words for example in part])
    for example, (ids, begins) in zip(part, found, strict=True):
        if not len(ids):
            raise _no_token(example)
        targets = np.array([numbers[label] for label in example.labels])
        every.append(ids)
        tags.append(np.zeros(len(ids), labelled.tag_type(len(labels))))
        tags[-1][begins[begins >= 0]] = targets[begins >= 0]
    return every, list(map(labelled.sentence_digest, every, tags)), {"marks": {"tags": np.concatenate(tags)}}


def _stored_preferences(
    part: Sequence[_Example], labels: tuple[str, ...], tokenizer: Tokenizer, pairs: bool
) -> _Stored:
    """Two documents an example; of the answers the last one alone is marked."""
    said = ((*one.messages[:-1], Message(template.ANSWERS, answer)) for one in part for answer in _answers(one))
    every, marked = [], []
    for ids, answers in Template(tokenizer).encode(said):
        every.append(ids)
        marked.append(np.arange(len(ids)) > np.flatnonzero(~answers)[-1])
    marks = {name: np.concatenate(marked).astype(kind) for name, kind in labelled.ANSWERS.items()}
    return every, list(map(labelled.sentence_digest, every, marked)), {"marks": marks}


def _answers(example: _Example) -> tuple[str, str]:
    """The chosen one and the rejected one."""
    assert example.rejected is not None
    return example.messages[-1].content, example.rejected


def _stored_dialogues(part: Sequence[_Example], labels: tuple[str, ...], tokenizer: Tokenizer, pairs: bool) -> _Stored:
    found = list(Template(tokenizer).encode(example.messages for example in part))
    every, answers = ([one[place] for one in found] for place in range(2))
    marks = {name: np.concatenate(answers).astype(kind) for name, kind in labelled.ANSWERS.items()}
    return every, list(map(labelled.sentence_digest, every, answers)), {"marks": marks}


def _stored_questions(
    part: Sequence[_Example], labels: tuple[str, ...], tokenizer: Tokenizer, pairs: bool,
    heard: Callable[[str, str], None],
) -> _Stored:  # fmt: skip
    """`heard` is told of answers that tokens hold with something beside it. Raises DataError for a tokenizer whose
    tokens are not the text."""
    every, table = [], []
    ids, seconds = _encoded(part, tokenizer, of_pairs=True)
    texts = encode(tokenizer, (answer.text for example in part for answer in example.answers))
    for example, tokens, second in zip(part, ids, seconds, strict=True):
        bounds = bounds_of(tokenizer, tokens[second:], example.second)
        if bounds is None:
            raise DataError(
                f"the tokenizer loses some of the text of {example.place}, whose answer could not be told back: give "
                "--tokenizer bpe, bytes, or another file"
            )
        first = example.answers[0] if example.answers else squad.Answer(0, "")
        characters = first.start, first.start + len(first.text)
        span = tokens_of(example.second, bounds, *characters)
        if first.text and characters_of(example.second, bounds, *span) != characters:
            heard("widened", example.place)
        every.append(np.concatenate([tokens, *(next(texts) for _ in example.answers)]))
        table.append((second, len(tokens), *span))
    digests = list(map(labelled.question_digest, every, table))
    columns = zip(labelled.QUESTION_TYPES.items(), np.array(table).T, strict=True)
    return every, digests, {"columns": {name: values.astype(kind) for (name, kind), values in columns}}


def _parts(recipe: Recipe, found: _Found, split: str) -> Iterator[list[_Example]]:
    """Runs of a split's examples with at most so much text as a shard is to hold, one example at least."""
    whole = sum(map(_size, found.examples))
    limit = math.ceil(recipe.shard_mib * _MIB) or min(max(whole // 16, _MIB // 4), 64 * _MIB)
    part: list[_Example] = []
    size = 0
    for example in found.on(split):
        more = _size(example)
        if part and size + more > limit:
            yield part
            part, size = [], 0
        part.append(example)
        size += more
    if part:
        yield part


def _size(example: _Example) -> int:
    """Bytes of its texts in UTF-8."""
    return len(example.text.encode()) + len(example.second.encode())


def _encoded(part: Sequence[_Example], tokenizer: Tokenizer, of_pairs: bool) -> tuple[list[np.ndarray], list[int]]:
    """(ids of each example, where its second text begins). Raises DataError for a text without tokens."""
    ids, seconds = [], []
    hints = [example.hint for example in part if example.hint is not None]
    if hints:
        sources = list(hinted(tokenizer, (example.text for example in part), hints))
        targets = [found[:-1] for found in encode(tokenizer, (example.second for example in part))]
        for example, source, target in zip(part, sources, targets, strict=True):
            if not len(source) or not len(target):
                raise _no_token(example)
        return list(map(np.concatenate, zip(sources, targets, strict=True))), list(map(len, sources))
    found = encode_pairs(tokenizer, ((example.text, example.second) for example in part))
    for example, (tokens, second) in zip(part, found, strict=True):
        if not len(tokens) or (of_pairs and not 0 < second < len(tokens)):
            raise _no_token(example)
        ids.append(tokens)
        seconds.append(second)
    return ids, seconds


def _no_token(example: _Example) -> DataError:
    return DataError(f"the tokenizer makes no token of the text of {example.place}: give another --tokenizer")


def _summary(lengths: Sequence[int]) -> Lengths:
    ordered = sorted(lengths)
    return Lengths(ordered[(len(ordered) - 1) // 2], ordered[math.ceil(0.95 * len(ordered)) - 1], ordered[-1])
