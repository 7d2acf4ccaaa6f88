"""Forward and backward by CUDA graphs."""

from typing import TYPE_CHECKING, Any

from mlm_mpi.backend.arrays import fill
from mlm_mpi.backend.cuda.graphs import Graphs
from mlm_mpi.layers.base import Context
from mlm_mpi.models.stack import Stack
from mlm_mpi.params.store import FlatStore

if TYPE_CHECKING:  # a step needs no msgspec, see models/gpt.py
    from mlm_mpi.data.loader import MicroBatch


class Captured:
    """Forward and backward of a micro-batch as CUDA graphs, one for each gradient buffer and way to add to it."""

    def __init__(self, stack: Stack, store: FlatStore) -> None:
        self.stack, self.store = stack, store
        self.graphs = Graphs(store.xp)
        self.inputs: tuple[Any, ...] | None = None  # the arrays that graphs read

    def loss_and_grad(self, batch: "MicroBatch", ctx: Context) -> Any:
        """As `Stack.loss_and_grad`, for micro-batches of one shape and without dropout."""
        hosts = (batch.ids, batch.targets, batch.mask)
        if self.inputs is None:
            self.inputs = tuple(map(self.store.place.put, hosts))
        else:
            for array, host in zip(self.inputs, hosts, strict=True):
                if host is not None:
                    fill(array, host)
        ids, targets, mask = self.inputs
        gradient = self.store.spans[0].parameter.grad
        loss, dx, saved = self.graphs.run(
            (gradient.data.ptr, ctx.accumulate),
            lambda: self.stack.down_to_embedding(ids, targets, mask, ctx, lambda block: None),
        )
        self.stack.embedding.backward(dx, saved, ctx)
        return loss.copy()  # the next replay writes over it
