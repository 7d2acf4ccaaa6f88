"""Labelled texts, or texts of labelled words, as `mlm-mpi prepare --label` or `--tags` has stored them: a folder, its
catalog, and the examples of a split.

Pairs of `--target` are stored likewise: they have no labels, and the second text of each is to be made of the first.
So are dialogues of `--chat`: each is a document, its messages ended by ends of text (`template`). Of preferences an
example is two of them, one behind the other, which differ in their last answer: the chosen one first.

/tokens, /offsets  as in every shard (`shards`), a document being an example: its text, then the second one of a
                   pair, or a sentence, without an end of text
/labels   (examples,)  smallest unsigned type that holds the number of labels; not of pairs without any
/seconds  (examples,)  uint32, of pairs alone: where the second text begins among the example's tokens, 0: none
/answers, /starts, /stops  (examples,)  uint32, of questions alone, which have no labels: an example is a question, its
                       context (`seconds`) and its answers' texts, each with an end of text, which begin at `answers`;
                       the first one is tokens starts … stops − 1 of the context, 0 and 0 where there is none
/tags     (tokens,)    of labelled words, which have neither of these: at the first token of a word its label's number
                       and 1, elsewhere 0; smallest unsigned type that holds the number of labels
/answers  (tokens,)    uint8, of dialogues, which have none of these: 1 where a token is of an answer, else 0; of
                       preferences of the last answer alone
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from mlm_mpi.data import catalog, template
from mlm_mpi.data.catalog import (
    AGAIN,
    CATALOG_BYTES,
    FILE_NAME,
    MOST_TOKENS,
    PLAIN_NAME,
    SHA256,
    TokenizerEntry,
    oddities_of,
    tokenizer_of,
)  # fmt: skip
from mlm_mpi.data.dialogues import Dialogues
from mlm_mpi.data.questions import Questions
from mlm_mpi.data.rows import LONGEST_LABEL, NO_LABEL
from mlm_mpi.data.sentences import Sentences
from mlm_mpi.data.shards import ShardEntry, ShardReader, check_size, most_bytes
from mlm_mpi.data.sides import SPLITS
from mlm_mpi.data.tokenizer import LARGEST_VOCABULARY, Tokenizer
from mlm_mpi.errors import DataError
from mlm_mpi.files import read_whole

FORMAT, TAGGED, CHATS, ASKED = "labelled-1", "tagged-1", "dialogues-1", "questions-1"
PREFERRED = "preferences-1"
MOST_LABELS = 65_535
# each text has a label, each word has one, each text has a target, dialogues have answers, each question has its answer
# in a text, of two answers one is preferred
Kind = Literal["texts", "words", "pairs", "dialogues", "questions", "preferences"]


class _Ways(NamedTuple):
    """What a kind of texts is called, how it is prepared, and for which task."""

    name: str
    prepare: str
    task: str


_WAYS: dict[Kind, _Ways] = {
    "texts": _Ways("labels of texts", "prepare FILES --label COLUMN", "classification"),
    "words": _Ways("labels of words", "prepare FILES --tags", "tagging"),
    "pairs": _Ways("pairs of texts", "prepare FILES --target COLUMN (or prepare --aligned A B)", "translation"),
    "dialogues": _Ways("dialogues", "prepare FILES --chat", "dialogue"),
    "questions": _Ways("questions", "prepare FILES --squad", "question_answering"),
    "preferences": _Ways("preferences", "prepare FILES --chat (with chosen and rejected answers)", "preference"),
}
_SECOND = np.dtype(np.uint32)
ANSWERS = {"answers": np.dtype(np.uint8)}  # the marks of dialogues


class Cleaning(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was found in the rows read.

    `unlabelled`: rows without a label. `duplicates`: equal in texts, label and side to an earlier row. `conflicts`:
    texts with several labels, all kept. `leaks`, `leaking_sources`: texts, and source strings, that stand on two sides.
    Of labelled words a row is a sentence; duplicates are kept, and `empty` counts words of control characters alone.
    `unpaired`: rows that lack a text or its target; `out_of_ratio`: rows one of whose texts is much the longer.
    Of dialogues a row is one; `empty`: with an empty message, or without an answer; `odd_roles`: with an unknown role,
    or with system behind the first message; `unanswered`: messages left out behind the last answer. `one_sided`: with a
    chosen or a rejected answer alone; `undecided`: they are the same.
    Of questions a row is one, `unlabelled` lacks an answer without saying so. `impossible`: it says so; `unfound`: none
    of its answers stands in its context; `moved`, `lost`: answers that stand elsewhere than was said, or nowhere;
    `widened`: first answers that begin or end inside a token. `same_ids`: questions whose id is that of an earlier one
    of their file.
    """

    rows: int
    empty: int
    unlabelled: int
    duplicates: int
    conflicts: int
    leaks: int
    leaking_sources: int
    invalid_utf8: int
    control_characters: int
    unpaired: int = 0
    out_of_ratio: int = 0
    odd_roles: int = 0
    unanswered: int = 0
    impossible: int = 0
    unfound: int = 0
    moved: int = 0
    lost: int = 0
    widened: int = 0
    one_sided: int = 0
    undecided: int = 0
    same_ids: int = 0


