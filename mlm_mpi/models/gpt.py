"""GPT-2: pre-norm decoder, learned positions, GELU-tanh, head tied to the token table.

Source: Radford et al. 2019. Residual projections start with std / √(2 L), as there.
"""

import math
from dataclasses import dataclass, replace

from mlm_mpi.config.keys import key
from mlm_mpi.errors import ConfigError
from mlm_mpi.layers.block import Block
from mlm_mpi.layers.embedding import Embedding
from mlm_mpi.models.stack import Head, Stack


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


def build(model: Settings, vocabulary: int, recompute: bool = False) -> Stack:
    """A GPT of this configuration over `vocabulary` tokens, with parameters not yet bound to memory."""
    out_std = model.init_std / math.sqrt(2 * model.layers)
    embedding = Embedding("embed", vocabulary, model.context, model.width, model.init_std, model.dropout)
    blocks = [
        Block(
            f"block{i}", model.width, model.heads, model.feed_forward,
            model.init_std, out_std, model.norm_epsilon, model.dropout,
        )
        for i in range(model.layers)
    ]  # fmt: skip
    return Stack(embedding, blocks, Head("final", model.width, model.norm_epsilon, embedding.tokens), recompute)


def step_flops(model: Settings, vocabulary: int, tokens: int) -> float:
    """Floating-point operations of forward and backward over `tokens` positions, attention counted in full.

    6 per weight of a matrix product and token, and 12·C·T per layer and token for attention's scores and values
    (Chowdhery et al., PaLM, arXiv:2204.02311, appendix B).
    """
    weights = model.layers * (4 * model.width**2 + 2 * model.width * model.feed_forward) + vocabulary * model.width
    attention = 12 * model.layers * model.width * model.context
    return float(tokens) * (6 * weights + attention)
