"""A bag of words: each position sees the mean of all positions up to it. A model is one file, composed of layers.

B rows of a micro-batch, T positions of a row, C the width, N = B·T. Weights are NumPy arrays, or CuPy's on a GPU.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import module_of
from mlm_mpi.config.keys import key
from mlm_mpi.layers.base import Array, Context, Sizes, Trunk
from mlm_mpi.layers.block import Block, FeedForward
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.embedding import Embedding
from mlm_mpi.layers.linear import Linear, ResidualLinear
from mlm_mpi.layers.norm import LayerNorm
from mlm_mpi.params.store import Parameter

STD = 0.02  # initial weights are drawn with this standard deviation
EPSILON = 1e-5


@dataclass(frozen=True)
class Settings:
    """Bags of words in a stack of blocks."""

    kind: str = key("bag", says="The run trains this model.", room="models")
    layers: int = key(2, says="The model is a stack of this many blocks.", unit="blocks", least=1)
    width: int = key(64, says="Between blocks a token is this many numbers.", unit="numbers", least=1)
    context: int = key(64, says="The model sees this many tokens at once.", unit="tokens", least=1)


def build(settings: Settings, sizes: Sizes) -> Trunk:
    """The parts between which a pipeline may be cut, and what a head needs."""
    embedding = Embedding("embed", sizes.vocabulary, settings.context, settings.width, std=STD, dropout=0.0)
    blocks = [block(f"block{number}", settings.width) for number in range(settings.layers)]
    norm = LayerNorm("final.norm", settings.width, EPSILON)  # the last, in front of the task's head
    return Trunk([embedding, *blocks], norm, settings.width, embedding.tokens)


def block(name: str, width: int) -> Block:
    """x + mean(norm1(x)), then x + mlp(norm2(x)): GPT's block, with a mean where GPT has attention."""
    up = Linear(f"{name}.up", width, 4 * width, STD, cut=1)
    down = ResidualLinear(f"{name}.down", 4 * width, width, STD, Dropout(f"{name}.drop", 0.0))
    norm1, norm2 = (LayerNorm(f"{name}.norm{number}", width, EPSILON) for number in (1, 2))
    return Block(norm1, RunningMean(name), norm2, FeedForward(up, down))


class RunningMean:
    """y_t = (x_0 + … + x_t) / (t + 1), plus the residual. Shapes: (B, T, C) -> (B, T, C). It has no weights."""

    def __init__(self, name: str) -> None:
        self.name = name  # under which the cache of a generation keeps what it has seen

    def parameters(self) -> list[Parameter]:
        return []

    def forward(self, x: Array, ctx: Context, residual: Array = None) -> tuple[Array, Any]:
        """(y, nothing that backward needs). `residual` (N, C): the block's input, or None."""
        seen = x
        if ctx.cache is not None:  # generation gives new positions only: earlier ones come back as "keys" of one head
            seen = ctx.cache.extend(self.name, x[:, None], x[:, None])[0][:, 0]  # (B, earlier + T, C)
        y = (seen.cumsum(axis=1) / positions(seen))[:, -x.shape[1] :]
        return (y if residual is None else y + residual.reshape(x.shape)).astype(x.dtype), None

    def backward(self, dy: Array, saved: Any, ctx: Context) -> Array:
        """dx_s = Σ dy_t / (t + 1) over t ≥ s: a running sum from the end. The block adds the residual's gradient."""
        return (dy / positions(dy))[:, ::-1].cumsum(axis=1)[:, ::-1].astype(dy.dtype)


def positions(x: Array) -> Array:
    """1, 2, … T: what the sum of each prefix is divided by. Shapes: (B, T, C) -> (T, 1)."""
    return module_of(x).arange(1, x.shape[1] + 1, dtype=np.float32)[:, None]
