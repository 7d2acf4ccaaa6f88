"""A bag of words: each position sees the mean of all positions up to it. A model is one file, composed of layers."""

from dataclasses import dataclass

import numpy as np

from mlm_mpi.backend.arrays import module_of
from mlm_mpi.config.keys import key
from mlm_mpi.layers.base import Sizes, Trunk
from mlm_mpi.layers.block import Block, FeedForward
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.embedding import Embedding
from mlm_mpi.layers.linear import Linear, ResidualLinear
from mlm_mpi.layers.norm import LayerNorm


@dataclass(frozen=True)
class Settings:
    """Bags of words in a stack of blocks."""

    kind: str = key("bag", says="The run trains this model.", room="models")
    layers: int = key(2, says="The model is a stack of this many blocks.", unit="blocks", least=1)
    width: int = key(64, says="Between blocks a token is this many numbers.", unit="numbers", least=1)
    context: int = key(64, says="The model sees this many tokens at once.", unit="tokens", least=1)


def build(settings: Settings, sizes: Sizes) -> Trunk:
    """The parts between which a pipeline may be cut, and what a head needs."""
    embedding = Embedding("embed", sizes.vocabulary, settings.context, settings.width, 0.02, 0.0)
    blocks = [block(f"block{number}", settings.width) for number in range(settings.layers)]
    return Trunk([embedding, *blocks], LayerNorm("final.norm", settings.width, 1e-5), settings.width, embedding.tokens)


def block(name, width):
    up = Linear(f"{name}.up", width, 4 * width, 0.02, cut="out")
    down = ResidualLinear(f"{name}.down", 4 * width, width, 0.02, Dropout(f"{name}.drop", 0.0))
    norm1, norm2 = (LayerNorm(f"{name}.norm{number}", width, 1e-5) for number in (1, 2))
    return Block(norm1, RunningMean(name), norm2, FeedForward(up, down))


class RunningMean:
    """y_t = mean of x_0 … x_t, plus the residual. Shapes: (B, T, C) -> (B, T, C)."""

    def __init__(self, name):
        self.name = name

    def parameters(self):
        return []

    def forward(self, x, ctx, residual=None):
        seen = x
        if ctx.cache is not None:  # generation: what came before is kept as "keys"
            seen = ctx.cache.extend(self.name, x[:, None], x[:, None])[0][:, 0]
        y = (seen.cumsum(axis=1) / positions(seen))[:, -x.shape[1] :]
        return (y if residual is None else y + residual.reshape(x.shape)).astype(x.dtype), None

    def backward(self, dy, saved, ctx):
        return (dy / positions(dy))[:, ::-1].cumsum(axis=1)[:, ::-1].astype(dy.dtype)


def positions(x):
    """1, 2, … T as the sum of each prefix is divided by."""
    return module_of(x).arange(1, x.shape[1] + 1, dtype=np.float32)[:, None]
