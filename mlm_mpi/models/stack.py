"""A model as a list of blocks between an embedding and a head; the list that pipeline stages will cut."""

from collections.abc import Callable, Sequence
from typing import Any

from mlm_mpi.layers.base import Context
from mlm_mpi.layers.embedding import Embedding
from mlm_mpi.layers.norm import LayerNorm
from mlm_mpi.ops import crossentropy, matmul
from mlm_mpi.params.store import Parameter

Ready = Callable[[int], None]


class Head:
    """Final norm and the output projection that shares the token table. Shapes: (B, T, C) -> loss."""

    def __init__(self, name: str, width: int, epsilon: float, tokens: Parameter) -> None:
        self.norm = LayerNorm(f"{name}.norm", width, epsilon)
        self.tokens = tokens

    def parameters(self) -> list[Parameter]:
        """Its own; the token table belongs to the embedding."""
        return self.norm.parameters()

    def loss(self, x: Any, targets: Any, mask: Any, ctx: Context) -> Any:
        n, _ = self.norm.forward(x.reshape(-1, x.shape[2]), ctx)
        return crossentropy.loss(n, self.tokens.data, targets.reshape(-1), None if mask is None else mask.reshape(-1))

    def loss_and_grad(self, x: Any, targets: Any, mask: Any, ctx: Context) -> tuple[Any, Any]:
        n, saved = self.norm.forward(x.reshape(-1, x.shape[2]), ctx)
        flat_mask = None if mask is None else mask.reshape(-1)
        loss, dn = crossentropy.loss_and_grad(
            n, self.tokens.data, targets.reshape(-1), flat_mask, self.tokens.grad, ctx.accumulate
        )
        return loss, self.norm.backward(dn, saved, ctx).reshape(x.shape)

    def logits(self, x: Any, ctx: Context) -> Any:
        n, _ = self.norm.forward(x.reshape(-1, x.shape[2]), ctx)
        return matmul.product(n, self.tokens.data.T).reshape(*x.shape[:2], -1)


class Stack:
    """Embedding, blocks, head. Losses are sums over targets.

    `recompute`: a block keeps only its input, and its forward runs a second time before its backward; the
    same bits for a third more arithmetic. Source: Chen et al., arXiv:1604.06174.
    """

    def __init__(self, embedding: Embedding, blocks: Sequence[Any], head: Head, recompute: bool = False) -> None:
        self.embedding, self.blocks, self.head, self.recompute = embedding, list(blocks), head, recompute

    def parameter_blocks(self) -> list[list[Parameter]]:
        """Parameters by block, in forward order: the segments of the flat store."""
        return [part.parameters() for part in (self.embedding, *self.blocks, self.head)]

    def _hidden(self, ids: Any, ctx: Context) -> Any:
        x, _ = self.embedding.forward(ids, ctx)
        for block in self.blocks:
            x, _ = block.forward(x, ctx)
        return x

    def loss(self, ids: Any, targets: Any, mask: Any, ctx: Context) -> Any:
        """Summed loss in nats. Shapes: ids, targets (B, T), mask (B, T) or None."""
        return self.head.loss(self._hidden(ids, ctx), targets, mask, ctx)

    def logits(self, ids: Any, ctx: Context) -> Any:
        """Shapes: ids (B, T) -> (B, T, V); with `ctx.cache`, T new positions after those it holds."""
        logits = self.head.logits(self._hidden(ids, ctx), ctx)
        if ctx.cache is not None:
            ctx.cache.advance(ids.shape[1])
        return logits

    def loss_and_grad(self, ids: Any, targets: Any, mask: Any, ctx: Context, ready: Ready | None = None) -> Any:
        """Summed loss; writes or adds every gradient. `ready(i)` is called as soon as block i's are final."""
        ready = ready or (lambda block: None)
        loss, dx, saved = self.down_to_embedding(ids, targets, mask, ctx, ready)
        self.embedding.backward(dx, saved, ctx)
        ready(0)
        return loss

    def down_to_embedding(self, ids: Any, targets: Any, mask: Any, ctx: Context, ready: Ready) -> tuple[Any, Any, Any]:
        """`loss_and_grad` but for the embedding's own gradients: (loss, their dx, what they need).

        All of it is work of one shape that waits for nothing; the embedding sorts ids.
        """
        x, saved_embedding = self.embedding.forward(ids, ctx)
        saved_blocks = []
        for block in self.blocks:
            y, saved = block.forward(x, ctx)
            saved_blocks.append(x if self.recompute else saved)
            x = y
        loss, dx = self.head.loss_and_grad(x, targets, mask, ctx)
        ready(len(self.blocks) + 1)
        for number in range(len(self.blocks), 0, -1):
            block, saved = self.blocks[number - 1], saved_blocks.pop()
            if self.recompute:
                _, saved = block.forward(saved, ctx)
            dx = block.backward(dx, saved, ctx)
            ready(number)
        return loss, dx, saved_embedding
