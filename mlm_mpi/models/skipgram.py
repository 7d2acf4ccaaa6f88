"""Skip-gram: a vector for each word, learnt so that it tells which words stand near it.

Two tables of one width and nothing else: the vectors, and those of the words that stand near. With
`task.kind = "word_vectors"` it is the model of Mikolov et al., arXiv:1301.3781 and 1310.4546; as a language model it
predicts a token from the one before it alone.
"""

import math
from dataclasses import dataclass, replace

from mlm_mpi.config.keys import key
from mlm_mpi.layers.base import Sizes, Trunk
from mlm_mpi.layers.embedding import TokenEmbedding, token_table
from mlm_mpi.layers.recurrent import Identity

HEEDS = ("pairs of words",)  # a vector is one word's, whatever stands beside it in a batch


@dataclass(frozen=True)
class Settings:
    """Skip-gram: a table of vectors, and another one of the words that stand near them."""

    kind: str = key("skipgram", says="The run trains this model.", room="models")
    width: int = key(100, says="A word is this many numbers.", unit="numbers", least=1)
    context: int = key(
        128,
        says="A stretch of text has this many tokens; words of two stretches are never seen together.",
        unit="tokens",
        least=1,
    )
    init_std: float = key(
        0.0,
        says="Initial vectors are drawn with this standard deviation; 0 means that of word2vec.c, 1 over the root of "
        "12 times the width. The second table starts at zero.",
        least=0,
        most=1,
        remedy="1 is a standard normal",
    )

    def resolved(self) -> "Settings":
        """The same with its standard deviation."""
        return replace(self, init_std=self.init_std or 1 / (math.sqrt(12) * self.width))


def build(settings: Settings, sizes: Sizes) -> Trunk:
    """Both tables, with parameters not yet bound to memory."""
    settings, shape = settings.resolved(), (sizes.vocabulary, settings.width)
    vectors = TokenEmbedding("embed", *shape, settings.init_std, 0.0, tied=False, shares=sizes.shares)
    near = token_table("head.tokens", *shape, "zeros", False, sizes.shares)
    return Trunk([vectors], Identity(), settings.width, near)
