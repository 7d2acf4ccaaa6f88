"""Held-out quality: the one evaluation, in the loop and in `mlm-mpi evaluate`, on any number of ranks."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mlm_mpi.backend.arrays import Place
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.data.objectives import Samples
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.chain import Chain


class Sums(NamedTuple):
    """Summed loss in nats and the number of targets."""

    loss: float
    targets: int

    @property
    def mean(self) -> float:
        return self.loss / self.targets


Tell = Callable[[int, int], None]


def _nobody_asks(done: int, total: int) -> None:
    pass


@np.errstate(over="ignore", invalid="ignore")
def measure(
    chain: Chain, samples: Samples, rows: int, limit: int, mesh: Mesh, place: Place, tell: Tell = _nobody_asks
) -> Sums | None:  # fmt: skip
    """Over the first `limit` samples (0: all), `rows` at a time; None where there is none. Collective over dp.

    `tell` hears how many of this rank's micro-batches are done, and how many there are.

    Losses are float64 and added in the order of micro-batches, so that every number of ranks gives the same bits.
    """
    total = min(len(samples), limit) if limit else len(samples)
    if total == 0:
        return None
    rows = min(rows, total)  # rows that nothing fills would cost as much as the others
    count, group = -(-total // rows), mesh.group("dp")
    rounds = -(-count // group.size)
    mine = np.zeros((rounds, 2))
    for k in range(rounds):
        number = k * group.size + group.rank
        if number < count:
            group.note(f"held-out micro-batch {number}")
            batch = samples.batch(range(number * rows, min((number + 1) * rows, total)), 0, number, rows)
            ctx = Context(mesh, batch=batch.map(place.put))
            chain.forward((), ctx)
            mine[k] = float(ctx.tally["loss"]), batch.count
        tell(k + 1, rounds)
    table = group.allgather_array(mine, "held-out losses")  # (R, rounds, 2)
    ordered = table.swapaxes(0, 1).reshape(-1, 2)[:count]
    loss, targets = 0.0, 0.0
    for one, n in ordered.tolist():
        loss, targets = loss + one, targets + n
    return Sums(loss, int(targets))
