"""BERT: an encoder, every position of which sees all others; post-norm as published, or pre-norm.

Source: Devlin et al., arXiv:1810.04805; pre-norm: Xiong et al., arXiv:2002.04745. What is left out of BERT: the bias of
its masked language model's logits, and the prediction of the next sentence, which RoBERTa (Liu et al.,
arXiv:1907.11692) found of no use. GELU is the tanh form of BERT's own release.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from mlm_mpi import order
from mlm_mpi.config.keys import key
from mlm_mpi.errors import ConfigError
from mlm_mpi.layers.attention import SelfAttention
from mlm_mpi.layers.base import Least, Part, Sizes, Trunk, elements
from mlm_mpi.layers.block import Block, FeedForward, PostNormBlock
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.embedding import EncoderEmbedding
from mlm_mpi.layers.head import Transform
from mlm_mpi.layers.linear import Linear, ResidualLinear
from mlm_mpi.layers.norm import LayerNorm
from mlm_mpi.params.store import equal

HEEDS = ("mesh.pp", "mesh.tp", "hidden tokens", "several texts a row")
BOTH_WAYS = True  # a position sees those behind it


@dataclass(frozen=True)
class Settings:
    """BERT: a stack of blocks whose positions all see each other, for what is told from a whole text."""

    kind: str = key("bert", says="The run trains this model.", room="models")
    layers: int = key(4, says="The model is a stack of this many blocks.", unit="blocks", least=1)
    width: int = key(
        256, says="Between blocks a token is this many numbers, a multiple of the heads.", unit="numbers", least=1
    )
    heads: int = key(4, says="This many heads share the attention of a block.", unit="heads", least=1)
    context: int = key(128, says="The model sees at most this many tokens at once.", unit="tokens", least=1)
    segments: int = key(
        2, says="A token lies in one of this many segments, such as the two texts of a pair.", unit="segments", least=1
    )
    ngrams: int = key(
        1,
        says="Each run of 2 up to this many tokens has a vector too, which is added where it ends; 1 means none. They "
        "teach words and endings of few texts sooner than attention does.",
        unit="tokens",
        least=1,
        most=8,
        remedy="longer runs are hardly ever seen twice",
    )
    ngram_buckets: int = key(
        32768,
        says="Runs of tokens share this many vectors, each taken by a hash of its tokens.",
        unit="vectors",
        least=1,
    )
    norm: Literal["post", "pre"] = key(
        "post",
        says="Layers are normalised behind the sum with what went past them, as BERT's are, or, if pre, before; then "
        "training is stable without a long warm-up.",
    )
    feed_forward: int = key(
        0,
        says="The feed-forward of a block is this wide inside; 0 means 4 times the width, as in BERT.",
        unit="numbers",
        least=0,
    )
    dropout: float = key(
        0.1, says="This share of the activations is set to zero at random in training.", least=0, below=1
    )
    init_std: float = key(
        0.02,
        says="Initial weights are drawn with this standard deviation, 0.02 as in BERT; of a pre-norm model projections "
        "back to the width start with it over the root of 2 · layers.",
        least=0,
        most=1,
        remedy="1 is a standard normal",
    )
    norm_epsilon: float = key(
        1e-12, says="Layer normalisation adds this to a variance, against division by zero.", above=0
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
    """An encoder of these settings and what a masked language model has between it and its table."""
    embedding = _embedding(settings, sizes)
    blocks = [_block(f"block{number}", settings, sizes.shares) for number in range(settings.layers)]
    transform = Transform("head", settings.width, settings.init_std, settings.norm_epsilon, final_norm(settings))
    return Trunk([embedding, *blocks], transform, settings.width, embedding.tokens)


def final_norm(settings: Settings) -> LayerNorm | None:
    """Of a pre-norm model: a new one, for the head that is put on it."""
    return LayerNorm("final.norm", settings.width, settings.norm_epsilon) if settings.norm == "pre" else None


def _embedding(settings: Settings, sizes: Sizes) -> EncoderEmbedding:
    s = settings
    norm = LayerNorm("embed.norm", s.width, s.norm_epsilon)
    return EncoderEmbedding(
        "embed", sizes.vocabulary, s.context, s.segments, s.width, s.init_std, s.dropout, norm, sizes.shares,
        s.ngrams, s.ngram_buckets,
    )  # fmt: skip


def _block(name: str, settings: Settings, shares: int = order.MOST) -> Part:
    width, hidden, std = settings.width, settings.feed_forward or 4 * settings.width, settings.init_std
    pre = settings.norm == "pre"
    out_std = std / math.sqrt(2 * settings.layers) if pre else std

    def drop(where: str) -> Dropout:
        return Dropout(f"{name}.{where}", settings.dropout)

    def join(where: str, inputs: int, number: int, pieces: int, unit: int = 1) -> ResidualLinear:
        each = equal(0, pieces, inputs // pieces)
        return ResidualLinear(
            f"{name}.{where}", inputs, width, out_std, drop(f"drop{number}"), unit, shares, matrices=(each,)
        )

    heads = settings.heads
    project = join("attention.project", width, 1, heads, width // heads)  # tp cuts whole heads
    probabilities = drop("attention.probabilities")
    mixer = SelfAttention(f"{name}.attention", heads, project, std, probabilities, shares, causal=False)
    each = order.shares(hidden)  # of the hidden units is a matrix, so that no cut of a mesh goes through one
    matrices = (equal(1, each, hidden // each),)
    up = Linear(f"{name}.feed_forward.up", width, hidden, std, cut=1, shares=shares, matrices=matrices)
    mlp = FeedForward(up, join("feed_forward.down", hidden, 2, each))
    norm1, norm2 = (LayerNorm(f"{name}.norm{number}", width, settings.norm_epsilon) for number in (1, 2))
    return Block(norm1, mixer, norm2, mlp) if pre else PostNormBlock(mixer, norm1, mlp, norm2)


def least(settings: Settings, sizes: Sizes, rows: int) -> Least:
    """Lower bounds for micro-batches of B rows of a text each; blocks are alike, and none but one is built."""
    one = rows * settings.context * settings.width  # (B, T, C)
    parameters = elements(_embedding(settings, sizes)) + settings.layers * elements(_block("block0", settings))
    return Least(settings.layers, parameters, settings.layers * one, one)


def flops(settings: Settings, sizes: Sizes, tokens: int) -> float:
    """Floating-point operations of forward and backward over `tokens` positions, attention counted in full, without
    those of a head, which sees few positions.

    6 per weight of a matrix product and token, and 12·C·T per layer and token for attention's scores and values
    (Chowdhery et al., PaLM, arXiv:2204.02311, appendix B).
    """
    hidden = settings.feed_forward or 4 * settings.width
    weights = settings.layers * (4 * settings.width**2 + 2 * settings.width * hidden)
    return float(tokens) * (6 * weights + 12 * settings.layers * settings.width * settings.context)
