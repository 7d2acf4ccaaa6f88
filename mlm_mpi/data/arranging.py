"""Which documents of a corpus stay, which are held out, and what lies in which shard.

All of it is decided from records: what is known of a document without its text. Every rank does so by itself, from
the same records, and comes to the same plan.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from mlm_mpi.data import similar
from mlm_mpi.data.cutting import LEAST_HELD_OUT, PIECE, Side, border_names
from mlm_mpi.errors import DataError
from mlm_mpi.rng import key_of

_MIB = 1 << 20
_MOST_SHARDS = 100_000  # a catalog of more is not read
_TOO_LONG = 2.0  # times the fraction to be held out: of shorter texts some can be held out as a whole

# `source`, `number` and `piece` say which document it is; `rank`, `start` and `size` (bytes) where its text lies;
# `border` is what it was cut at. 24 band hashes are most of its 246 bytes.
RECORD = np.dtype(
    [
        ("source", "<u4"), ("number", "<i8"), ("piece", "<i4"), ("side", "u1"), ("border", "u1"), ("rank", "<u4"),
        ("start", "<i8"), ("size", "<i8"), ("characters", "<i8"), ("digest", "<u8", (2,)),
        ("bands", "<u8", (similar.BANDS,)),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class ShardPlan:
    """The documents of a shard, in their order."""

    split: str
    name: str
    records: np.ndarray


@dataclass(frozen=True)
class Cut:
    """What became of the long texts of a source, given by its number.

    They were cut into `documents` at `borders`, of which `tail` lie at their ends (before a licence, `has_licence`);
    `held` of these were held out, for what repeats earlier ones is not.
    """

    source: int
    texts: int
    documents: int
    tail: int
    held: int
    borders: tuple[str, ...]
    has_licence: bool

    def __str__(self) -> str:
        *others, last = self.borders or ("blank lines",)
        text = f"into {self.documents:,} documents at {', '.join(others)}{' and ' * bool(others)}{last}"
        before = " before Project Gutenberg's licence" if self.has_licence else ""
        if not self.tail:
            return text
        if self.texts > 1:
            return f"{text}, {self.held:,} at their ends held out"
        if self.held == self.tail:
            return f"{text}, the last {'one' if self.held == 1 else f'{self.held:,}'}{before} held out"
        return f"{text}, {self.held:,} of the last {self.tail:,}{before} held out, the others repeat earlier ones"


@dataclass(frozen=True)
class Plan:
    """Which documents stay, on which side, in which shard. `training`: records."""

    shards: list[ShardPlan]
    training: np.ndarray
    cuts: list[Cut]
    duplicates: int
    near_clusters: int
    near_documents: int


def ordered(records: np.ndarray) -> np.ndarray:
    """The same records in the order of documents."""
    return records[np.lexsort((records["piece"], records["number"], records["source"]))]


def too_long(records: np.ndarray, heldout: float, mode: Literal["auto", "never", "always"]) -> np.ndarray:
    """Which texts are to be cut. Shapes: n records -> (n,) bool.

    "auto": the texts of which one alone is far more than is to be held out, if they are most of the corpus, so that
    whole documents cannot make up a good held-out side. "always": all that are long enough. Never one whose tail would
    be too short to measure anything, and none that is there more than once, with small changes: cut elsewhere, the
    tail of one could hide in the body of the other.
    """
    if mode == "never" or (mode == "auto" and not heldout):
        return np.zeros(len(records), bool)
    characters = records["characters"]
    long = characters * min(heldout, 1 - heldout) >= LEAST_HELD_OUT if heldout else characters > PIECE
    if mode == "auto":
        big = characters > min(_TOO_LONG * heldout, 0.5) * characters.sum()
        long &= big & (2 * characters[big].sum() > characters.sum())
    if not long.any():
        return long
    labels = similar.clusters(records["bands"])
    return long & (np.bincount(labels, minlength=len(records))[labels] == 1)


def arrange(records: np.ndarray, heldout: float, seed: int, shard_bytes: int) -> Plan:
    """`shard_bytes`: of text in a shard, 0: a good size. Raises DataError for a corpus that cannot be split."""
    kept = records[first_of_each(records)]
    labels = similar.clusters(kept["bands"])
    members = np.bincount(labels)
    held = _held_out(kept, labels, heldout, seed)
    if not shard_bytes:
        shard_bytes = min(max(int(kept["size"].sum()) // 16, _MIB // 4), 64 * _MIB)
    shards = _cut_shards("train", kept[~held], shard_bytes) + _cut_shards("heldout", kept[held], shard_bytes)
    if len(shards) > _MOST_SHARDS:
        raise DataError(
            f"--shard-mib {shard_bytes / _MIB:g} makes {len(shards):,} shards, at most {_MOST_SHARDS:,} can be read: "
            "give a larger one"
        )
    return Plan(
        shards, kept[~held], _cuts(records, kept[held]), len(records) - len(kept), int((members > 1).sum()),
        int(members[members > 1].sum()),
    )  # fmt: skip


def first_of_each(records: np.ndarray) -> np.ndarray:
    """Indices of the first document with each content, ascending. Shapes: n records -> (m,)."""
    digests = records["digest"]
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal contents stay in document order
    new = np.ones(len(order), bool)
    new[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    return np.sort(order[new])


def _held_out(records: np.ndarray, labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which documents are held out. Of texts that were cut the tails, but for what is in their bodies too. Of others
    whole clusters, in a keyed order, as long as they fit into the fraction.

    A cluster's key comes from its smallest content hash, so the side does not depend on file names.
    Shapes: n records, (n,) labels -> (n,) bool. Raises DataError if nothing, or all, would be held out.
    """
    if fraction == 0:
        return np.zeros(len(records), bool)
    names, cluster = np.unique(labels, return_inverse=True)
    is_cut = np.bincount(cluster, records["side"] != Side.WHOLE) > 0
    taken = np.flatnonzero(np.bincount(cluster, records["side"] != Side.TAIL) == 0).tolist()
    characters = np.bincount(cluster, weights=records["characters"]).astype(np.int64).tolist()
    smallest: dict[int, tuple[int, int]] = {}
    for number, digest in zip(cluster.tolist(), map(tuple, records["digest"].tolist()), strict=True):
        smallest[number] = min(smallest.get(number, digest), digest)
    order = sorted(
        np.flatnonzero(~is_cut).tolist(),
        key=lambda number: (key_of(seed, "heldout", *smallest[number]), smallest[number]),
    )
    left = fraction * sum(characters[number] for number in order)
    for number in order:
        if characters[number] <= left:
            left -= characters[number]
            taken.append(number)
    if not taken and order:
        taken = [min(order, key=lambda number: characters[number])]
    if not 0 < len(taken) < len(names):
        raise _inseparable(records, len(names), fraction)
    return np.isin(cluster, taken)


