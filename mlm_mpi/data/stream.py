"""All tokens of a split, verified shard by shard as they are read."""

import threading
from collections import OrderedDict

import numpy as np

from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.shards import ShardReader, Stamp
from mlm_mpi.errors import DataError

_OPEN_SHARDS = 32


class TokenStream:
    """All tokens of a split in catalog order, read across shard borders. Safe to share among threads."""

    def __init__(self, catalog: Catalog, split: str, open_shards: int = _OPEN_SHARDS) -> None:
        """Opens nothing yet; at most `open_shards` files stay open."""
        self.split = split
        self.tokens = catalog.tokens(split)
        self._folder = catalog.folder
        self._tokenizer = catalog.manifest.tokenizer
        self._shards = catalog.split(split)
        self._starts = np.array([shard.start for shard in self._shards], np.int64)
        self._limit = open_shards
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()  # the least recently used first
        self._verified: dict[int, Stamp] = {}
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop − 1, in their stored type. Raises DataError: out of range, or a damaged shard."""
        if not 0 <= start <= stop <= self.tokens:
            raise DataError(f"tokens {start} to {stop} are not in {self.split}, which has {self.tokens}")
        parts = []
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        with self._lock:
            while start < stop:
                shard = self._shards[number]
                end = min(stop, shard.stop)
                if start < end:
                    parts.append(self._reader(number).read(start - shard.start, end - shard.start))
                start, number = max(start, end), number + 1
        return np.concatenate(parts) if parts else np.empty(0, np.uint8)

    def close(self) -> None:
        """Closes the files; reading opens them again."""
        with self._lock:
            while self._readers:
                self._readers.popitem()[1].close()

    def _reader(self, number: int) -> ShardReader:
        if number not in self._readers:
            while len(self._readers) >= self._limit:
                self._readers.popitem(last=False)[1].close()
            entry = self._shards[number].entry
            reader = ShardReader(
                self._folder / entry.file, entry, self._tokenizer.hash, self._tokenizer.vocab_size,
                self._verified.get(number),
            )  # fmt: skip
            self._readers[number], self._verified[number] = reader, reader.stamp
        self._readers.move_to_end(number)
        return self._readers[number]
