"""The corpora of a run: one, or several that share a tokenizer."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from mlm_mpi.data import Data
from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.errors import DataError


@dataclass(frozen=True)
class Corpora:
    """Catalogs in the order of data.mixture, and the weight of each in parts of their sum."""

    catalogs: tuple[Catalog, ...]
    weights: tuple[int, ...] = (1,)

    @classmethod
    def open(cls, data: Data) -> "Corpora":
        """What `data` names. Raises DataError: no corpus there, or corpora with different tokenizers."""
        if not data.mixture:
            return cls((Catalog.open(data.dir),))
        first, *others = catalogs = tuple(Catalog.open(folder, "data.mixture") for folder in data.mixture)
        for other in others:
            if other.manifest.tokenizer.hash != first.manifest.tokenizer.hash:
                raise DataError(
                    f"{other.folder} has another tokenizer than {first.folder}: prepare it again with "
                    f"--tokenizer {first.folder / first.manifest.tokenizer.file}, or take it out of data.mixture"
                )
        return cls(catalogs, data.parts)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(catalog.folder) for catalog in self.catalogs)

    @property
    def digest(self) -> str:
        """SHA-256 of the catalog, or of all of them in their order."""
        return _together(catalog.digest for catalog in self.catalogs)

    @property
    def content(self) -> str:
        """SHA-256 of what the corpora say, in their order, however they are stored."""
        return _together(catalog.manifest.content for catalog in self.catalogs)

    def tokens(self, split: str) -> int:
        """Tokens of a split of all of them."""
        return sum(catalog.tokens(split) for catalog in self.catalogs)

    def characters(self, split: str) -> int:
        """Unicode characters of a split of all of them."""
        return sum(catalog.characters(split) for catalog in self.catalogs)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that they share. Raises DataError as `Catalog.tokenizer` does."""
        return self.catalogs[0].tokenizer()

    def check_files(self) -> None:
        """Every shard exists and has its size. Raises DataError."""
        for catalog in self.catalogs:
            catalog.check_files()


def _together(digests: Iterable[str]) -> str:
    """The only digest, or that of all."""
    first, *others = digests
    return hashlib.sha256("\n".join([first, *others]).encode()).hexdigest() if others else first
