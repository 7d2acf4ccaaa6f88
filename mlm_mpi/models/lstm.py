"""The LSTM language model: a table of tokens, a stack of LSTM layers of one width, a head.

The state of every layer is zero at the beginning of a window, and with `data.documents = "separate"` at the first token
of a document. With `residual` and `final_norm` false it is the model of Zaremba et al., arXiv:1409.2329, with dropout
where they have it: behind the table and behind every layer. Residuals and norms, as in a pre-norm transformer, are the
default because three layers learn much faster with them (LOG.md, 2026-11-28).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from mlm_mpi import order
from mlm_mpi.config.keys import key
from mlm_mpi.layers.base import Layer, Least, Sizes, Trunk, elements
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.embedding import TokenEmbedding, token_table
from mlm_mpi.layers.norm import RMSNorm
from mlm_mpi.layers.recurrent import GRU, LSTM, Identity, RecurrentBlock
from mlm_mpi.params.store import Parameter

HEEDS = ("data.documents", "mesh.pp", "mesh.tp")  # the state is zero where a document starts


@dataclass(frozen=True)
class Settings:
    """A stack of LSTM layers that predicts the next token from a state, without attention."""

    kind: str = key("lstm", says="The run trains this model.", room="models")
    layers: int = key(2, says="The model is a stack of this many recurrent layers.", unit="layers", least=1)
    width: int = key(256, says="A token is this many numbers, and so is the state of a layer.", unit="numbers", least=1)
    context: int = key(
        128,
        says="A window of text has this many tokens; at its beginning every state is zero.",
        unit="tokens",
        least=1,
    )
    dropout: float = key(
        0.0,
        says="This share of what goes from layer to layer is set to zero at random in training; states go on whole.",
        least=0,
        below=1,
    )
    tied: bool = key(True, says="If true, the embedding's table is the head's too.")
    residual: bool = key(
        True, says="If true, a layer's result is added to what it was given, and it sees that normalised."
    )
    final_norm: bool = key(True, says="If true, the head sees the last layer's result normalised.")
    logit_cap: float = key(
        0.0, says="A logit x becomes cap · tanh(x / cap), which is at most this large; 0 means no cap.", least=0
    )
    init_std: float = key(
        0.0,
        says="Initial weights are drawn with this standard deviation; 0 means 1 over the root of 3 · width.",
        least=0,
        most=1,
        remedy="1 is a standard normal",
    )
    norm_epsilon: float = key(1e-5, says="Normalisation adds this to a mean square, against division by zero.", above=0)

    def resolved(self) -> "Settings":
        """The same with its standard deviation."""
        return replace(self, init_std=self.init_std or 1 / math.sqrt(3 * self.width))


Cells = Callable[..., LSTM | GRU]


def build(settings: Settings, sizes: Sizes) -> Trunk:
    """An LSTM of these settings, with parameters not yet bound to memory."""
    return stack(settings, sizes, LSTM)


def least(settings: Settings, sizes: Sizes, rows: int) -> Least:
    """Lower bounds for micro-batches of B rows; layers are alike, and none but one is built."""
    return bounds(settings, sizes, rows, LSTM)


def flops(settings: Settings, sizes: Sizes, tokens: int) -> float:
    """Floating-point operations of forward and backward over `tokens` positions: 6 per weight of a product, each."""
    return products(settings, sizes, tokens, LSTM.GATES)


# ---- of any cell


def stack(settings: Settings, sizes: Sizes, cells: Cells) -> Trunk:
    """A language model of these cells, with parameters not yet bound to memory."""
    settings = settings.resolved()
    embedding = _embedding(settings, sizes)
    blocks = [_block(f"layer{number}", settings, cells, sizes.shares) for number in range(settings.layers)]
    table = embedding.tokens if settings.tied else _head_table(settings, sizes)
    return Trunk([embedding, *blocks], _final_norm(settings), settings.width, table, settings.logit_cap)


def _embedding(settings: Settings, sizes: Sizes) -> TokenEmbedding:
    shape = sizes.vocabulary, settings.width
    return TokenEmbedding("embed", *shape, settings.init_std, settings.dropout, settings.tied, sizes.shares)


def _head_table(settings: Settings, sizes: Sizes) -> Parameter:
    return token_table("head.tokens", sizes.vocabulary, settings.width, settings.init_std, False, sizes.shares)


def _final_norm(settings: Settings) -> Layer:
    return RMSNorm("final.norm", settings.width, settings.norm_epsilon) if settings.final_norm else Identity()


def _block(name: str, settings: Settings, cells: Cells, shares: int = order.MOST) -> RecurrentBlock:
    cell = cells(f"{name}.cell", settings.width, settings.init_std, shares)
    norm = RMSNorm(f"{name}.norm", settings.width, settings.norm_epsilon) if settings.residual else None
    return RecurrentBlock(cell, Dropout(f"{name}.drop", settings.dropout), norm)


def bounds(settings: Settings, sizes: Sizes, rows: int, cells: Cells) -> Least:
    """Lower bounds for a stack of these cells."""
    one = rows * settings.context * settings.width  # (B, T, C)
    parameters = elements(_embedding(settings, sizes)) + elements(_final_norm(settings))
    parameters += settings.layers * elements(_block("layer0", settings, cells))
    parameters += 0 if settings.tied else sizes.vocabulary * settings.width
    return Least(settings.layers, parameters, settings.layers * one, one)


def products(settings: Settings, sizes: Sizes, tokens: int, gates: int) -> float:
    """Operations of a stack of cells of so many gates: of x and of h, each by a matrix per gate, and the head."""
    weights = settings.width * (settings.layers * 2 * gates * settings.width + sizes.vocabulary)
    return 6.0 * tokens * weights
