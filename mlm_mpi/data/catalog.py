"""The catalog: what a prepared corpus consists of. Written last of all, so it only names whole files."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from mlm_mpi.data.shards import ShardEntry, check_size
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.errors import DataError

FORMAT = 2
FILE_NAME = "catalog.json"
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer the shards were made with. `kind`: bytes, bpe or file."""

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
    def open(cls, folder: str | Path) -> "Catalog":
        """Raises DataError: no catalog, malformed, or of another format."""
        path = Path(folder) / FILE_NAME
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"no corpus at {folder}: cannot read {path} ({error.strerror}): run mlm-mpi prepare, or set data.dir"
            ) from None
        return cls(Path(folder), hashlib.sha256(content).hexdigest(), _decode(content, path))

    def split(self, name: str) -> tuple[PlacedShard, ...]:
        """The shards of "train" or "heldout" in stream order. Raises DataError for another name."""
        if name not in SPLITS:
            raise DataError(f"the corpus has no split {name!r}: use one of {', '.join(SPLITS)}")
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
        entry = self.manifest.tokenizer
        path = self.folder / entry.file
        tokenizer = Tokenizer.load(path)
        if tokenizer.hash != entry.hash:
            raise DataError(
                f"{self.folder / FILE_NAME} is the catalog of another tokenizer: {path} has SHA-256 "
                f"{tokenizer.hash[:16]}…, the catalog says {entry.hash[:16]}…: run mlm-mpi prepare again"
            )
        return tokenizer

    def check_files(self) -> None:
        """Every shard exists and has its size; costs one stat per shard. Raises DataError."""
        for entry in self.manifest.shards:
            check_size(self.folder / entry.file, entry)


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
    again = "run mlm-mpi prepare again"
    try:
        table = msgspec.json.decode(content)
        found = table.get("format") if isinstance(table, dict) else None
        if found != FORMAT:
            raise DataError(f"{path} has format {found}, this version reads format {FORMAT}: {again}")
        return msgspec.convert(table, Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}): {again}") from None
