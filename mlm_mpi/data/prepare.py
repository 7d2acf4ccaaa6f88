"""`mlm-mpi prepare`: from text to a corpus of tokenised shards.

    clean    every rank reads its part of the documents and spools the cleaned text into DIR/.staging
    cut      texts too long to be held out whole: every rank cuts its share of them into documents
    arrange  every rank reads all records (not texts): duplicates out, clusters, sides, shard borders
    train    rank 0 trains the tokenizer on the training side
    shards   every rank tokenises and writes its share of the shards there
    publish  rank 0 writes tokenizer and catalog, puts everything in place and removes an earlier corpus

Everything after `clean` is a function of the documents and the settings; the number of ranks decides
only who does it, so the bytes of every file are the same on any number of ranks.
"""

import hashlib
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import numpy as np

from mlm_mpi import __version__
from mlm_mpi.data import builtin, catalog, similar, sources
from mlm_mpi.data.arranging import RECORD, Cut, Plan, ShardPlan, arrange, first_of_each, ordered, too_long
from mlm_mpi.data.cutting import cut
from mlm_mpi.data.decoding import NoText, check_repaired
from mlm_mpi.data.reading import Formats
from mlm_mpi.data.shards import ShardEntry, write_shard
from mlm_mpi.data.staging import FOLDER, PREPARED, CorpusFolder, Prepared
from mlm_mpi.data.text import Cleaned, clean
from mlm_mpi.data.tokenizer import MADE, Tokenizer, made
from mlm_mpi.data.tokenizing import batches, encode, pieces
from mlm_mpi.errors import DataError
from mlm_mpi.files import cannot_write, publish_all
from mlm_mpi.plug import check_same, named

TRAINING_CHARACTERS = 1 << 28  # a vocabulary learns nothing more from more text than this
PATIENCE_S = 7 * 86400.0  # ranks end hours apart where one reads a huge file or trains the tokenizer
_MIB = 1 << 20


Told = Callable[[str, float, float], None]  # (phase, done, total): bytes, characters or shards of this rank


class Ranks(Protocol):
    """What `prepare` needs of a `comm.group.Group`."""

    rank: int
    size: int

    def allgather(self, value: Any, what: str) -> list[Any]: ...
    def broadcast(self, value: Any, what: str) -> Any: ...
    def with_timeout(self, timeout_s: float) -> "Ranks": ...
    def together(self, what: str) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Recipe:
    """What a corpus is to be made of, and how; `mlm-mpi prepare --help` says what the values mean.

    `command`: the command line to be written down, which makes the same corpus again.
    """

    inputs: tuple[str, ...]
    out: Path
    has_builtin: bool
    tokenizer: str
    vocab: int
    heldout: float
    cut: Literal["auto", "never", "always"]
    field: str
    encoding: str
    shard_mib: float
    seed: int
    plugins: str | None
    command: str
    lowercase: bool = False


@dataclass(frozen=True)
class Made:
    """What there is to tell of a corpus that is in its place.

    `cuts`: what became of the long texts in each file; `missing`: built-in documents that this Python lacks;
    `skipped`: records without text, and the place of the first; `is_replaced`: an earlier corpus was in the folder.
    """

    manifest: catalog.Manifest
    cuts: tuple[tuple[str, Cut], ...]
    skipped: tuple[int, str]
    missing: int
    is_replaced: bool


def prepare(recipe: Recipe, group: Ranks, told: Told) -> Made:
    """Prepares a corpus in `recipe.out`; `told` hears how far this rank is.

    Collective. Raises DataError or ConfigError on all ranks.
    """
    group = group.with_timeout(PATIENCE_S)
    with group.together("loading formats"):
        formats = Formats(named(recipe.plugins))
    check_same(formats.plugins, group)
    with group.together("reading the tokenizer"):
        if group.rank == 0 and recipe.tokenizer not in MADE:
            Tokenizer.load(recipe.tokenizer)  # a bad one is told now, not after hours
    # A library that starts a thread per core in each rank would fight itself.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if group.size == 1 else "false"
    folder = None
    with group.together("opening the corpus folder"):
        if group.rank == 0:
            folder = CorpusFolder(recipe.out)
    try:
        made = _stage(recipe, formats, group, told)
        with group.together("publishing the corpus"):
            if folder is not None:
                files = [made.manifest.tokenizer.file, *(shard.file for shard in made.manifest.shards)]
                made = replace(made, is_replaced=folder.publish(files))
    except BaseException:
        if folder is not None:
            folder.abandon()  # every rank is here, or the job is at its end
        raise
    if folder is not None:
        folder.close()
    return made


