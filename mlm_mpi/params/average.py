"""The moving average of weights, better than the last weights while the learning rate is large.

Source: Polyak, Juditsky, 1992; its correction: Kingma, Ba, arXiv:1412.6980, 3.
"""

from typing import Any

from mlm_mpi.backend.arrays import row_blocks
from mlm_mpi.exact import power
from mlm_mpi.params.ownership import Owned
from mlm_mpi.params.store import FlatStore


class Average:
    """`flat` ← k · flat + (1 − k) · weights after each update; number t, from 1, has k = d (1 − dᵗ⁻¹) / (1 − dᵗ).

    So after t updates it is Σ dᵗ⁻ⁱ wᵢ / Σ dᵗ⁻ⁱ, the average of decay d corrected for its beginning: initial weights are
    no part of it, after the first update it is that update's weights, and whoever reads it needs to know nothing else.
    """

    def __init__(self, store: FlatStore | Owned, decay: float) -> None:
        self.store, self.decay = store, decay
        self.flat = store.new_buffer()

    def follow(self, number: int) -> None:
        """Takes in the weights of update `number`, from 1. Cost: reads average and weights, writes the average."""
        keep = self.decay * (1.0 - power(self.decay, number - 1)) / (1.0 - power(self.decay, number))
        average, weights = self.flat, self.store.data
        for part in row_blocks(average):
            average[part] *= keep
            average[part] += weights[part] * (1.0 - keep)

    def state(self) -> dict[str, Any]:
        """Name -> flat buffer, saved with a checkpoint."""
        return {"average": self.flat}
