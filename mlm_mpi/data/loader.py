"""Micro-batches made ahead of time by a thread.

`micro_batch(step, index)` is a pure function of samples and sampler; the thread only calls it early. The thread never
calls MPI.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

from mlm_mpi.data.batch import Batch
from mlm_mpi.data.objectives import Samples
from mlm_mpi.data.sampler import Sampler, digest
from mlm_mpi.errors import DataError

_PATIENCE_S = 5.0


class Loader:
    """Micro-batches in the order of a plan, up to `prefetch` of them made ahead of time."""

    def __init__(self, samples: Samples, sampler: Sampler, prefetch: int, timeout_s: float = 600.0) -> None:
        self.waited_s = 0.0  # how long `next` has waited, in all
        self._samples = samples
        self._sampler = sampler
        self._prefetch = prefetch
        self._timeout_s = timeout_s
        self._state = threading.Condition()
        self._ready: deque[Batch] = deque()
        self._error: BaseException | None = None
        self._running = False
        self._thread: threading.Thread | None = None

    def micro_batch(self, step: int, index: int) -> Batch:
        """Micro-batch `index` of `step`: the same wherever and whenever it is made. Raises DataError."""
        windows = self._sampler.positions(step, index)
        return replace(self._samples.batch(windows.tolist(), step, index), digest=digest(windows))

    def start(self, plan: Iterable[tuple[int, int]]) -> None:
        """Begins to make the (step, index) pairs of `plan`, which may be endless; an earlier plan is dropped."""
        self.close()
        self._running = True
        self._thread = threading.Thread(target=self._walk, args=(iter(plan),), name="loader", daemon=True)
        self._thread.start()

    def next(self) -> Batch:
        """The next micro-batch of the plan. Raises what the thread raised; RuntimeError after the last."""
        begin = time.perf_counter()
        with self._state:
            came = self._state.wait_for(lambda: self._ready or not self._running, self._timeout_s)
            if not came:
                raise DataError(
                    f"waited {self._timeout_s:g} s (comm.timeout_s) for the samples of a micro-batch: "
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
