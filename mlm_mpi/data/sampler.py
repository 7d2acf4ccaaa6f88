"""Which window every row of every micro-batch holds: computed, never stored.

Sample number s = (step·M + index)·B + row of a run; its epoch is s div n and its window is
perm(seed, epoch)(s mod n) for n windows. The state is one integer, the step; no rank enters.
"""

import numpy as np

from mlm_mpi.errors import DataError
from mlm_mpi.rng import key_of, permute


class Sampler:
    """Every window once per epoch, in an order keyed by seed and epoch; a step may straddle epochs."""

    def __init__(self, seed: int, windows: int, micro_batches: int, rows: int) -> None:
        """n windows, M micro-batches of B rows per step. Raises DataError if n < M·B."""
        need = micro_batches * rows
        if windows < need:
            raise DataError(
                f"the corpus has {windows} windows, one step takes train.micro_batches * train.rows = {need}: "
                "prepare more text, or lower train.rows, train.micro_batches or model.context"
            )
        self.seed = seed
        self.windows = windows
        self.micro_batches = micro_batches
        self.rows = rows
        self._held: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def positions(self, step: int, index: int) -> np.ndarray:
        """Windows of the rows of micro-batch (step, index). Shapes: -> (B,) int64."""
        held, windows = self._held
        if held != step:  # a whole step costs hardly more than one micro-batch: the calls dominate, not the elements
            windows = self._step(step)
            self._held = step, windows
        return windows[index * self.rows : (index + 1) * self.rows]

    def _step(self, step: int) -> np.ndarray:
        """Windows of all samples of a step. Shapes: -> (M·B,) int64."""
        count = self.micro_batches * self.rows
        first, done = step * count, 0
        out = np.empty(count, np.int64)
        while done < count:
            epoch, place = divmod(first + done, self.windows)
            part = min(count - done, self.windows - place)
            key = key_of(self.seed, "sampler", epoch)
            out[done : done + part] = permute(key, self.windows, np.arange(place, place + part))
            done += part
        return out