@dataclass(frozen=True)
class Lengths:
    """Tokens of the examples of all splits: half have at most `median`, 95 in 100 at most `most`."""

    median: int
    most: int
    longest: int


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The content of catalog.json. `content`: see `content_digest`. `split`: see `sides.split_digest`.

    `counts`: split -> its examples, or words, of each label, or of all where there is none; a split that does not exist
    is not there. `template`: how dialogues became tokens; "" where there are none. `hints`: word -> its translation, of
    which the sources of pairs have a hint in front (data/dictionary.py); {}: they have none.
    """

    format: str
    content: str
    split: str
    tokenizer: TokenizerEntry
    labels: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]
    has_pairs: bool
    shards: tuple[ShardEntry, ...]
    lengths: Lengths
    cleaning: Cleaning
    seed: int
    heldout: float
    test: float
    template: str = ""
    hints: dict[str, str] = {}

    @property
    def kind(self) -> Kind:
        """What has a label, a target or answers."""
        others: dict[str, Kind] = {TAGGED: "words", CHATS: "dialogues", ASKED: "questions", PREFERRED: "preferences"}
        if self.format != FORMAT:
            return others[self.format]
        return "texts" if self.labels else "pairs"

    @property
    def of_words(self) -> bool:
        """Whether each word has a label, not each text."""
        return self.format == TAGGED


class Example(NamedTuple):
    """Token ids (tokens,) int32 without an end of text, where the second text begins (0: none), number of the label (0
    where there is none)."""

    ids: np.ndarray
    second: int
    label: int


class Examples:
    """The examples of a split in memory: 20 bytes each and 1, 2 or 4 a token. Nothing changes them, so threads share.

    `lengths`: (n,) int32, tokens of each; `targets`: (n,) int32, numbers of their labels; `seconds`: (n,) int32, where
    their second texts begin.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, labels: np.ndarray, seconds: np.ndarray) -> None:
        """Shapes: (tokens,), (n + 1,), (n,), (n,)."""
        self._tokens, self._offsets = tokens, offsets.astype(np.int64)
        self.lengths: np.ndarray = np.diff(self._offsets).astype(np.int32)
        self.targets: np.ndarray = labels.astype(np.int32)
        self.seconds: np.ndarray = seconds.astype(np.int32)
        for array in (self.lengths, self.targets, self.seconds):
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, number: int) -> Example:
        """Example 0 … n − 1; its ids are the caller's own."""
        ids = self._tokens[self._offsets[number] : self._offsets[number + 1]].astype(np.int32)
        return Example(ids, int(self.seconds[number]), int(self.targets[number]))


