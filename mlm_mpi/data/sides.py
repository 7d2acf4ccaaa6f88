"""On which side of a labelled data set an example stands: training, held out, or test.

A side that is cut here is a function of the seed and of the example's source string alone. So equal strings never stand
on two sides, a text keeps its side when others are added or taken away, and two people cut alike without a list. It is
not stratified: then a text's side would depend on the others, and the shares of labels are met within what chance does.
"""

import hashlib
from collections.abc import Iterable, Mapping

from mlm_mpi.rng import key_of

SPLITS = ("train", "heldout", "test")
_CALLED = {
    "train": "train", "training": "train", "heldout": "heldout", "held-out": "heldout", "valid": "heldout",
    "validation": "heldout", "val": "heldout", "dev": "heldout", "test": "test",
}  # fmt: skip
NAMES = tuple(_CALLED)


def side_called(name: str) -> str | None:
    """The side that a data set calls by this name, whatever its case; None for an unknown name."""
    return _CALLED.get(name.strip().lower())


def side_of(source: str, seed: int, heldout: float, test: float) -> str:
    """The side of a source string. `heldout`, `test`: fractions of all strings; their sum is below 1.

    Who changes `heldout` alone leaves the test side as it is.
    """
    high, low = key_of(seed, "side", source)
    place = (high << 32 | low) / 2**64
    if place < test:
        return "test"
    return "heldout" if place < test + heldout else "train"


def split_digest(sources: Mapping[str, Iterable[bytes]]) -> str:
    """SHA-256 in hex of who stands where: of each side's name and of the SHA-256s of its source strings, each once, in
    ascending order. The order of rows, labels and tokenizer are no part of it."""
    whole = hashlib.sha256()
    for split in SPLITS:
        whole.update(split.encode() + b"\n")
        for digest in sorted(set(sources[split])):
            whole.update(digest)
    return whole.hexdigest()
