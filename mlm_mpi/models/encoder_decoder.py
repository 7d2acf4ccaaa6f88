"""The transformer of two halves: an encoder reads a text, a decoder writes another and attends to what it has made.

Source: Vaswani et al., arXiv:1706.03762, with norms in front of the layers (Xiong et al., arXiv:2002.04745), as T5 has
them (Raffel et al., arXiv:1910.10683), and with learned positions. One table serves source, target and output (Press
and Wolf, arXiv:1608.05859). Residual projections start with std / √(2 L), as in GPT-2, of the L blocks of their half.
"""

import math
from dataclasses import dataclass, replace

from mlm_mpi import order
from mlm_mpi.config.keys import key
from mlm_mpi.errors import ConfigError
from mlm_mpi.layers.attention import CrossAttention, LexicalAttention, SelfAttention
from mlm_mpi.layers.base import Least, Part, Side, Sizes, Trunk, elements
from mlm_mpi.layers.block import Block, FeedForward
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.embedding import PairEmbedding
from mlm_mpi.layers.encoder_decoder import BOTH, DecoderBlock, EncoderBlock, LexicalBlock
from mlm_mpi.layers.linear import Linear, ResidualLinear
from mlm_mpi.layers.norm import LayerNorm
from mlm_mpi.params.store import equal

HEEDS = ("mesh.pp", "mesh.tp", "several texts a row", "a source text")
READS = ("a source text",)  # what its batches have to hold


@dataclass(frozen=True)
class Settings:
    """An encoder and a decoder: for a text that is made of another, such as its translation."""

    kind: str = key("encoder_decoder", says="The run trains this model.", room="models")
    layers: int = key(4, says="The encoder is a stack of this many blocks.", unit="blocks", least=1)
    decoder_layers: int = key(
        0, says="The decoder is a stack of this many blocks; 0 means as many as the encoder.", unit="blocks", least=0
    )
    width: int = key(
        256, says="Between blocks a token is this many numbers, a multiple of the heads.", unit="numbers", least=1
    )
    heads: int = key(4, says="This many heads share the attention of a block.", unit="heads", least=1)
    context: int = key(
        128,
        says="The encoder sees at most this many tokens at once, and the decoder as many.",
        unit="tokens",
        least=1,
    )
    feed_forward: int = key(
        0,
        says="The feed-forward of a block is this wide inside; 0 means 4 times the width.",
        unit="numbers",
        least=0,
    )
    dropout: float = key(
        0.1, says="This share of the activations is set to zero at random in training.", least=0, below=1
    )
    init_std: float = key(
        0.02,
        says="Initial weights are drawn with this standard deviation; projections back to the width start with it over "
        "the root of 2 · layers.",
        least=0,
        most=1,
        remedy="1 is a standard normal",
    )
    norm_epsilon: float = key(
        1e-5, says="Layer normalisation adds this to a variance, against division by zero.", above=0
    )

    lexical: bool = key(
        False,
        says="A last layer attends to the source once more and hands its tokens on as they are: for names and rare "
        "words, and where sources hold words of the target.",
    )

    def resolved(self) -> "Settings":
        """The same with its width of the feed-forward and its blocks of the decoder. Raises ConfigError where the heads
        do not divide the width."""
        if self.width % self.heads != 0:
            raise ConfigError(
                f"model.width = {self.width} is not a multiple of model.heads = {self.heads}: "
                f"set model.width = {-(-self.width // self.heads) * self.heads}"
            )
        wide, blocks = self.feed_forward or 4 * self.width, self.decoder_layers or self.layers
        return replace(self, feed_forward=wide, decoder_layers=blocks)


def build(settings: Settings, sizes: Sizes) -> Trunk:
    """An encoder-decoder of these settings, with parameters not yet bound to memory."""
    s = settings.resolved()
    embedding, encoder, decoder = _embedding(s, sizes), _Half("encoder", s, s.layers, sizes.shares), _decoder(s, sizes)
    parts: list[Part] = [embedding]
    for number in range(s.layers):
        norm = encoder.layer_norm("final.norm") if number == s.layers - 1 else None
        parts.append(EncoderBlock(encoder.encoder_block(number), norm, encoder.into))
    parts += [decoder.decoder_block(number) for number in range(s.decoder_layers)]
    if s.lexical:
        parts.append(decoder.lexical_block())
    return Trunk(parts, decoder.layer_norm("final.norm"), s.width, embedding.tokens)


def _embedding(settings: Settings, sizes: Sizes) -> PairEmbedding:
    s = settings
    words = LayerNorm("embed.words.norm", s.width, s.norm_epsilon) if s.lexical else None
    return PairEmbedding("embed", sizes.vocabulary, s.context, s.width, s.init_std, s.dropout, sizes.shares, words)


def _decoder(settings: Settings, sizes: Sizes) -> "_Half":
    return _Half("decoder", settings, settings.decoder_layers, sizes.shares)