def _stage(recipe: Recipe, formats: Formats, group: Ranks, told: Told) -> Made:
    """What is staged."""
    spool = _Spool(recipe.out / FOLDER)
    with group.together("looking for input"):
        found = sources.find(recipe.inputs, recipe.has_builtin, recipe.out, formats)
    counts, tallies = _clean(recipe, found, group, spool, told)
    records, duplicates = _cut(recipe, group, spool, told)
    with group.together("arranging documents"):
        plan = arrange(records, recipe.heldout, recipe.seed, math.ceil(recipe.shard_mib * _MIB))
    tokenizer = _tokenizer(recipe, group, plan, spool, told)
    with group.together("writing shards"):
        numbers = range(group.rank, len(plan.shards), group.size)
        mine = {}
        for done, number in enumerate(numbers):
            told("shards", done, len(numbers))
            mine[number] = _write(number, plan.shards[number], spool, tokenizer)
    shards = _gather(mine, group)
    documents, empty, replaced, controls = counts
    manifest = catalog.Manifest(
        format=catalog.FORMAT,
        content="",
        tokenizer=catalog.TokenizerEntry(
            f"tokenizer-{tokenizer.hash[:8]}.json", tokenizer.hash, _kind(recipe.tokenizer), tokenizer.vocab_size,
            tokenizer.eot,
        ),
        shards=shards,
        totals=catalog.totals(shards),
        cleaning=catalog.Cleaning(
            documents, empty, duplicates + plan.duplicates, plan.near_clusters, plan.near_documents, replaced, controls
        ),
        seed=recipe.seed,
        heldout=recipe.heldout,
    )  # fmt: skip
    cuts = tuple((found[cut.source].name, cut) for cut in plan.cuts)
    with group.together("writing the catalog"):
        if group.rank == 0:
            manifest = replace(manifest, content=spool.content(tokenizer.hash, plan.shards))
            prepared = Prepared(
                recipe.command, platform.python_version(), __version__, manifest.content, formats.plugins.used,
                {name: str(cut) for name, cut in cuts},
            )  # fmt: skip
            publish_all([
                (spool.folder / manifest.tokenizer.file, tokenizer.content),
                (spool.folder / catalog.FILE_NAME, catalog.encode(manifest)),
                (spool.folder / PREPARED, msgspec.json.format(msgspec.json.encode(prepared), indent=1) + b"\n"),
            ])  # fmt: skip
    skipped = [tally for tally in tallies.values() if tally.skipped]
    missing = sum(builtin.count() - tally.documents for index, tally in tallies.items() if found[index].format is None)
    return Made(
        manifest, cuts, (sum(tally.skipped for tally in skipped), skipped[0].place if skipped else ""), missing, False
    )


@dataclass(frozen=True)
class _Document:
    source: int
    number: int
    cleaned: Cleaned


@dataclass
class _Tally:
    """What was met in a source: documents, places that were not of its encoding, characters, records without text.

    `strange`: those of them which do not even have the field; `number`, `place` and `fields` are of the first one.
    """

    documents: int = 0
    replaced: int = 0
    characters: int = 0
    skipped: int = 0
    strange: int = 0
    number: int = -1
    place: str = ""
    fields: str = ""

    def skip(self, number: int, found: NoText) -> None:
        if not self.skipped:
            self.number, self.place, self.fields = number, found.place, found.fields
        self.skipped += 1
        self.strange += not found.has_field

    def count(self, content: str, cleaned: Cleaned) -> None:
        self.documents += 1
        self.replaced += cleaned.replaced
        self.characters += len(content)

    def __add__(self, other: "_Tally") -> "_Tally":
        first = min((one for one in (self, other) if one.skipped), key=lambda one: one.number, default=self)
        summed = ("documents", "replaced", "characters", "skipped", "strange")
        return replace(first, **{name: getattr(self, name) + getattr(other, name) for name in summed})

    def check(self, source: sources.Source, field: str) -> None:
        """Raises DataError for a file that was read with another encoding than its own, or by a field it lacks."""
        if source.format is None:
            return
        if self.strange and not self.documents and self.strange == self.skipped:
            raise DataError(
                f"{source.path}: no line has a field {field!r}, {self.place} has {self.fields!r}: "
                "choose one of them with --field"
            )
        check_repaired(source.path, self.replaced, self.characters)


