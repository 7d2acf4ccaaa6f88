"""Micro-batches from shards: a verified token stream, and a thread that reads ahead.

`micro_batch(step, index)` is a pure function of catalog, sampler and context; the thread only calls it
early. The thread never calls MPI.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.sampler import Sampler
from mlm_mpi.data.shards import ShardReader, Stamp
from mlm_mpi.errors import DataError

_OPEN_SHARDS = 32
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class MicroBatch:
    """B rows of T positions: `targets` is `ids` one token later.

    Shapes: ids, targets (B, T) int32; mask (B, T) bool, False where a target does not count, or None: all count.
    """

    step: int
    index: int
    ids: np.ndarray
    targets: np.ndarray
    mask: np.ndarray | None
    targets_count: int


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


class Loader:
    """Micro-batches in the order of a plan, up to `prefetch` of them made ahead of time."""

    def __init__(
        self, stream: TokenStream, sampler: Sampler, context: int, prefetch: int, timeout_s: float = 600.0
    ) -> None:  # fmt: skip
        self.waited_s = 0.0  # how long `next` has waited, in all
        self._stream = stream
        self._sampler = sampler
        self._context = context
        self._prefetch = prefetch
        self._timeout_s = timeout_s
        self._state = threading.Condition()
        self._ready: deque[MicroBatch] = deque()
        self._error: BaseException | None = None
        self._running = False
        self._thread: threading.Thread | None = None

    def micro_batch(self, step: int, index: int) -> MicroBatch:
        """Micro-batch `index` of `step`: the same wherever and whenever it is made. Raises DataError."""
        context = self._context
        starts = self._sampler.positions(step, index) * context
        rows = np.stack([self._stream.read(start, start + context + 1) for start in starts.tolist()]).astype(np.int32)
        ids, targets = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
        return MicroBatch(step, index, ids, targets, None, targets.size)

    def start(self, plan: Iterable[tuple[int, int]]) -> None:
        """Begins to make the (step, index) pairs of `plan`, which may be endless; an earlier plan is dropped."""
        self.close()
        self._running = True
        self._thread = threading.Thread(target=self._walk, args=(iter(plan),), name="loader", daemon=True)
        self._thread.start()

    def next(self) -> MicroBatch:
        """The next micro-batch of the plan. Raises what the thread raised; RuntimeError after the last."""
        begin = time.perf_counter()
        with self._state:
            came = self._state.wait_for(lambda: self._ready or not self._running, self._timeout_s)
            if not came:
                raise DataError(
                    f"waited {self._timeout_s:g} s (comm.timeout_s) for tokens of {self._stream.split}: "
                    "look at the file system that holds data.dir"
                )
            self.waited_s += time.perf_counter() - begin
            if self._ready:
                self._state.notify_all()
                return self._ready.popleft()
            if self._error is not None:
                raise self._error
            raise RuntimeError("the loader's plan is at its end")

    def close(self) -> None:
        """Ends the thread, at the latest after the micro-batch it is making."""
        with self._state:
            self._running = False
            self._state.notify_all()
        if self._thread is not None:
            self._thread.join(_PATIENCE_S)  # a read that hangs must not keep an error from ending the job
            self._thread = None
        self._ready.clear()
        self._error = None

    def _walk(self, plan: Iterator[tuple[int, int]]) -> None:
        try:
            for step, index in plan:
                made = self.micro_batch(step, index)
                with self._state:
                    self._state.wait_for(lambda: len(self._ready) < self._prefetch or not self._running)
                    if not self._running:
                        return
                    self._ready.append(made)
                    self._state.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._state:
                self._running = False
                self._state.notify_all()


def heldout_count(tokens: int, context: int, rows: int, windows: int = 0) -> int:
    """How many micro-batches cover the targets of a stream, or of its first `windows` windows."""
    total = _heldout_windows(tokens, context, windows)
    return -(-total // max(1, min(rows, total)))


def heldout_batch(stream: TokenStream, context: int, rows: int, number: int, windows: int = 0) -> MicroBatch:
    """Held-out micro-batch `number`: windows number·B …, in stream order, missing targets masked.

    Raises DataError if the stream has no target.
    """
    if stream.tokens < 2:
        raise DataError(
            f"{stream.split} has {stream.tokens} tokens, a target needs 2: prepare with a larger --heldout or more text"
        )
    total = _heldout_windows(stream.tokens, context, windows)
    rows = min(rows, total)  # rows that nothing fills would cost as much as the others
    ids, targets = np.zeros((rows, context), np.int32), np.zeros((rows, context), np.int32)
    mask = np.zeros((rows, context), bool)
    for row, window in enumerate(range(number * rows, min((number + 1) * rows, total))):
        start = window * context
        tokens = stream.read(start, min(start + context + 1, stream.tokens))
        count = len(tokens) - 1
        ids[row, :count], targets[row, :count], mask[row, :count] = tokens[:-1], tokens[1:], True
    count = int(mask.sum())
    return MicroBatch(0, number, ids, targets, None if count == mask.size else mask, count)


def heldout_batches(stream: TokenStream, context: int, rows: int, windows: int = 0) -> Iterator[MicroBatch]:
    """Every target of a stream exactly once (tokens − 1 of them), or those of its first `windows` windows."""
    for number in range(max(1, heldout_count(stream.tokens, context, rows, windows))):
        yield heldout_batch(stream, context, rows, number, windows)


def _heldout_windows(tokens: int, context: int, windows: int) -> int:
    whole = -(-max(0, tokens - 1) // context)  # the last one may be short
    return min(whole, windows) if windows else whole
