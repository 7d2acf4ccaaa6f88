"""Blocks of an encoder-decoder. Between them flow what the decoder has (B, T, C), and the memory so far (B, S, C).

Whatever the decoder reads is looked up in front of the encoder, and flows past its blocks. So every cut of a pipeline
between two blocks is crossed by the same two arrays; of a lexical model by a third, the vectors of the source's tokens
(B, S, C). Where the batch has no source, the decoder's flows alone.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlm_mpi.layers.attention import CrossAttention, LexicalAttention
from mlm_mpi.layers.base import Context, Flow, Layer, Map, Side
from mlm_mpi.layers.block import Attends, Block, Branch, Norm
from mlm_mpi.params.store import Parameter

BOTH: tuple[Side, ...] = ("batch", "source")


class EncoderBlock:
    """A block over the memory so far, which reads the batch's source, then `norm`. Shapes: (B, T, C), (B, S, C) ->
    the same, but for the memory as they are."""

    def __init__(self, block: Block, norm: Layer | None = None, into: tuple[Side, ...] = BOTH) -> None:
        """`norm`: the last one of an encoder whose blocks have theirs in front; None in other blocks."""
        self.block, self.norm, self.INTO = block, norm, into

    def parameters(self) -> list[Parameter]:
        return [*self.block.parameters(), *([] if self.norm is None else self.norm.parameters())]

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, Any]:
        y, *of_source = x
        if not of_source:
            return x, None
        there, s_norm = ctx.of_source(), None
        (encoded,), s_block = self.block.forward((of_source[0],), there)
        if self.norm is not None:
            encoded, s_norm = self.norm.forward(encoded, there)
        return (y, encoded, *of_source[1:]), (s_block, s_norm)

    def backward(self, dy: Flow, saved: Any, ctx: Context) -> Flow:
        s_block, s_norm = saved
        owed: list[Callable[[Context], None]] = []
        there = replace(ctx.of_source(), later=None if ctx.later is None else owed)
        memory = dy[1] if self.norm is None else self.norm.backward(dy[1], s_norm, there)
        (memory,) = self.block.backward((memory,), s_block, there)
        ctx.owe(lambda at: _do(owed, at.of_source()))
        return dy[0], memory, *dy[2:]

    def maps(self, x: Flow, ctx: Context) -> dict[str, Map]:
        """Who attends to whom in it, by the name of what attends."""
        found = self.block.maps((x[1],), ctx.of_source())
        return {name: one._replace(rows="source", columns="source") for name, one in found.items()}


def _do(owed: list[Callable[[Context], None]], ctx: Context) -> None:
    for work in owed:
        work(ctx)


class DecoderBlock:
    """x + mixer(norm1(x)), x + cross(norm2(x), memory), x + mlp(norm3(x)). Shapes: (B, T, C), (B, S, C) -> the same,
    the latter as it is; of the last block (B, T, C) alone.

    The gradient of the memory is a sum over blocks, the last one's first.
    Source: Vaswani et al., arXiv:1706.03762, norms in front as in Xiong et al., arXiv:2002.04745.
    """

    def __init__(
        self, norm1: Norm, mixer: Branch, norm2: Norm, cross: CrossAttention, norm3: Norm, mlp: Branch,
        is_last: bool = False, into: tuple[Side, ...] = BOTH,
    ) -> None:  # fmt: skip
        self.norm1, self.mixer, self.norm2, self.cross, self.norm3, self.mlp = norm1, mixer, norm2, cross, norm3, mlp
        self.is_last, self.INTO = is_last, into

    def parameters(self) -> list[Parameter]:
        parts = (self.norm1, self.mixer, self.norm2, self.cross, self.norm3, self.mlp)
        return [p for part in parts for p in part.parameters()]

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, Any]:
        y, *memory = x
        n1, s_norm1 = self.norm1.forward(y, ctx)
        y, s_mixer = self.mixer.forward(n1, ctx, residual=y)
        n2, s_norm2 = self.norm2.forward(y, ctx)
        y, s_cross = self.cross.forward(n2, memory[0] if memory else None, ctx, residual=y)
        n3, s_norm3 = self.norm3.forward(y, ctx)
        y, s_mlp = self.mlp.forward(n3, ctx, residual=y)
        return (y,) if self.is_last else (y, *memory), (s_norm1, s_mixer, s_norm2, s_cross, s_norm3, s_mlp)

    def backward(self, dy: Flow, saved: Any, ctx: Context) -> Flow:
        s_norm1, s_mixer, s_norm2, s_cross, s_norm3, s_mlp = saved
        d, *of_source = dy
        d = self.norm3.backward(self.mlp.backward(d, s_mlp, ctx), s_norm3, ctx, add=d)
        dx, memory = self.cross.backward(d, s_cross, ctx)
        if of_source:
            memory += of_source[0]
        d = self.norm2.backward(dx, s_norm2, ctx, add=d)
        d = self.norm1.backward(self.mixer.backward(d, s_mixer, ctx), s_norm1, ctx, add=d)
        return d, memory, *of_source[1:]

    def maps(self, x: Flow, ctx: Context) -> dict[str, Map]:
        """As `EncoderBlock.maps`: of what it reads itself, and of the memory."""
        y, memory = x[:2]
        n1, found = self.norm1.forward(y, ctx)[0], dict[str, Map]()
        if isinstance(self.mixer, Attends):
            found[self.mixer.name] = Map(self.mixer.maps(n1, ctx))
        n2 = self.norm2.forward(self.mixer.forward(n1, ctx, residual=y)[0], ctx)[0]
        return found | {self.cross.name: Map(self.cross.maps(n2, memory, ctx), columns="source")}


class LexicalBlock:
    """x + attention(norm(x), memory, vectors). Shapes: (B, T, C), (B, S, C), (B, S, C) -> (B, T, C).

    So names, numbers and words that are hardly ever seen reach the head, of which the tied table knows each token by
    the vector that is handed on.
    """

    INTO: tuple[Side, ...] = (*BOTH, "source")

    def __init__(self, norm: Norm, attention: LexicalAttention) -> None:
        self.norm, self.attention = norm, attention

    def parameters(self) -> list[Parameter]:
        return [*self.norm.parameters(), *self.attention.parameters()]

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, Any]:
        y, *of_source = x
        n, s_norm = self.norm.forward(y, ctx)
        y, s_attention = self.attention.forward(n, of_source or None, ctx, residual=y)
        return (y,), (s_norm, s_attention)

    def backward(self, dy: Flow, saved: Any, ctx: Context) -> Flow:
        s_norm, s_attention = saved
        dn, of_source = self.attention.backward(dy[0], s_attention, ctx)
        return self.norm.backward(dn, s_norm, ctx, add=dy[0]), *of_source

    def maps(self, x: Flow, ctx: Context) -> dict[str, Map]:
        """As `EncoderBlock.maps`: of the memory."""
        n = self.norm.forward(x[0], ctx)[0]
        return {self.attention.name: Map(self.attention.maps(n, x[1:], ctx), columns="source")}