def _inseparable(records: np.ndarray, clusters: int, fraction: float) -> DataError:
    characters, least = int(records["characters"].sum()), LEAST_HELD_OUT
    if clusters > 1 or (records["side"] != Side.WHOLE).any():
        return DataError(
            f"--heldout {fraction} is not possible, the end of the text repeats what stands before it: "
            "give more text, or set --heldout 0"
        )
    if len(records) > 1:
        return DataError(
            f"--heldout {fraction} needs documents that differ, this corpus has {len(records):,} in 1 group of similar "
            "ones: leave out all but one, give more files, or set --heldout 0"
        )
    if characters * min(fraction, 1 - fraction) >= least:
        return DataError(
            f"--heldout {fraction} of one document is not possible with --cut never: leave that out, give more files, "
            "or set --heldout 0"
        )
    enough = math.ceil(least / min(fraction, 1 - fraction))
    larger = math.ceil(100 * least / characters) / 100
    more = f"--heldout {larger}, " if fraction < larger <= 0.5 else ""
    return DataError(
        f"--heldout {fraction} of one document of {characters:,} characters is less than the {least} that say "
        f"anything about a model: give {enough:,} characters, more files, {more}or --heldout 0"
    )


def _cut_shards(split: str, records: np.ndarray, limit_bytes: int) -> list[ShardPlan]:
    """Runs of whole documents with at most `limit_bytes` of text, one document at least."""
    borders, size = [0], 0
    for number, more in enumerate(records["size"].tolist()):
        if size and size + more > limit_bytes:
            borders.append(number)
            size = 0
        size += more
    if len(records):
        borders.append(len(records))
    return [ShardPlan(split, f"{split}-{n:05d}", records[a:b]) for n, (a, b) in enumerate(pairwise(borders))]


def _cuts(records: np.ndarray, held: np.ndarray) -> list[Cut]:
    """What to tell of each source with a text that was cut."""
    pieces, names = records[records["side"] != Side.WHOLE], border_names()
    held = held[held["side"] == Side.TAIL]
    found = []
    for source in np.unique(pieces["source"]).tolist():
        mine = pieces[pieces["source"] == source]
        borders = np.unique(mine["border"][(mine["piece"] > 0) & (mine["side"] != Side.LICENCE)])
        found.append(
            Cut(
                source, len(np.unique(mine["number"])), len(mine), int((mine["side"] == Side.TAIL).sum()),
                int((held["source"] == source).sum()), tuple(names[border] for border in borders.tolist()),
                bool((mine["side"] == Side.LICENCE).any()),
            )
        )  # fmt: skip
    return found