@dataclass(frozen=True)
class Labelled:
    """A folder of labelled texts. `digest`: SHA-256 of catalog.json, which names every byte of them."""

    folder: Path
    digest: str
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path, named_by: str = "data.dir", kind: Kind = "texts") -> "Labelled":
        """`named_by`: the setting that gave the folder. `kind`: what is wanted.

        Raises DataError: no catalog, malformed, or of another kind.
        """
        wanted = _WAYS[kind]
        if not str(folder):  # as a path it would be the current folder
            raise DataError(f"{named_by} is empty: set it to the folder that mlm-mpi {wanted.prepare} has written")
        path = Path(folder) / FILE_NAME
        try:
            content = read_whole(path, CATALOG_BYTES, path.parent)
        except OSError as error:
            raise DataError(
                f"no {wanted.name} at {folder}: cannot read {path} ({error.strerror}): run mlm-mpi "
                f"{wanted.prepare}, or set {named_by}"
            ) from None
        manifest = _decode(content, path, named_by, wanted)
        if manifest.kind != kind:
            found = _WAYS[manifest.kind]
            raise DataError(
                f'{path} has {found.name}, not {wanted.name}: set task.kind = "{found.task}", or give another '
                f"{named_by}"
            )
        return cls(Path(folder), hashlib.sha256(content).hexdigest(), manifest)

    @property
    def content(self) -> str:
        """SHA-256 in hex of what the examples say, however they are stored."""
        return self.manifest.content

    @property
    def split_digest(self) -> str:
        """SHA-256 in hex of which source string stands on which side."""
        return self.manifest.split

    @property
    def labels(self) -> tuple[str, ...]:
        """Their names; a label's number is its place."""
        return self.manifest.labels

    @property
    def has_pairs(self) -> bool:
        """Whether examples have a second text."""
        return self.manifest.has_pairs

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that exist, of "train", "heldout" and "test"."""
        return tuple(split for split in SPLITS if split in self.manifest.counts)

    def tokenizer(self) -> Tokenizer:
        """Raises DataError if the file is another one than the shards were made with."""
        return tokenizer_of(self.folder, self.manifest.tokenizer)

    def check_files(self) -> None:
        """Every shard exists and has its size; costs one stat per shard. Raises DataError."""
        for entry in self.manifest.shards:
            check_size(self.folder / entry.file, entry)

    def examples(self, split: str) -> Examples:
        """All examples of a split, verified. Raises DataError: no such split, or a shard that is not as it was."""
        tokens, lengths, labels, seconds = self._joined(split, self._read)
        return Examples(tokens, np.concatenate([[0], np.cumsum(lengths)]), labels, seconds)

    def sentences(self, split: str) -> Sentences:
        """All sentences of a split of labelled words, verified. Raises DataError as `examples` does."""
        tokens, lengths, tags = self._joined(split, self._read_tagged)
        return Sentences(tokens, np.concatenate([[0], np.cumsum(lengths)]), tags)

    def dialogues(self, split: str) -> Dialogues:
        """All dialogues of a split, verified. Raises DataError as `examples` does."""
        tokens, lengths, answers = self._joined(split, self._read_dialogues)
        return Dialogues(tokens, np.concatenate([[0], np.cumsum(lengths)]), answers)

    def questions(self, split: str) -> Questions:
        """All questions of a split, verified. Raises DataError as `examples` does."""
        tokens, lengths, seconds, answers, starts, stops = self._joined(split, self._read_asked)
        offsets, eot = np.concatenate([[0], np.cumsum(lengths)]), self.manifest.tokenizer.eot
        return Questions(tokens, offsets, seconds, answers, starts, stops, eot)

    def _joined(self, split: str, read: Callable[[ShardEntry], tuple[np.ndarray, ...]]) -> Iterator[np.ndarray]:
        """What is read of all shards of a split, array by array."""
        if split not in self.splits:
            raise DataError(
                f"{self.folder} has no split {split!r}, it has {', '.join(self.splits)}: use one of these, or prepare "
                "it again with rows for it"
            )
        parts = [read(entry) for entry in self.manifest.shards if entry.split == split]
        return (np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    def _read_tagged(self, entry: ShardEntry) -> tuple[np.ndarray, ...]:
        """(tokens, lengths, tags) of a shard."""
        tokenizer, path = self.manifest.tokenizer, self.folder / entry.file
        marks = {"tags": tag_type(len(self.labels))}
        reader = ShardReader(path, entry, tokenizer.hash, tokenizer.vocab_size, marks=marks)
        try:
            offsets, tags = reader.offsets().astype(np.int64), reader.column("tags")
            tokens = reader.read(0, entry.tokens)
        finally:
            reader.close()
        if tags.max() > len(self.labels):
            raise DataError(f"shard {path} has label {tags.max() - 1} of {len(self.labels)}: {AGAIN}")
        if not tags[offsets[:-1]].all():
            raise DataError(f"shard {path} has a sentence whose first token has no label: {AGAIN}")
        return tokens, np.diff(offsets), tags

    def _read_dialogues(self, entry: ShardEntry) -> tuple[np.ndarray, ...]:
        """(tokens, lengths, answers) of a shard."""
        tokenizer, path = self.manifest.tokenizer, self.folder / entry.file
        reader = ShardReader(path, entry, tokenizer.hash, tokenizer.vocab_size, marks=ANSWERS)
        try:
            lengths, answers = np.diff(reader.offsets().astype(np.int64)), reader.column("answers")
            tokens = reader.read(0, entry.tokens)
        finally:
            reader.close()
        last = np.cumsum(lengths) - 1
        if answers.max() > 1 or not (answers[last].all() and (tokens[last] == tokenizer.eot).all()):
            raise DataError(f"shard {path} has a dialogue that does not end with an answer: {AGAIN}")
        return tokens, lengths, answers

    def _read_asked(self, entry: ShardEntry) -> tuple[np.ndarray, ...]:
        """(tokens, lengths, seconds, answers, starts, stops) of a shard."""
        tokenizer, path = self.manifest.tokenizer, self.folder / entry.file
        reader = ShardReader(path, entry, tokenizer.hash, tokenizer.vocab_size, columns=QUESTION_TYPES)
        try:
            lengths = np.diff(reader.offsets().astype(np.int64))
            seconds, answers, starts, stops = (reader.column(name).astype(np.int64) for name in QUESTION_TYPES)
            tokens = reader.read(0, entry.tokens)
        finally:
            reader.close()
        there = (seconds > 0) & (seconds < answers) & (answers <= lengths)
        if not (there & (starts <= stops) & (stops <= answers - seconds)).all():
            raise DataError(f"shard {path} has a question whose answer is not in its context: {AGAIN}")
        return tokens, lengths, seconds, answers, starts, stops

    def _read(self, entry: ShardEntry) -> tuple[np.ndarray, ...]:
        """(tokens, lengths, labels, seconds) of a shard."""
        tokenizer, path = self.manifest.tokenizer, self.folder / entry.file
        kinds = column_types(len(self.labels), self.has_pairs)
        reader = ShardReader(path, entry, tokenizer.hash, tokenizer.vocab_size, columns=kinds)
        try:
            lengths = np.diff(reader.offsets().astype(np.int64))
            labels = reader.column("labels") if self.labels else np.zeros(entry.documents, np.uint8)
            seconds = reader.column("seconds") if self.has_pairs else np.zeros(entry.documents, _SECOND)
            tokens = reader.read(0, entry.tokens)
        finally:
            reader.close()
        if labels.max() >= max(1, len(self.labels)):
            raise DataError(f"shard {path} has label {labels.max()} of {len(self.labels)}: {AGAIN}")
        if (seconds >= lengths).any():
            raise DataError(f"shard {path} has a second text that begins behind its example: {AGAIN}")
        if not self.labels and (seconds == 0).any():
            raise DataError(f"shard {path} has a text without a target: {AGAIN}")
        return tokens, lengths, labels, seconds


def column_types(labels: int, has_pairs: bool) -> dict[str, np.dtype[Any]]:
    """The columns of a shard beside its tokens. `labels`: how many there are."""
    kinds: dict[str, np.dtype[Any]] = {"labels": np.min_scalar_type(labels - 1)} if labels else {}
    return kinds | {"seconds": _SECOND} if has_pairs else kinds


QUESTION_TYPES: dict[str, np.dtype[Any]] = dict.fromkeys(("seconds", "answers", "starts", "stops"), _SECOND)


def tag_type(labels: int) -> np.dtype[Any]:
    """Of the number of a label and 1, or 0. `labels`: how many there are."""
    return np.min_scalar_type(labels)


def sentence_digest(ids: np.ndarray, tags: np.ndarray) -> bytes:
    """SHA-256 of a sentence's or dialogue's ids and of its tags or answers, as many, as little-endian uint32."""
    return hashlib.sha256(np.concatenate([ids, tags]).astype("<u4").tobytes()).digest()


def question_digest(ids: np.ndarray, places: Sequence[int]) -> bytes:
    """SHA-256 of a question's `seconds`, `answers`, `starts` and `stops`, and of its ids, as little-endian uint32."""
    return hashlib.sha256(np.concatenate([places, ids]).astype("<u4").tobytes()).digest()