class _Meter:
    """How many bytes of its sources this rank has read; a source counts once, however often its format reads it."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self.total = sum(sizes)
        self.done = 0
        self._end = 0

    def begin(self, size: int) -> None:
        self._end = self.done + size

    def read(self, size: int) -> None:
        self.done = min(self.done + size, self._end)

    def end(self) -> None:
        self.done = self._end


def _clean(
    recipe: Recipe, found: Sequence[sources.Source], group: Ranks, spool: "_Spool", told: Told
) -> tuple[list[int], dict[int, _Tally]]:  # fmt: skip
    """([read, empty, invalid UTF-8, control characters], tallies of shared sources and those with gaps). Collective."""
    tallies = {index: _Tally() for index, source in enumerate(found) if source.is_shared}
    with group.together("cleaning documents"):
        mine = {i: s for i, s in enumerate(found) if s.is_shared or i % group.size == group.rank}
        meter = _Meter(source.size() for source in mine.values())
        documents = _documents(recipe, group, mine, tallies, meter)
        counts = spool.fill(documents, group.rank, meter, partial(told, "cleaning"))
    every = group.allgather([counts, [[i, *astuple(tally)] for i, tally in tallies.items()]], "counts of cleaning")
    for index, *values in (row for rank, (_, rows) in enumerate(every) if rank != group.rank for row in rows):
        tallies[index] = tallies.get(index, _Tally()) + _Tally(*values)
    with group.together("checking encodings"):
        for index, tally in sorted(tallies.items()):
            tally.check(found[index], recipe.field)
    return np.sum([part for part, _ in every], axis=0).tolist(), dict(sorted(tallies.items()))


def _documents(
    recipe: Recipe, group: Ranks, mine: dict[int, sources.Source], tallies: dict[int, _Tally], meter: _Meter
) -> Iterator[_Document]:  # fmt: skip
    """This rank's part of all documents, in order."""
    for index, source in mine.items():
        tally = tallies[index] if source.is_shared else _Tally()
        last = None  # held back until the verdict on the encoding of the whole file
        meter.begin(source.size())
        for raw in sources.read(source, recipe.field, recipe.encoding, group.rank, group.size, meter.read):
            if last is not None:
                yield last
                last = None
            if isinstance(raw.content, NoText):
                tally.skip(raw.number, raw.content)
                continue
            cleaned = clean(raw.content)
            tally.count(raw.content, cleaned)
            last = _Document(index, raw.number, cleaned)
        meter.end()
        if not source.is_shared:
            tally.check(source, recipe.field)
            if tally.skipped:
                tallies[index] = tally
        if last is not None:
            yield last


def _cut(recipe: Recipe, group: Ranks, spool: "_Spool", told: Told) -> tuple[np.ndarray, int]:
    """(records of all documents, long texts cut into theirs; documents that were there twice). Collective."""
    with group.together("looking for long texts"):
        records = spool.records(group.size)
        if not len(records):
            raise DataError("the corpus is empty: no input holds any text: give other files, or --builtin")
        kept = records[first_of_each(records)]
        long = too_long(kept, recipe.heldout, recipe.cut)
    if not long.any():
        return records, 0
    with group.together("cutting long texts"):
        spool.cut(kept[long][group.rank :: group.size], recipe.heldout, group.rank, partial(told, "cutting"))
    with group.together("reading what was cut"):
        whole = ordered(np.concatenate([kept[~long], *spool.pieces(group.size)]))
    return whole, len(records) - len(kept)


