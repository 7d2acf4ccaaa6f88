"""The catalog: what a prepared corpus consists of. Written last of all, so it only names whole files."""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from mlm_mpi.data.shards import ShardEntry, check_size, most_bytes
from mlm_mpi.data.tokenizer import LARGEST_VOCABULARY, Tokenizer
from mlm_mpi.errors import DataError
from mlm_mpi.files import read_whole

FORMAT = 2
FILE_NAME = "catalog.json"
SPLITS = ("train", "heldout")
AGAIN = "run mlm-mpi prepare again"
CATALOG_BYTES = 64 << 20  # 200,000 shards
MOST_TOKENS = 1 << 56  # of a corpus: what is computed from it fits 64 bits
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")  # of a file: never a path
SHA256 = re.compile("[0-9a-f]{64}")
# formats of other catalogs (data/labelled.py): what they have, and the tasks that read it
_OTHERS = {
    "labelled": ("labelled texts or pairs of texts", '"classification" or "translation"'),
    "tagged": ("labelled words", '"tagging"'),
    "dialogues": ("dialogues", '"dialogue"'),
    "questions": ("questions", '"question_answering"'),
    "preferences": ("preferences", '"preference"'),
}


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer the shards were made with. `kind`: bytes, bpe, words or file."""

    file: str
    hash: str
    kind: str
    vocab_size: int
    eot: int


@dataclass(frozen=True)
class Totals:
    """Sums over the shards of a split."""

    shards: int
    tokens: int
    documents: int
    characters: int
    utf8_bytes: int


@dataclass(frozen=True)
class Cleaning:
    """What cleaning found in the documents read."""

    documents: int
    empty: int
    duplicates: int
    near_clusters: int
    near_documents: int
    invalid_utf8: int
    control_characters: int


@dataclass(frozen=True)
class Manifest:
    """The content of catalog.json. `content`: see `content_digest`."""

    format: int
    content: str
    tokenizer: TokenizerEntry
    shards: tuple[ShardEntry, ...]
    totals: dict[str, Totals]
    cleaning: Cleaning
    seed: int
    heldout: float


@dataclass(frozen=True)
class PlacedShard:
    """A shard and the place of its first token in the token stream of its split."""

    entry: ShardEntry
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.entry.tokens


@dataclass(frozen=True)
class Catalog:
    """A prepared corpus in a folder. `digest`: SHA-256 of catalog.json, which names every byte of the corpus."""

    folder: Path
    digest: str
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path, named_by: str = "data.dir") -> "Catalog":
        """`named_by`: the setting that gave the folder. Raises DataError: no catalog, malformed, or another format."""
        if not str(folder):  # as a path it would be the current folder
            raise DataError(f"{named_by} is empty: set it to the folder that mlm-mpi prepare --out has written")
        path = Path(folder) / FILE_NAME
        try:
            content = read_whole(path, CATALOG_BYTES, path.parent)
        except OSError as error:
            raise DataError(
                f"no corpus at {folder}: cannot read {path} ({error.strerror}): run mlm-mpi prepare, or set {named_by}"
            ) from None
        return cls(Path(folder), hashlib.sha256(content).hexdigest(), _decode(content, path))

    def split(self, name: str) -> tuple[PlacedShard, ...]:
        """The shards of "train" or "heldout" in stream order. Raises DataError for another name."""
        if name not in SPLITS:
            raise DataError(
                f"{self.folder} has no split {name!r}, a corpus without labels has {' and '.join(SPLITS)}: use one of "
                "these, or leave --split out"
            )
        placed: list[PlacedShard] = []
        for entry in self.manifest.shards:
            if entry.split == name:
                placed.append(PlacedShard(entry, placed[-1].stop if placed else 0))
        return tuple(placed)

    def tokens(self, split: str) -> int:
        """Tokens of a split, ends of text included."""
        return sum(shard.entry.tokens for shard in self.split(split))

    def characters(self, split: str) -> int:
        """Unicode characters of a split's text."""
        return sum(shard.entry.characters for shard in self.split(split))

    def tokenizer(self) -> Tokenizer:
        """The corpus' tokenizer. Raises DataError if the file is another one than the shards were made with."""
        return tokenizer_of(self.folder, self.manifest.tokenizer)

    def check_files(self) -> None:
        """Every shard exists and has its size; costs one stat per shard. Raises DataError."""
        for entry in self.manifest.shards:
            check_size(self.folder / entry.file, entry)


