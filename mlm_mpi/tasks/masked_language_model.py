"""Finding the tokens that are hidden in a text: how an encoder is pre-trained."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from mlm_mpi.config import Config
from mlm_mpi.config.keys import key
from mlm_mpi.data.masking import Masked, inner_tokens
from mlm_mpi.data.objectives import Samples
from mlm_mpi.data.stream import TokenStream
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks import language_model
from mlm_mpi.train.measure import Sums

HEEDS = ("data.mixture",)
NEEDS = ("hidden tokens",)  # of a model: it reads them in a batch
BOTH_WAYS = True  # a model may see what stands behind a target

parts, least = language_model.parts, language_model.least


@dataclass(frozen=True)
class Settings:
    """What the model learns: tokens that are hidden, from what stands on both sides of them."""

    kind: str = key("masked_language_model", says="The model is trained for this task.", room="tasks")
    rate: float = key(
        0.15,
        says="This share of the words is chosen; of the tokens of these 80 % are hidden, 10 % are replaced by any "
        "other, and 10 % are left, and all of them have to be found.",
        above=0,
        below=1,
    )
    whole_words: bool = key(True, says="If true, all tokens of a word are chosen together.")


def build(config: Config, plugins: Plugins) -> "MaskedLanguageModel":
    """The task over the corpora that `data` names. Raises DataError."""
    return MaskedLanguageModel(config, plugins)


class MaskedLanguageModel(language_model.LanguageModel):
    """The task (train/task.py) on one rank."""

    figures: Mapping[str, bool] = MappingProxyType({"hidden_perplexity": False})

    def _samples(self, stream: TokenStream, training: bool) -> Samples:
        task = self.config.task
        tokenizer = self.corpora.tokenizer()
        return Masked(stream, self.row_tokens, training, tokenizer, self._inner, task.rate, self.config.train.seed)

    @cached_property
    def _inner(self) -> tuple[np.ndarray, np.ndarray]:
        return inner_tokens(self.corpora.tokenizer(), self.config.task.whole_words)

    def quality(self, sums: Sums) -> dict[str, Any]:
        return {"hidden_perplexity": math.exp(min(sums.mean, 700.0))}
