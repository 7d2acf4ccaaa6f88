"""GPT-2: pre-norm decoder, learned positions, GELU-tanh, head tied to the token table.

Source: Radford et al. 2019. Residual projections start with std / √(2 L), as there.
"""

import math
from dataclasses import dataclass, replace

from mlm_mpi import order
from mlm_mpi.config.keys import key
from mlm_mpi.errors import ConfigError
from mlm_mpi.layers.attention import SelfAttention
from mlm_mpi.layers.base import Least, Sizes, Trunk, elements
from mlm_mpi.layers.block import Block, FeedForward
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.embedding import Embedding
from mlm_mpi.layers.linear import Linear, ResidualLinear
from mlm_mpi.layers.norm import LayerNorm
from mlm_mpi.params.store import equal

HEEDS = ("data.documents", "mesh.pp", "mesh.tp")  # attention sees where documents start; tp cuts heads


@dataclass(frozen=True)
class Settings:
    """GPT-2: a stack of blocks, each attention and a feed-forward, that predicts the next token."""

    kind: str = key("gpt", says="The run trains this model.", room="models")
    layers: int = key(4, says="The model is a stack of this many blocks.", unit="blocks", least=1)
    width: int = key(
        256,
        says="Between blocks a token is this many numbers, a multiple of the heads.",
        unit="numbers",
        least=1,
    )
    heads: int = key(4, says="This many heads share the attention of a block.", unit="heads", least=1)
    context: int = key(
        128,
        says="The model sees this many tokens at once, which is the length of a window of text.",
        unit="tokens",
        least=1,
    )
    feed_forward: int = key(
        0,
        says="The feed-forward of a block is this wide inside; 0 means 4 times the width, as in GPT-2.",
        unit="numbers",
        least=0,
    )
    dropout: float = key(
        0.0, says="This share of the activations is set to zero at random in training.", least=0, below=1
    )
    init_std: float = key(
        0.02,
        says="Initial weights are drawn with this standard deviation, 0.02 as in GPT-2; projections back to the "
        "width start with it over the root of 2 · layers.",
        least=0,
        most=1,
        remedy="1 is a standard normal",
    )
    norm_epsilon: float = key(
        1e-5, says="Layer normalisation adds this to a variance, against division by zero.", above=0
    )

    def resolved(self) -> "Settings":
        """The same with its width of the feed-forward. Raises ConfigError where the heads do not divide the width."""
        if self.width % self.heads != 0:
            raise ConfigError(
                f"model.width = {self.width} is not a multiple of model.heads = {self.heads}: "
                f"set model.width = {-(-self.width // self.heads) * self.heads}"
            )
        return replace(self, feed_forward=self.feed_forward or 4 * self.width)


def build(settings: Settings, sizes: Sizes) -> Trunk:
    """A GPT of these settings, with parameters not yet bound to memory."""
    embedding = _embedding(settings, sizes)
    blocks = [_block(f"block{number}", settings, sizes.shares) for number in range(settings.layers)]
    return Trunk([embedding, *blocks], _final_norm(settings), settings.width, embedding.tokens)


def _embedding(settings: Settings, sizes: Sizes) -> Embedding:
    shape = sizes.vocabulary, settings.context, settings.width
    return Embedding("embed", *shape, settings.init_std, settings.dropout, sizes.shares)


def _final_norm(settings: Settings) -> LayerNorm:
    return LayerNorm("final.norm", settings.width, settings.norm_epsilon)


def _block(name: str, settings: Settings, shares: int = order.MOST) -> Block:
    width, hidden, std = settings.width, settings.feed_forward or 4 * settings.width, settings.init_std
    out_std = std / math.sqrt(2 * settings.layers)

    def drop(where: str) -> Dropout:
        return Dropout(f"{name}.{where}", settings.dropout)

    def join(where: str, inputs: int, number: int, pieces: int, unit: int = 1) -> ResidualLinear:
        each = equal(0, pieces, inputs // pieces)
        return ResidualLinear(
            f"{name}.{where}", inputs, width, out_std, drop(f"drop{number}"), unit, shares, matrices=(each,)
        )

    project = join("attention.project", width, 1, settings.heads, width // settings.heads)  # tp cuts whole heads
    mixer = SelfAttention(f"{name}.attention", settings.heads, project, std, drop("attention.probabilities"), shares)
    each = order.shares(hidden)  # of the hidden units is a matrix, so that no cut of a mesh goes through one
    matrices = (equal(1, each, hidden // each),)
    up = Linear(f"{name}.feed_forward.up", width, hidden, std, cut=1, shares=shares, matrices=matrices)
    mlp = FeedForward(up, join("feed_forward.down", hidden, 2, each))
    norms = (LayerNorm(f"{name}.norm{number}", width, settings.norm_epsilon) for number in (1, 2))
    return Block(next(norms), mixer, next(norms), mlp)


def least(settings: Settings, sizes: Sizes, rows: int) -> Least:
    """Lower bounds for micro-batches of B rows; blocks are alike, and none but one is built."""
    one = rows * settings.context * settings.width  # (B, T, C)
    parameters = elements(_embedding(settings, sizes)) + elements(_final_norm(settings))
    parameters += settings.layers * elements(_block("block0", settings))
    return Least(settings.layers, parameters, settings.layers * one, one)


def flops(settings: Settings, sizes: Sizes, tokens: int) -> float:
    """Floating-point operations of forward and backward over `tokens` positions, attention counted in full.

    6 per weight of a matrix product and token, and 12·C·T per layer and token for attention's scores and values
    (Chowdhery et al., PaLM, arXiv:2204.02311, appendix B).
    """
    hidden = settings.feed_forward or 4 * settings.width
    weights = settings.layers * (4 * settings.width**2 + 2 * settings.width * hidden)
    attention = 12 * settings.layers * settings.width * settings.context
    return float(tokens) * (6 * (weights + sizes.vocabulary * settings.width) + attention)
