"""GPT-2: pre-norm decoder, learned positions, GELU-tanh, head tied to the token table.

Source: Radford et al. 2019. Residual projections start with std / √(2 L), as there.
"""

import math
from typing import TYPE_CHECKING

from mlm_mpi.layers.block import Block
from mlm_mpi.layers.embedding import Embedding
from mlm_mpi.models.stack import Head, Stack

if TYPE_CHECKING:  # at run time any object with these fields will do: a step needs no msgspec
    from mlm_mpi.config import Model


def build(model: "Model", vocabulary: int, recompute: bool = False) -> Stack:
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


def step_flops(model: "Model", vocabulary: int, tokens: int) -> float:
    """Floating-point operations of forward and backward over `tokens` positions, attention counted in full.

    6 per weight of a matrix product and token, and 12·C·T per layer and token for attention's scores and values
    (Chowdhery et al., PaLM, arXiv:2204.02311, appendix B).
    """
    weights = model.layers * (4 * model.width**2 + 2 * model.width * model.feed_forward) + vocabulary * model.width
    attention = 12 * model.layers * model.width * model.context
    return float(tokens) * (6 * weights + attention)