def tokenizer_of(folder: Path, entry: TokenizerEntry) -> Tokenizer:
    """The tokenizer in a folder that its catalog names. Raises DataError if the file is another one."""
    path = folder / entry.file
    tokenizer = Tokenizer.load(path, folder)
    if tokenizer.hash != entry.hash:
        raise DataError(
            f"{folder / FILE_NAME} is the catalog of another tokenizer: {path} has SHA-256 "
            f"{tokenizer.hash[:16]}…, the catalog says {entry.hash[:16]}…: {AGAIN}"
        )
    if (tokenizer.vocab_size, tokenizer.eot) != (entry.vocab_size, entry.eot):
        raise DataError(
            f"{path} has vocabulary {tokenizer.vocab_size} and end of text {tokenizer.eot}, the catalog says "
            f"{entry.vocab_size} and {entry.eot}: {AGAIN}"
        )
    return tokenizer


def totals(shards: tuple[ShardEntry, ...]) -> dict[str, Totals]:
    """Sums by split; a split without shards has zeros."""
    out = {}
    for split in SPLITS:
        mine = [entry for entry in shards if entry.split == split]
        fields = ("tokens", "documents", "characters", "utf8_bytes")
        out[split] = Totals(len(mine), *(sum(getattr(entry, field) for entry in mine) for field in fields))
    return out


def document_digest(ids: np.ndarray) -> bytes:
    """SHA-256 of a document's token ids, its end included, as little-endian uint32."""
    return hashlib.sha256(ids.astype("<u4").tobytes()).digest()


def content_digest(tokenizer_hash: str, documents: Mapping[str, Iterable[bytes]]) -> str:
    """SHA-256 in hex of what a corpus says, however it is stored: of the tokenizer's hash and of one SHA-256 for each
    split, over the digests of its documents (in pieces of any length) in their order.

    How documents were read is no part of it: a format of `--plugins` shows here, and in the catalog, by the text that
    it gave, so that two which give the same text make the same corpus. Its own SHA-256 stands in prepared.json.
    """
    whole = hashlib.sha256(tokenizer_hash.encode())
    for split in SPLITS:
        part = hashlib.sha256()
        for digests in documents[split]:
            part.update(digests)
        whole.update(part.digest())
    return whole.hexdigest()


def encode(manifest: Manifest) -> bytes:
    """The content of catalog.json; equal manifests give equal bytes."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def _decode(content: bytes, path: Path) -> Manifest:
    try:
        table = msgspec.json.decode(content)
        found = table.get("format") if isinstance(table, dict) else None
        if isinstance(found, str) and (kind := found.partition("-")[0]) in _OTHERS:
            what, task = _OTHERS[kind]
            raise DataError(
                f"{path} is of {what}, not of a corpus to be continued: set task.kind = {task}, or prepare plain texts"
            )
        if found != FORMAT:
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
    tokenizer, files = manifest.tokenizer, [entry.file for entry in manifest.shards]
    names = [tokenizer.file, *files]
    if odd := [name for name in names if not PLAIN_NAME.fullmatch(name)]:
        yield f"{odd[0]!r} is no plain file name"
    if len(set(names)) != len(names):
        yield "it names a file twice"
    if not 0 <= tokenizer.eot < tokenizer.vocab_size <= LARGEST_VOCABULARY:
        yield f"end of text {tokenizer.eot}, vocabulary {tokenizer.vocab_size}"
    if not SHA256.fullmatch(manifest.content):
        yield f"content {manifest.content[:80]!r}"
    if not (math.isfinite(manifest.heldout) and 0 <= manifest.heldout < 1):
        yield f"heldout {manifest.heldout}"
    for entry in manifest.shards:
        most = most_bytes(entry.tokens, entry.documents, tokenizer.vocab_size)
        yield from oddities_of(entry, SPLITS, most)
    if sum(entry.tokens for entry in manifest.shards) > MOST_TOKENS:
        yield f"more than {MOST_TOKENS} tokens"
    if manifest.totals != totals(manifest.shards):
        yield "its totals are not the sums of its shards"


def oddities_of(entry: ShardEntry, splits: Sequence[str], most: int) -> Iterator[str]:
    """What is wrong with what is said of a shard that needs at most `most` bytes.

    A document has a character and a token; a character has 1 to 4 bytes of UTF-8.
    """
    if entry.split not in splits or not SHA256.fullmatch(entry.sha256):
        yield f"{entry.file} has split {entry.split!r}, SHA-256 {entry.sha256!r}"
    if not 1 <= entry.documents <= min(entry.tokens, entry.characters):
        yield f"{entry.file} has {entry.documents} documents, {entry.tokens} tokens, {entry.characters} characters"
    if not entry.characters <= entry.utf8_bytes <= 4 * entry.characters:
        yield f"{entry.file} has {entry.characters} characters in {entry.utf8_bytes} bytes"
    if not 0 < entry.bytes <= most:
        yield f"{entry.file} has {entry.bytes} bytes, its tokens need at most {most}"
