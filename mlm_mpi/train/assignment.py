"""Which rank runs which micro-batches: every rank computes the same assignment, and none of it enters a sum."""

from dataclasses import dataclass

from mlm_mpi.cut import cut


@dataclass(frozen=True)
class Assignment:
    """M micro-batches in J lanes over R ranks. Lane j holds micro-batches jM/J … (j+1)M/J − 1.

    Ranks beyond R are spares: they have no lanes, and all else, so that one of them works when one of the others dies.
    """

    micro_batches: int
    lanes: int
    ranks: int

    def lanes_of(self, rank: int) -> tuple[int, int]:
        """Lanes [first, stop) of a rank: contiguous, the first ranks hold one more where it is uneven."""
        if rank >= self.ranks:
            return self.lanes, self.lanes
        return cut(self.lanes, self.ranks, rank)

    def micro_batches_of(self, lane: int) -> range:
        """Micro-batch numbers of a lane, in the order in which their gradients are summed."""
        each = self.micro_batches // self.lanes
        return range(lane * each, (lane + 1) * each)

    def of_rank(self, rank: int) -> list[int]:
        """Micro-batch numbers of a rank, in the order it runs them."""
        return [index for lane in range(*self.lanes_of(rank)) for index in self.micro_batches_of(lane)]

    @property
    def balance(self) -> float:
        """Share of the ranks' time that is work if lanes cost alike: 3 ranks over 4 lanes give 0.67."""
        return self.lanes / (self.ranks * -(-self.lanes // self.ranks))
