"""Which window every row of every micro-batch holds: computed, never stored.

Sample number s = M·(rows of all earlier steps) + index·B + row of a run. The mixture says which corpus it comes from
and how many of that corpus came before it, c; its epoch is c div n and its window is perm(seed, epoch)(c mod n) for n
windows. The state is one integer, the step; no rank enters.
"""

import zlib

import numpy as np

from mlm_mpi.data.mixture import Mixture
from mlm_mpi.data.warmup import Ramp
from mlm_mpi.errors import DataError
from mlm_mpi.rng import key_of, permute

_AHEAD = 512  # samples drawn at once: 16 take 0.6 of their time, the calls dominate and not the elements


def digest(windows: np.ndarray) -> int:
    """CRC-32 of window numbers as int64: a float64 holds it exactly, so that it travels with the losses."""
    return zlib.crc32(windows.astype("<i8").tobytes())


class Sampler:
    """Every window of a corpus once per epoch, in an order keyed by seed and epoch; a step may straddle epochs."""

    def __init__(self, seed: int, mixture: Mixture, micro_batches: int, rows: Ramp) -> None:
        """M micro-batches of B rows per step. Raises DataError if a corpus has less than its share of a step."""
        need = micro_batches * rows.last
        for name, windows, weight in zip(mixture.names, mixture.windows, mixture.weights, strict=True):
            share = -(-need * weight // mixture.whole)
            if windows < share:
                of_it = "" if share == need else f", {share} of them from here"
                raise DataError(
                    f"{name} has {windows} windows, one step takes train.micro_batches * train.rows = {need}{of_it}: "
                    "prepare more text, or lower train.rows, train.micro_batches or model.context"
                )
        self.seed = seed
        self.mixture = mixture
        self.micro_batches = micro_batches
        self.rows = rows
        self._held: tuple[int, np.ndarray] = (0, np.empty(0, np.int64))  # the first sample, windows from there on

    def positions(self, step: int, index: int) -> np.ndarray:
        """Windows of the rows of micro-batch (step, index), numbered through all corpora. Shapes: -> (B,) int64."""
        begin, rows = self.samples(step), self.rows.at(step)
        first, windows = self._held
        count = self.micro_batches * rows
        if not first <= begin <= first + len(windows) - count:
            first, windows = self._held = begin, self.draw(begin, max(count, _AHEAD))
        at = begin - first + index * rows
        return windows[at : at + rows]

    def samples(self, steps: int) -> int:
        """Samples of the first so many steps, which is the number of the next one."""
        return self.micro_batches * self.rows.before(steps)

    def draw(self, first: int, count: int) -> np.ndarray:
        """Windows of samples first … first + count - 1 of the run. Shapes: -> (count,) int64."""
        out, base = np.empty(count, np.int64), 0
        for corpus, (before, places) in enumerate(self.mixture.split(first, count)):
            out[places] = base + self._windows(corpus, before, len(places))
            base += self.mixture.windows[corpus]
        return out

    def _windows(self, corpus: int, first: int, count: int) -> np.ndarray:
        """Windows of samples first … first + count - 1 of a corpus. Shapes: -> (count,) int64."""
        windows = self.mixture.windows[corpus]
        epoch, place = divmod(first, windows)
        epochs, places = np.divmod(np.arange(place, place + count), windows)
        name = [corpus] if corpus else []  # one alone keeps its order
        keys = [key_of(self.seed, "sampler", epoch + later, *name) for later in range(-(-(place + count) // windows))]
        if len(keys) == 1:  # the usual case, at 0.7 of the time
            return permute(keys[0], windows, places)
        k0, k1 = np.array(keys, np.uint64).reshape(-1, 2).T
        return permute((k0[epochs], k1[epochs]), windows, places)