def example_digest(ids: np.ndarray, second: int, label: int) -> bytes:
    """SHA-256 of an example's label, of where its second text begins, and of its ids, as little-endian uint32."""
    return hashlib.sha256(np.concatenate([[label, second], ids]).astype("<u4").tobytes()).digest()


def content_digest(tokenizer_hash: str, labels: tuple[str, ...], examples: Mapping[str, Iterable[bytes]]) -> str:
    """SHA-256 in hex of what labelled texts say, however they are stored: of the tokenizer's hash, of the labels as a
    JSON list, and of one SHA-256 for each split, over the digests of its examples in their order."""
    whole = hashlib.sha256(tokenizer_hash.encode() + msgspec.json.encode(labels))
    for split in SPLITS:
        whole.update(hashlib.sha256(b"".join(examples[split])).digest())
    return whole.hexdigest()


def _decode(content: bytes, path: Path, named_by: str, wanted: _Ways) -> Manifest:
    try:
        table = msgspec.json.decode(content)
        found = table.get("format") if isinstance(table, dict) else None
        if found in (1, catalog.FORMAT):
            raise DataError(
                f"{path} is of a corpus without {wanted.name}: run mlm-mpi {wanted.prepare}, or give another {named_by}"
            )
        if found not in (FORMAT, TAGGED, CHATS, ASKED, PREFERRED):
            raise DataError(f"{path} has format {str(found)[:40]}, this version reads format {FORMAT}: {AGAIN}")
        manifest = msgspec.convert(table, Manifest)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}): {AGAIN}") from None
    wrong = next(_oddities(manifest), None)
    if wrong is not None:
        raise DataError(f"{path} is damaged ({wrong}): {AGAIN}")
    return manifest


