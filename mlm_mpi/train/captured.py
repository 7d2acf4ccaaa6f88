"""Forward and backward by CUDA graphs."""

from dataclasses import replace
from typing import Any

from mlm_mpi.backend.arrays import Place, fill
from mlm_mpi.backend.cuda.graphs import Graphs
from mlm_mpi.data.batch import Batch
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.chain import Chain


class Captured:
    """Forward and backward of a micro-batch as CUDA graphs, one for each gradient buffer and way to add to it.

    All but the first part's own gradients: an embedding sorts ids, and a sort waits.
    """

    def __init__(self, chain: Chain, place: Place) -> None:
        self.chain, self.place = chain, place
        self.graphs = Graphs(place.xp)
        self.inputs: Batch | None = None  # the arrays that graphs read

    def forward_backward(self, ctx: Context) -> None:
        """Writes or adds every gradient and tallies, for micro-batches of one shape and without dropout."""
        assert ctx.batch is not None
        if self.inputs is None:
            self.inputs = ctx.batch.map(self.place.put)
        else:
            for array, host in zip(self.inputs.arrays(), ctx.batch.arrays(), strict=True):
                fill(array, host)
        ctx_there = replace(ctx, batch=self.inputs, tally={})
        gradient = next(iter(ctx.gradients.values()))
        tally, dy, kept = self.graphs.run((gradient.data.ptr, ctx.accumulate), lambda: self._both_ways(ctx_there))
        self.chain.parts[0].backward(dy, kept[0], ctx_there)
        ctx.tally.update({name: value.copy() for name, value in tally.items()})  # the next replay writes over them

    def _both_ways(self, ctx: Context) -> tuple[dict[str, Any], Any, list[Any]]:
        _, kept = self.chain.forward((), ctx)
        dy = self.chain.backward((), kept, ctx, down_to=1)
        return ctx.tally, dy, kept