class _Half:
    """What blocks of a half are made of."""

    def __init__(self, name: str, settings: Settings, layers: int, shares: int = order.MOST) -> None:
        self.name, self.settings, self.layers, self.shares = name, settings, layers, shares

    def encoder_block(self, number: int) -> Block:
        """Its positions all see each other."""
        name = f"block{number}"
        mixer = self._attention(f"{name}.attention", causal=False)
        return Block(
            self.layer_norm(f"{name}.norm1"), mixer, self.layer_norm(f"{name}.norm2"), self._feed_forward(name)
        )

    def decoder_block(self, number: int) -> DecoderBlock:
        """No position sees a later one, and all see the memory."""
        name = f"block{number}"
        norms = [self.layer_norm(f"{name}.norm{place}") for place in (1, 2, 3)]
        mixer, cross = self._attention(f"{name}.attention", causal=True), self._cross(f"{name}.cross")
        is_last = number == self.layers - 1 and not self.settings.lexical
        return DecoderBlock(norms[0], mixer, norms[1], cross, norms[2], self._feed_forward(name), is_last, self.into)

    def lexical_block(self) -> LexicalBlock:
        """Behind the last block of a decoder. What it hands on is added as it is, to begin with."""
        s, name = self.settings, "lexical"
        join, drop = self._join(f"{name}.project", s.width, s.heads, s.width // s.heads, "identity"), self._drop(name)
        attention = LexicalAttention(f"{self.name}.{name}", s.heads, join, s.init_std, drop, self.shares)
        return LexicalBlock(self.layer_norm(f"{name}.norm"), attention)

    @property
    def into(self) -> tuple[Side, ...]:
        """Whose positions the arrays have that flow between blocks."""
        return (*BOTH, "source") if self.settings.lexical else BOTH

    def layer_norm(self, name: str) -> LayerNorm:
        return LayerNorm(f"{self.name}.{name}", self.settings.width, self.settings.norm_epsilon)

    def _attention(self, name: str, causal: bool) -> SelfAttention:
        s, full = self.settings, f"{self.name}.{name}"
        drop = self._drop(f"{name}.probabilities")
        return SelfAttention(full, s.heads, self._project(name), s.init_std, drop, self.shares, causal)

    def _cross(self, name: str) -> CrossAttention:
        s, drop = self.settings, self._drop(f"{name}.probabilities")
        return CrossAttention(f"{self.name}.{name}", s.heads, self._project(name), s.init_std, drop, self.shares)

    def _feed_forward(self, block: str) -> FeedForward:
        s, name = self.settings, f"{block}.feed_forward"
        hidden = s.feed_forward or 4 * s.width
        each = order.shares(hidden)  # of the hidden units is a matrix, so that no cut of a mesh goes through one
        matrices = (equal(1, each, hidden // each),)
        up = Linear(f"{self.name}.{name}.up", s.width, hidden, s.init_std, cut=1, shares=self.shares, matrices=matrices)
        return FeedForward(up, self._join(f"{name}.down", hidden, each))

    def _project(self, attention: str) -> ResidualLinear:
        s = self.settings
        return self._join(f"{attention}.project", s.width, s.heads, s.width // s.heads)  # tp cuts whole heads

    def _join(self, name: str, inputs: int, pieces: int, unit: int = 1, init: str = "") -> ResidualLinear:
        s = self.settings
        first, each = init or s.init_std / math.sqrt(2 * self.layers), equal(0, pieces, inputs // pieces)
        full, drop = f"{self.name}.{name}", self._drop(name)
        return ResidualLinear(full, inputs, s.width, first, drop, unit, self.shares, matrices=(each,))

    def _drop(self, name: str) -> Dropout:
        return Dropout(f"{self.name}.{name}", self.settings.dropout)


def least(settings: Settings, sizes: Sizes, rows: int) -> Least:
    """Lower bounds for micro-batches of B pairs; blocks of a half are alike, and none but one of each is built.

    A pair may be as short as two tokens: what is kept of it is not bounded by the context.
    """
    s = settings.resolved()
    layers = s.layers + s.decoder_layers
    one = 2 * rows * s.width  # (B, 2, C)
    parameters = elements(_embedding(s, sizes)) + 4 * s.width  # and the two last norms
    parameters += s.layers * elements(_Half("encoder", s, s.layers).encoder_block(0))
    parameters += s.decoder_layers * elements(_decoder(s, sizes).decoder_block(0))
    parameters += elements(_decoder(s, sizes).lexical_block()) if s.lexical else 0
    return Least(layers, parameters, layers * one, one)


def flops(settings: Settings, sizes: Sizes, tokens: int) -> float:
    """Floating-point operations of forward and backward over `tokens` target tokens and as many of their sources,
    without attention's scores and values, which go with the length of texts.

    6 per weight of a matrix product and token (Chowdhery et al., PaLM, arXiv:2204.02311, appendix B).
    """
    s = settings.resolved()
    square, wide = s.width * s.width, 2 * s.width * s.feed_forward
    weights = s.layers * (4 * square + wide) + s.decoder_layers * (8 * square + wide) + s.lexical * 3 * square
    return 6.0 * float(tokens) * (weights + sizes.vocabulary * s.width)
