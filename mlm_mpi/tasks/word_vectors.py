"""Learning a vector for each word from the words that stand near it: pairs of a corpus, a model of two tables.

Source: skip-gram with negative sampling, Mikolov et al., arXiv:1310.4546.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from mlm_mpi.config import Config
from mlm_mpi.config.keys import key
from mlm_mpi.config.rules import shares
from mlm_mpi.data.objectives import Samples
from mlm_mpi.data.pairs import Drawing, Noise, Pairs, counted, kept
from mlm_mpi.data.stream import TokenStream
from mlm_mpi.layers.base import Least, Part, Sizes
from mlm_mpi.layers.sampled import NegativeSampling
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks.language_model import LanguageModel
from mlm_mpi.train.measure import Sums

HEEDS = ("data.mixture",)
NEEDS = ("pairs of words",)  # of a model: it reads such batches, of any size


@dataclass(frozen=True)
class Settings:
    """What the model learns: vectors of words that stand near the same words."""

    kind: str = key("word_vectors", says="The model is trained for this task.", room="tasks")
    window: int = key(
        5,
        says="A word is seen with at most this many words on either side, fewer by chance, so that nearer ones count "
        "more.",
        unit="words",
        least=1,
        most=1024,
    )
    negatives: int = key(
        5,
        says="Each pair of words is told from this many words drawn by chance: 5 to 20 for small corpora, 2 to 5 for "
        "large ones.",
        unit="words",
        least=1,
        most=1024,
    )
    subsample: float = key(
        1e-3,
        says="Words that are a larger share of the text than this are left out at random, the more often the more "
        "frequent they are; 0 keeps all.",
        least=0,
        most=1,
    )
    noise_power: float = key(
        0.75, says="Words are drawn by chance by their frequency to this power; 0 draws all alike.", least=0, most=1
    )


def build(config: Config, plugins: Plugins) -> "WordVectors":
    """The task over the corpora that `data` names. Raises DataError."""
    return WordVectors(config, plugins)


def parts(config: Config, plugins: Plugins, sizes: Sizes) -> list[Part]:
    """The model and its head; a checkpoint's, where there is no corpus."""
    trunk = plugins.find("models", config.model.kind, "model.kind").build(config.model, sizes)
    return [*trunk.parts, NegativeSampling(trunk.table)]


def least(config: Config, plugins: Plugins, sizes: Sizes, rows: int) -> Least:
    """Lower bounds of two tables. How many pairs there will be is left to chance: none is counted."""
    return Least(2, 2 * sizes.vocabulary * config.model.width)


class WordVectors(LanguageModel):
    """The task (train/task.py) on one rank."""

    unit = "pairs"
    figures: Mapping[str, bool] = MappingProxyType({})

    def _samples(self, stream: TokenStream, training: bool) -> Samples:
        return Pairs(stream, self.row_tokens, training, self._drawing)

    @cached_property
    def _drawing(self) -> Drawing:
        task, tokenizer = self.config.task, self.corpora.tokenizer()
        left_out = [tokenizer.eot, *([] if tokenizer.unknown is None else [tokenizer.unknown])]
        streams = (TokenStream(catalog, "train") for catalog in self.corpora.catalogs)
        counts = counted(streams, self.vocabulary, left_out)
        noise = Noise(counts, task.noise_power)
        return Drawing(
            self.config.train.seed, kept(counts, task.subsample), noise, task.window, task.negatives, self.eot
        )

    def parts(self) -> list[Part]:
        return parts(self.config, self.plugins, Sizes(self.vocabulary, shares(self.config)))

    def least(self, rows: int) -> Least:
        return least(self.config, self.plugins, Sizes(self.vocabulary, shares(self.config)), rows)

    def quality(self, sums: Sums) -> dict[str, Any]:
        """What a pair costs vectors that know nothing, beside the loss that these have."""
        return {"nats of a guess": (1 + self.config.task.negatives) * math.log(2)}