class _Spool:
    """Cleaned documents on the way to their shards: one text file and one table of records per rank.

    A document that is cut from a long text is a table's record more; its text stays where it lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(
        self, documents: Iterable[_Document], rank: int, meter: _Meter, told: Callable[[float, float], None]
    ) -> list[int]:  # fmt: skip
        """Writes this rank's documents; returns [read, empty, invalid UTF-8, control characters].

        `told` hears how much of what the meter has counted is done: (done, total).
        """
        counts = np.zeros(4, np.int64)
        tables = [np.empty(0, RECORD)]
        start = 0
        before = 0  # bytes that the documents written so far were read from
        told(0, meter.total)
        try:
            with open(self._texts(rank), "wb") as file:
                for batch in batches(documents, lambda document: len(document.cleaned.text)):
                    kept = [document for document in batch if document.cleaned.text.strip()]
                    counts += [
                        len(batch), len(batch) - len(kept), sum(d.cleaned.replaced for d in batch),
                        sum(d.cleaned.controls for d in batch),
                    ]  # fmt: skip
                    part = partial(_told_between, told, before, meter.done, meter.total)
                    table, encoded = _described([document.cleaned.text for document in kept], part)
                    before = meter.done
                    table["source"] = [document.source for document in kept]
                    table["number"] = [document.number for document in kept]
                    table["rank"] = rank
                    table["start"] = start + np.cumsum(table["size"]) - table["size"]
                    tables.append(table)
                    start += file.write(b"".join(encoded))
            self._table(rank).write_bytes(np.concatenate(tables).tobytes())
        except OSError as error:
            raise cannot_write(self._texts(rank), 0, error, "the cleaned text") from None
        return counts.tolist()

    def records(self, ranks: int) -> np.ndarray:
        """The records of all ranks, in the order of documents."""
        return ordered(np.concatenate(self._tables(self._table, ranks)))

    def cut(self, records: np.ndarray, fraction: float, rank: int, told: Callable[[float, float], None]) -> None:
        """Writes the records of the documents that these texts are cut into. Raises StorageError."""
        tables = [np.empty(0, RECORD)]
        done, total = 0, int(records["characters"].sum())
        for record, text in zip(records, self.texts(records), strict=True):
            for table in _cut_records(record, text, fraction):
                tables.append(table)
                done += int(table["characters"].sum())
                told(done, total)
        try:
            self._pieces(rank).write_bytes(np.concatenate(tables).tobytes())
        except OSError as error:
            size = sum(table.nbytes for table in tables)
            raise cannot_write(self._pieces(rank), size, error, "records of documents") from None

    def pieces(self, ranks: int) -> list[np.ndarray]:
        """What all ranks have cut."""
        return self._tables(self._pieces, ranks)

    def texts(self, records: np.ndarray) -> Iterator[str]:
        """The texts of some records, whoever cleaned them."""
        with ExitStack() as stack:
            try:
                ranks = np.unique(records["rank"]).tolist()
                opened = {rank: stack.enter_context(open(self._texts(rank), "rb")) for rank in ranks}
            except OSError as error:
                raise self._not_shared(error) from None
            for rank, start, size in records[["rank", "start", "size"]].tolist():
                yield os.pread(opened[rank].fileno(), size, start).decode()

    def write_contents(self, shard: int, documents: Iterable[np.ndarray]) -> None:
        """Keeps the digests of a shard's documents. Raises StorageError."""
        digests = b"".join(map(catalog.document_digest, documents))
        try:
            self._contents(shard).write_bytes(digests)
        except OSError as error:
            raise cannot_write(self._contents(shard), len(digests), error, "digests of documents") from None

    def content(self, tokenizer_hash: str, shards: Sequence["ShardPlan"]) -> str:
        """The digest of the corpus, from those of all documents. Raises DataError."""
        numbers = {split: [n for n, shard in enumerate(shards) if shard.split == split] for split in catalog.SPLITS}
        try:
            return catalog.content_digest(
                tokenizer_hash,
                {split: (self._contents(n).read_bytes() for n in mine) for split, mine in numbers.items()},
            )
        except OSError as error:
            raise self._not_shared(error) from None

    def _tables(self, path: Callable[[int], Path], ranks: int) -> list[np.ndarray]:
        try:
            return [np.fromfile(path(rank), RECORD) for rank in range(ranks)]
        except OSError as error:
            raise self._not_shared(error) from None

    def _not_shared(self, error: OSError) -> DataError:
        return DataError(
            f"cannot read what another rank wrote to {self.folder} ({error.strerror}): "
            "choose an --out that all ranks share"
        )

    def _texts(self, rank: int) -> Path:
        return self.folder / f"text-{rank}.bin"

    def _table(self, rank: int) -> Path:
        return self.folder / f"records-{rank}.bin"

    def _pieces(self, rank: int) -> Path:
        return self.folder / f"pieces-{rank}.bin"

    def _contents(self, shard: int) -> Path:
        return self.folder / f"contents-{shard}.bin"