def _oddities(manifest: Manifest) -> Iterator[str]:
    """What is wrong with a catalog that reads well: nothing seals it, and what it says is believed."""
    tokenizer, names = manifest.tokenizer, [manifest.tokenizer.file, *(entry.file for entry in manifest.shards)]
    if odd := [name for name in names if not PLAIN_NAME.fullmatch(name)]:
        yield f"{odd[0]!r} is no plain file name"
    if len(set(names)) != len(names):
        yield "it names a file twice"
    if not 0 <= tokenizer.eot < tokenizer.vocab_size <= LARGEST_VOCABULARY:
        yield f"end of text {tokenizer.eot}, vocabulary {tokenizer.vocab_size}"
    for digest in (manifest.content, manifest.split):
        if not SHA256.fullmatch(digest):
            yield f"digest {digest[:80]!r}"
    if not all(math.isfinite(share) and 0 <= share < 1 for share in (manifest.heldout, manifest.test)):
        yield f"heldout {manifest.heldout}, test {manifest.test}"
    labels, chats = manifest.labels, manifest.kind in ("dialogues", "preferences")
    if manifest.template != (template.NAME if chats else ""):
        yield f"chat template {manifest.template[:80]!r}"
    if chats and (labels or manifest.has_pairs):
        yield "dialogues with labels or pairs"
    has_none = chats or (not labels and manifest.has_pairs)
    if not (has_none or 2 <= len(labels) <= MOST_LABELS) or len(set(labels)) != len(labels):
        yield f"{len(labels)} labels, {len(set(labels))} of them differ"
    if odd := [label for label in labels if not 0 < len(label) <= LONGEST_LABEL or NO_LABEL.search(label)]:
        yield f"label {odd[0]!r}"
    kinds = column_types(len(labels), manifest.has_pairs) if manifest.format == FORMAT else {}
    kinds = QUESTION_TYPES if manifest.format == ASKED else kinds
    column_bytes = sum(kind.itemsize for kind in kinds.values())
    mark_bytes = 0 if manifest.format in (FORMAT, ASKED) else tag_type(len(labels)).itemsize
    for entry in manifest.shards:
        most = most_bytes(entry.tokens, entry.documents, tokenizer.vocab_size, column_bytes, mark_bytes)
        yield from oddities_of(entry, SPLITS, most)
    if sum(entry.tokens for entry in manifest.shards) > MOST_TOKENS:
        yield f"more than {MOST_TOKENS} tokens"
    yield from _odd_counts(manifest)


def _odd_counts(manifest: Manifest) -> Iterator[str]:
    stored = dict.fromkeys(manifest.counts, 0.0)
    for entry in manifest.shards:
        stored[entry.split] = stored.get(entry.split, 0) + entry.documents / (1 + (manifest.kind == "preferences"))
    for split, examples in stored.items():
        counts = manifest.counts.get(split, ())
        fits = sum(counts) >= examples if manifest.of_words else sum(counts) == examples
        if split not in SPLITS or len(counts) != max(1, len(manifest.labels)) or min(counts) < 0 or not fits:
            yield f"its counts of {split[:40]!r} are not those of its shards"
        if not examples:
            yield f"split {split[:40]!r} has no examples"
