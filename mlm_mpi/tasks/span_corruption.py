"""Writing the spans that are taken out of a text: how an encoder-decoder is pre-trained (T5)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from mlm_mpi.config import Config
from mlm_mpi.config.keys import key
from mlm_mpi.config.rules import shares
from mlm_mpi.data.corruption import Corrupted, Spans
from mlm_mpi.data.objectives import Samples
from mlm_mpi.data.stream import TokenStream
from mlm_mpi.errors import ConfigError
from mlm_mpi.layers.base import Least, Part, Sizes
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks import language_model
from mlm_mpi.train.measure import Sums

NEEDS = ("several texts a row", "a source text")  # of a model: it reads such batches
_COUNTED = 4096  # windows whose targets a baseline counts


@dataclass(frozen=True)
class Settings:
    """What the model learns: to write the spans that are taken out of a text, each behind its sentinel."""

    kind: str = key("span_corruption", says="The model is trained for this task.", room="tasks")
    rate: float = key(0.15, says="This share of the tokens is taken out of each window.", above=0, below=1)
    span: float = key(
        3.0, says="The spans that are taken out have this many tokens on average.", unit="tokens", least=1
    )


def build(config: Config, plugins: Plugins) -> "SpanCorruption":
    """The task over the corpus in `data.dir`. Raises DataError, ConfigError."""
    return SpanCorruption(config, plugins)


def parts(config: Config, plugins: Plugins, sizes: Sizes) -> list[Part]:
    """The model, whose table has a row for each sentinel behind those of the tokens, and its head."""
    return language_model.parts(config, plugins, _with_sentinels(config, sizes))


def least(config: Config, plugins: Plugins, sizes: Sizes, rows: int) -> Least:
    """As of a language model."""
    return language_model.least(config, plugins, _with_sentinels(config, sizes), rows)


def _with_sentinels(config: Config, sizes: Sizes) -> Sizes:
    return sizes._replace(vocabulary=sizes.vocabulary + _spans(config).sentinels(config.model.context))


def _spans(config: Config) -> Spans:
    """Raises ConfigError for a context without room for one."""
    spans = Spans(config.task.rate, config.task.span)
    if spans.window(config.model.context) < 2:
        raise ConfigError(
            f"model.context = {config.model.context} has no room for a span, its sentinels and an end: set "
            "model.context = 4 or more"
        )
    return spans


class SpanCorruption(language_model.LanguageModel):
    """The task (train/task.py) on one rank. `row_tokens`: those of a window, as it stands in the text."""

    sample = "windows"
    figures: Mapping[str, bool] = MappingProxyType({"perplexity": False})

    def __init__(self, config: Config, plugins: Plugins) -> None:
        self.spans = _spans(config)
        super().__init__(config, plugins)
        self.row_tokens = self.spans.window(config.model.context)

    def _samples(self, stream: TokenStream, training: bool) -> Samples:
        config = self.config
        return Corrupted(
            stream, config.model.context, training, self.vocabulary, self.eot, self.spans, config.train.seed
        )

    def parts(self) -> list[Part]:
        return parts(self.config, self.plugins, Sizes(self.vocabulary, shares(self.config)))

    def least(self, rows: int) -> Least:
        return least(self.config, self.plugins, Sizes(self.vocabulary, shares(self.config)), rows)

    def notes(self) -> list[tuple[str, str]]:
        out, spans = self.spans.counts(self.row_tokens)
        sentinels = self.spans.sentinels(self.config.model.context)
        taken = f"{out} of the {self.row_tokens} tokens of a window, in {spans} span{'s' * (spans > 1)}"
        return [("spans", f"{taken}; {sentinels} sentinels behind the {self.vocabulary:,} tokens")]

    def quality(self, sums: Sums) -> dict[str, Any]:
        return {"perplexity": math.exp(min(sums.mean, 700.0))}

    def baselines(self, split: str) -> dict[str, Any]:
        """The loss of who knows how often each token is a target in training, and nothing of the text."""
        counts = np.ones(self.vocabulary + self.spans.sentinels(self.config.model.context))
        for ids in self._targets("train"):
            counts += np.bincount(ids, minlength=len(counts))
        nats, found = -np.log(counts / counts.sum()), [*self._targets(split)]
        return {"unigram_loss": float(np.concatenate([nats[ids] for ids in found]).mean())}

    def _targets(self, split: str) -> list[np.ndarray]:
        samples = self.samples(split)
        made = [samples.batch([number], 0, 0) for number in range(min(len(samples), _COUNTED))]
        return [batch.targets["ids"][batch.targets["mask"]] for batch in made]

    def lines(self, numbers: dict[str, Any], of: str) -> list[str]:
        told = [
            f"held-out spans      {numbers['tokens']:,} targets, sentinels and ends among them; {of}",
            f"loss                {numbers['loss']:.4f} nats per target, perplexity {numbers['perplexity']:.2f}",
        ]
        if "unigram_loss" in numbers:
            told.append(f"  unigram targets   {numbers['unigram_loss']:.4f}")
        return told