def _told_between(told: Callable[[float, float], None], before: int, after: int, total: int, share: float) -> None:
    told(before + min(1.0, share) * (after - before), total)


def _described(
    texts: Sequence[str], told: Callable[[float], None] = lambda share: None
) -> tuple[np.ndarray, list[bytes]]:  # fmt: skip
    """(records of texts without their place, the texts in UTF-8); `told` hears what share of the texts is done."""
    table = np.zeros(len(texts), RECORD)
    encoded = [text.encode() for text in texts]
    if texts:
        table["size"] = [len(data) for data in encoded]
        table["characters"] = [len(text) for text in texts]
        digests = b"".join(hashlib.sha256(data).digest()[:16] for data in encoded)
        table["digest"] = np.frombuffer(digests, ">u8").reshape(-1, 2)
        done, total = 0, int(table["size"].sum())

        def signed(size: int) -> None:
            nonlocal done
            done += size
            told(done / total)

        table["bands"] = similar.bands(texts, signed)
    return table, encoded


def _cut_records(record: np.ndarray, text: str, fraction: float) -> Iterator[np.ndarray]:
    """Tables of the documents that a text is cut into."""
    number, last, start = 0, 0, int(record["start"])  # of the next piece; characters and bytes before it
    for batch in batches(cut(text, fraction), lambda piece: piece.stop - piece.start):
        table, encoded = _described([text[piece.start : piece.stop] for piece in batch])
        for name in ("source", "number", "rank"):
            table[name] = record[name]
        table["piece"] = np.arange(number, number + len(batch))
        table["side"] = [piece.side for piece in batch]
        table["border"] = [piece.border for piece in batch]
        for row, (piece, data) in enumerate(zip(batch, encoded, strict=True)):
            start += len(text[last : piece.start].encode())  # what is lost between two pieces
            table["start"][row] = start
            last, start = piece.stop, start + len(data)
        number += len(batch)
        yield table


def _tokenizer(recipe: Recipe, group: Ranks, plan: Plan, spool: _Spool, told: Told) -> Tokenizer:
    content = ""
    with group.together("making the tokenizer"):
        if group.rank == 0:
            content = _make_tokenizer(recipe, plan, spool, partial(told, "tokenizer")).content.decode()
    return Tokenizer(group.broadcast(content, "the tokenizer").encode())


def _make_tokenizer(
    recipe: Recipe, plan: Plan, spool: _Spool, told: Callable[[float, float], None]
) -> Tokenizer:  # fmt: skip
    every = -(-int(plan.training["characters"].sum()) // TRAINING_CHARACTERS)
    chosen = plan.training[::every]
    total = int(chosen["characters"].sum())

    def texts() -> Iterator[str]:
        done = 0
        for piece, _ in pieces(spool.texts(chosen)):
            told(done, total)
            yield piece
            done += len(piece)
        told(total, total)

    return made(recipe.tokenizer, texts(), recipe.vocab, recipe.lowercase)


def _kind(choice: str) -> str:
    return choice if choice in MADE else "file"


def _write(number: int, shard: ShardPlan, spool: _Spool, tokenizer: Tokenizer) -> ShardEntry:
    documents = list(encode(tokenizer, spool.texts(shard.records)))
    characters, utf8_bytes = int(shard.records["characters"].sum()), int(shard.records["size"].sum())
    spool.write_contents(number, documents)
    return write_shard(
        spool.folder, shard.name, shard.split, documents, characters, utf8_bytes, tokenizer.hash, tokenizer.vocab_size
    )


def _gather(mine: dict[int, ShardEntry], group: Ranks) -> tuple[ShardEntry, ...]:
    """Every rank's shards, in the order of the plan."""
    plain = [[number, asdict(entry)] for number, entry in mine.items()]
    found = sorted(pair for part in group.allgather(plain, "shards") for pair in part)
    return tuple(msgspec.convert(entry, ShardEntry) for _, entry in found)
