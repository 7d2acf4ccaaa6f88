"""The modern decoder: RMSNorm, rotary positions, grouped queries, SwiGLU or squared ReLU, no biases.

The defaults are Llama's. What its relatives change is a key each: Qwen's biases or normalised queries and keys, tied
tables and layers without positions (SmolLM), a sliding window (Mistral), capped logits (Gemma), squared ReLU and
projections that start at zero (the recipe of `jobs/configs/tiny.toml`).
Sources: Touvron et al., arXiv:2302.13971; Grattafiori et al., arXiv:2407.21783; Yang et al. (Qwen3), arXiv:2505.09388;
Jiang et al. (Mistral), arXiv:2310.06825; Yang et al. (Tensor Programs V), arXiv:2203.03466, for starting at zero.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mlm_mpi import order
from mlm_mpi.config.keys import key
from mlm_mpi.errors import ConfigError
from mlm_mpi.layers.base import Least, Sizes, Trunk, elements
from mlm_mpi.layers.block import ActivatedFeedForward, Block
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.embedding import TokenEmbedding, token_table
from mlm_mpi.layers.grouped import GroupedAttention, Heads, Positions
from mlm_mpi.layers.linear import Linear, ResidualLinear
from mlm_mpi.layers.norm import RMSNorm
from mlm_mpi.ops import relu2, rotary, swiglu
from mlm_mpi.params.store import Parameter, equal

_GATE_UNIT = 64  # a width of 8/3 · C is rounded up to a multiple of it: four vectors of 16, and 8 shares of 8

HEEDS = ("data.documents", "mesh.pp", "mesh.tp")  # attention sees where documents start; tp cuts heads


@dataclass(frozen=True)
class Settings:
    """The modern decoder: a stack of blocks, each attention and a feed-forward, that predicts the next token."""

    kind: str = key("llama", says="The run trains this model.", room="models")
    layers: int = key(4, says="The model is a stack of this many blocks.", unit="blocks", least=1)
    width: int = key(256, says="Between blocks a token is this many numbers.", unit="numbers", least=1)
    heads: int = key(4, says="A block has this many heads of queries.", unit="heads", least=1)
    key_value_heads: int = key(
        0,
        says="A block has this many heads of keys and values, which divide the heads; 0 means as many as heads.",
        unit="heads",
        least=0,
    )
    head_width: int = key(
        0, says="A head is this wide, an even number; 0 means the width over the heads.", unit="numbers", least=0
    )
    context: int = key(
        128,
        says="The model sees this many tokens at once, which is the length of a window of text.",
        unit="tokens",
        least=1,
    )
    window: int = key(
        0,
        says="A token attends to this many tokens at most, itself among them, not to all of the context; 0 means all.",
        unit="tokens",
        least=0,
    )
    full_every: int = key(
        0,
        says="With a window, each block of this number (4: the 4th, the 8th, …) sees all; 0 means none does.",
        least=0,
    )
    feed_forward: int = key(
        0,
        says="The feed-forward of a block is this wide inside; 0 means 8/3 times the width, rounded up to a multiple "
        "of 64, for swiglu, and 4 times the width for relu2.",
        unit="numbers",
        least=0,
    )
    activation: Literal["swiglu", "relu2"] = key(
        "swiglu", says="The feed-forward bends its products by this function: a gated SiLU, or a squared ReLU."
    )
    qk_norm: bool = key(
        False, says="If true, queries and keys are normalised, with a gain each, before they are turned."
    )
    qkv_bias: bool = key(False, says="If true, queries, keys and values have a bias, as in Qwen2.")
    embedding_norm: bool = key(
        False, says="If true, a token's row of the table is normalised, with a gain, before the first block."
    )
    tied: bool = key(False, says="If true, the embedding's table is the head's too.")
    logit_cap: float = key(
        0.0, says="A logit x becomes cap · tanh(x / cap), which is at most this large; 0 means no cap.", least=0
    )
    zero_init: bool = key(False, says="If true, projections back to the width start at zero, and an untied head does.")
    rotary_base: float = key(10000.0, says="The slowest pair of a head turns by about 1 / this per position.", above=1)
    rotary_scaling: Literal["none", "linear", "llama3", "yarn"] = key(
        "none", says="Positions beyond an earlier training's context are squeezed into it in this way."
    )
    rotary_factor: float = key(1.0, says="The scaling stretches the context by this factor.", least=1)
    rotary_low: float = key(
        1.0, says="Pairs that turn less often in the original context are scaled in full (llama3, yarn).", above=0
    )
    rotary_high: float = key(
        32.0,
        says="Pairs that turn more often in the original context are not scaled (4 for llama3, 32 for yarn).",
        above=0,
    )
    rotary_original: int = key(8192, says="The earlier training's context (llama3, yarn).", unit="tokens", least=1)
    rotary_skip: int = key(
        0,
        says="Each block of this number (4: the 4th, the 8th, …) has no positions, as in SmolLM3; 0: all have.",
        least=0,
    )
    dropout: float = key(
        0.0, says="This share of the activations is set to zero at random in training.", least=0, below=1
    )
    init_std: float = key(
        0.02,
        says="Initial weights are drawn with this standard deviation; projections back to the width start with it over "
        "the root of 2 · layers.",
        least=0,
        most=1,
        remedy="1 is a standard normal",
    )
    norm_epsilon: float = key(1e-5, says="Normalisation adds this to a mean square, against division by zero.", above=0)

    def resolved(self) -> "Settings":
        """The same with every width. Raises ConfigError where heads, widths and window contradict each other."""
        groups, width = self.key_value_heads or self.heads, self.head_width or self.width // self.heads
        for holds, text in (
            (self.head_width or self.width % self.heads == 0,
             f"model.width = {self.width} is not a multiple of model.heads = {self.heads}: "
             f"set model.width = {-(-self.width // self.heads) * self.heads}, or model.head_width"),
            (self.heads % groups == 0,
             f"model.heads = {self.heads} is not a multiple of model.key_value_heads = {groups}: "
             f"set model.key_value_heads = {math.gcd(self.heads, groups)}"),
            (width % 2 == 0,
             f"a head is {width} numbers wide, which rotary positions turn in pairs: "
             f"set model.head_width = {width + 1}"),
            (self.window <= self.context,
             f"model.window = {self.window} is larger than model.context = {self.context}: "
             "set model.window = 0, which means all of it"),
            (self.rotary_low < self.rotary_high,
             f"model.rotary_low = {self.rotary_low:g} must be below model.rotary_high = {self.rotary_high:g}: "
             f"set model.rotary_high = {max(4.0, 4 * self.rotary_low):g}"),
        ):  # fmt: skip
            if not holds:
                raise ConfigError(text)
        return replace(self, key_value_heads=groups, head_width=width, feed_forward=self.feed_forward or self._hidden())

    def _hidden(self) -> int:
        if self.activation == "relu2":
            return 4 * self.width
        return -(-8 * self.width // 3 // _GATE_UNIT) * _GATE_UNIT


def build(settings: Settings, sizes: Sizes) -> Trunk:
    """A decoder of these settings, with parameters not yet bound to memory."""
    settings = settings.resolved()
    embedding = _embedding(settings, sizes)
    turned, still = (_positions(settings, width) for width in (settings.head_width, 0))
    blocks = []
    for number in range(settings.layers):
        positions = still if _each(settings.rotary_skip, number) else turned
        window = 0 if _each(settings.full_every, number) else settings.window
        blocks.append(_block(f"block{number}", settings, positions, window, sizes.shares))
    table = embedding.tokens if settings.tied else _head_table(settings, sizes)
    return Trunk([embedding, *blocks], _final_norm(settings), settings.width, table, settings.logit_cap)


def _each(period: int, number: int) -> bool:
    return period > 0 and (number + 1) % period == 0


def _embedding(settings: Settings, sizes: Sizes) -> TokenEmbedding:
    shape = sizes.vocabulary, settings.width
    norm = RMSNorm("embed.norm", settings.width, settings.norm_epsilon) if settings.embedding_norm else None
    return TokenEmbedding("embed", *shape, settings.init_std, settings.dropout, settings.tied, sizes.shares, norm)


def _head_table(settings: Settings, sizes: Sizes) -> Parameter:
    init = "zeros" if settings.zero_init else settings.init_std
    return token_table("head.tokens", sizes.vocabulary, settings.width, init, False, sizes.shares)


def _final_norm(settings: Settings) -> RMSNorm:
    return RMSNorm("final.norm", settings.width, settings.norm_epsilon)


def _positions(settings: Settings, width: int) -> Positions:
    s = settings
    scaling = rotary.Scaling(s.rotary_scaling, s.rotary_factor, s.rotary_low, s.rotary_high, s.rotary_original)
    return Positions(*rotary.tables(np.arange(s.context), width, s.rotary_base, scaling))


def _block(name: str, settings: Settings, positions: Positions, window: int, shares: int = order.MOST) -> Block:
    s, width = settings, settings.width
    out_init = "zeros" if s.zero_init else s.init_std / math.sqrt(2 * s.layers)

    def join(where: str, inputs: int, number: int, pieces: int, unit: int = 1) -> ResidualLinear:
        drop, each = Dropout(f"{name}.drop{number}", s.dropout), equal(0, pieces, inputs // pieces)
        return ResidualLinear(f"{name}.{where}", inputs, width, out_init, drop, unit, shares, False, (each,))

    heads = Heads(s.key_value_heads, s.heads // s.key_value_heads, s.head_width)
    project = join("attention.project", s.heads * s.head_width, 1, s.heads, heads.queries * heads.width)
    mixer = GroupedAttention(
        f"{name}.attention", heads, project, width, s.init_std, Dropout(f"{name}.attention.probabilities", s.dropout),
        positions, window, s.norm_epsilon if s.qk_norm else None, s.qkv_bias, shares,
    )  # fmt: skip
    hidden, gated = s.feed_forward, s.activation == "swiglu"
    each, dim = order.shares(hidden), 2 if gated else 1  # a share of the hidden units is a matrix: no mesh cuts one
    up = Linear(
        f"{name}.feed_forward.up", width, (2, hidden) if gated else hidden, s.init_std, cut=dim, shares=shares,
        bias=False, matrices=(*([equal(1, 2)] if gated else []), equal(dim, each, hidden // each)),
    )  # fmt: skip
    mlp = ActivatedFeedForward(up, swiglu if gated else relu2, join("feed_forward.down", hidden, 2, each))
    norms = (RMSNorm(f"{name}.norm{number}", width, s.norm_epsilon) for number in (1, 2))
    return Block(next(norms), mixer, next(norms), mlp)


def least(settings: Settings, sizes: Sizes, rows: int) -> Least:
    """Lower bounds for micro-batches of B rows; blocks are alike, and none but one is built."""
    s = settings.resolved()
    one = rows * s.context * s.width  # (B, T, C)
    parameters = elements(_embedding(s, sizes)) + elements(_final_norm(s)) + _blocks_weights(s)
    parameters += 0 if s.tied else sizes.vocabulary * s.width
    return Least(s.layers, parameters, s.layers * one, one)


def _blocks_weights(s: Settings) -> int:
    return s.layers * elements(_block("block0", s, Positions(None, None), 0))


def flops(settings: Settings, sizes: Sizes, tokens: int) -> float:
    """Floating-point operations of forward and backward over `tokens` positions, attention counted over its window.

    6 per weight of a matrix product and token, and 12·H·D·S per layer and token for attention's scores and values over
    S keys (Chowdhery et al., PaLM, arXiv:2204.02311, appendix B).
    """
    s = settings.resolved()
    products = s.heads * s.head_width * 2 + 2 * s.key_value_heads * s.head_width
    products += s.feed_forward * (3 if s.activation == "swiglu" else 2)
    weights = s.width * (s.layers * products + sizes.vocabulary)
    full = sum(not s.window or _each(s.full_every, number) for number in range(s.layers))
    seen = full * s.context + (s.layers - full) * s.window
    return float(tokens) * (6 * weights + 12 * s.heads * s.head_width * seen)
