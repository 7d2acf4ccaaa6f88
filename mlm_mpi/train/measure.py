"""Held-out quality: the one evaluation, in the loop and in `mlm-mpi evaluate`, on any number of ranks."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from mlm_mpi.backend.arrays import Place, to_host
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.data.mixture import Joined, Mixture
from mlm_mpi.data.objectives import Samples
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.chain import Chain


class Sums(NamedTuple):
    """Summed loss in nats and the number of targets; `parts`: by the name of a corpus, where there are several.

    `outcomes` (n, k) float64: what the head tallied of each target, in the order of samples, where it does so.
    `bytes`: of the text of the targets, where samples tell it (`samples.bytes(count)`, of the first ones).
    """

    loss: float
    targets: int
    parts: Mapping[str, "Sums"] = MappingProxyType({})
    outcomes: np.ndarray | None = None
    bytes: int = 0

    @property
    def mean(self) -> float:
        return self.loss / self.targets


_AHEAD = 16  # micro-batches whose activations may lie in the memory of a stage that is faster than the one behind it

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
    if isinstance(samples, Joined):
        return _measure_each(chain, samples, rows, limit, mesh, place, tell)
    total = min(len(samples), limit) if limit else len(samples)
    if total == 0:
        return None
    rows = min(rows, total)  # rows that nothing fills would cost as much as the others
    count, group = -(-total // rows), mesh.group("dp")
    rounds, stages = -(-count // group.size), mesh.group("pp")
    mine, outcomes = np.zeros((rounds, 2)), dict[int, np.ndarray]()
    chain.weights.expect([chain.walk(len(range(rank, count, group.size))) for rank in range(group.size)])
    for k in range(rounds):
        number = k * group.size + group.rank
        if number < count:
            group.note(f"held-out micro-batch {number}")
            batch = samples.batch(range(number * rows, min((number + 1) * rows, total)), 0, number, rows)
            ctx = Context(mesh, batch=batch.map(place.put))
            chain.forward((), ctx)
            mine[k] = float(ctx.tally.get("loss", 0.0)), batch.count
            if "outcomes" in ctx.tally:
                outcomes[number] = to_host(ctx.tally["outcomes"])
        if k % _AHEAD == _AHEAD - 1:
            stages.barrier("the other stages")
        tell(k + 1, rounds)
    mine = stages.allgather_array(mine, "the last stage")[-1]  # which has the head
    table = group.allgather_array(mine, "held-out losses")  # (R, rounds, 2)
    ordered = table.swapaxes(0, 1).reshape(-1, 2)[:count]
    loss, targets = 0.0, 0.0
    for one, n in ordered.tolist():
        loss, targets = loss + one, targets + n
    size = samples.bytes(total) if hasattr(samples, "bytes") else 0
    return Sums(loss, int(targets), outcomes=_in_order(outcomes, mesh), bytes=size)


def _in_order(mine: dict[int, np.ndarray], mesh: Mesh) -> np.ndarray | None:
    """Outcomes of all micro-batches, by their number; None where no head tells any. Collective."""
    pairs = [[number, found.tolist()] for number, found in mine.items()]
    for axis in ("dp", "pp"):
        every = mesh.group(axis).allgather(pairs, "held-out outcomes")
        pairs = sorted((pair for some in every for pair in some), key=lambda pair: pair[0])
    rows = [row for _, found in pairs for row in found]
    return np.array(rows) if rows else None


def _measure_each(
    chain: Chain, samples: Joined, rows: int, limit: int, mesh: Mesh, place: Place, tell: Tell
) -> Sums | None:  # fmt: skip
    """Corpus by corpus; of `limit` samples each has as large a share as of all."""
    own = [(name, part) for name, part in zip(samples.mixture.names, samples.parts, strict=True) if len(part)]
    sizes = tuple(len(part) for _, part in own)
    shares = Mixture(sizes, sizes).counts(min(limit, sum(sizes)) if limit else sum(sizes))
    found: dict[str, Sums] = {}
    loss, targets = 0.0, 0
    for number, ((name, part), share) in enumerate(zip(own, shares, strict=True), 1):
        sums = measure(chain, part, rows, share, mesh, place) if share else None
        if sums is not None:
            found[name], loss, targets = sums, loss + sums.loss, targets + sums.targets
        tell(number, len(own))
    return Sums(loss, targets, found) if found else None
