"""Writing a text that is made of another, such as its translation, by an encoder-decoder."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from mlm_mpi.config import Config
from mlm_mpi.config.keys import key
from mlm_mpi.config.rules import shares
from mlm_mpi.data.dictionary import bare
from mlm_mpi.data.labelled import Examples, Labelled
from mlm_mpi.data.objectives import Samples
from mlm_mpi.data.texts import Nothing
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.data.translation import TextPairs, too_long
from mlm_mpi.errors import CheckpointError, DataError
from mlm_mpi.figures import translations
from mlm_mpi.layers.base import Least, Part, Sizes
from mlm_mpi.layers.head import TokenHead
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks import language_model
from mlm_mpi.train.checkpoint import Manifest
from mlm_mpi.train.corpus import origin
from mlm_mpi.train.measure import Sums

WRITES = True  # predictions are texts
NEEDS = ("several texts a row", "a source text")  # of a model: it reads such batches


@dataclass(frozen=True)
class Settings:
    """What the model learns: to write the targets of texts."""

    kind: str = key("translation", says="The model is trained for this task.", room="tasks")
    smoothing: float = key(
        0.1,
        says="This part of a target is shared by all tokens, against certainty beyond evidence; held-out losses are "
        "without it.",
        least=0,
        below=1,
    )
    too_long: Literal["refuse", "cut"] = key(
        "refuse",
        says="Pairs of which a side is longer than the context are refused, or cut at their ends and counted.",
    )


def build(config: Config, plugins: Plugins) -> "Translation":
    """The task over the pairs in `data.dir`. Raises DataError."""
    return Translation(config, plugins)


def parts(config: Config, plugins: Plugins, sizes: Sizes) -> list[Part]:
    """The model and its head; a checkpoint's, where there are no texts."""
    trunk = plugins.find("models", config.model.kind, "model.kind").build(config.model, sizes)
    return [*trunk.parts, TokenHead(trunk, config.task.smoothing)]


least = language_model.least


class Translation:
    """The task (train/task.py) on one rank."""

    unit, sample = "tokens", "pairs"
    figures: Mapping[str, bool] = MappingProxyType({"perplexity": False})

    def __init__(self, config: Config, plugins: Plugins) -> None:
        self.config, self.plugins, self.model = config, plugins, config.model.kind
        self.texts = Labelled.open(config.data.dir, kind="pairs")
        self.texts.check_files()
        tokenizer = self._tokenizer
        self.eot = tokenizer.eot
        self.tokenizer, self.hash, self.vocabulary = tokenizer.content, tokenizer.hash, tokenizer.vocab_size
        self.width, self.row_tokens, self.content = config.model.width, config.model.context, self.texts.content[:12]
        self._read: dict[str, Examples] = {}

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self.texts.tokenizer()

    def examples(self, split: str) -> Examples:
        """Those of a split, all of which stay in memory. Raises DataError."""
        if split not in self._read:
            self._read[split] = self.texts.examples(split)
        return self._read[split]

    def samples(self, split: str) -> Samples:
        if split == "heldout" and split not in self.texts.splits:
            return Nothing()
        examples = self.examples(split)
        cut, longest = too_long(examples, self.row_tokens)
        if cut and self.config.task.too_long == "refuse":
            raise DataError(
                f"{cut:,} pairs of {split} in {self.texts.folder} do not fit model.context = {self.row_tokens}, the "
                f'longest side needs {longest}: set model.context = {longest}, or task.too_long = "cut"'
            )
        return TextPairs(examples, self.row_tokens, self.eot)

    def notes(self) -> list[tuple[str, str]]:
        """Lines of the start table."""
        train = self.examples("train")
        cut, longest = too_long(train, self.row_tokens)
        long = f"; {cut:,} are cut, the longest side has {longest:,} tokens" if cut else ""
        source, target = (int(lengths.sum()) for lengths in (train.seconds, train.lengths - train.seconds))
        hints = " with hints" if self.texts.manifest.hints else ""
        return [
            ("pairs", f"{len(train):,} for training, {source:,} tokens of sources{hints}, {target:,} of targets{long}")
        ]

    def tokens(self, split: str) -> int:
        return int(self.examples(split).lengths.sum()) if split in self.texts.splits else 0

    def parts(self) -> list[Part]:
        return parts(self.config, self.plugins, Sizes(self.vocabulary, shares(self.config)))

    def least(self, rows: int) -> Least:
        return least(self.config, self.plugins, Sizes(self.vocabulary, shares(self.config)), rows)

    def about(self) -> dict[str, Any]:
        count = sum(map(sum, self.texts.manifest.counts.values()))
        words = f"{count:,} pairs of texts, content {self.texts.content[:12]}"
        hints = {"hints": self.texts.manifest.hints} if self.texts.manifest.hints else {}
        return {"vocabulary": self.vocabulary, "catalog": self.texts.digest, "corpus": words, "pairs": True} | hints

    def sources(self, split: str) -> list[np.ndarray]:
        """Token ids (t,) int32 of the sources of a split, without an end of text."""
        examples = self.examples(split)
        return [one.ids[: one.second] for one in map(examples.read, range(len(examples)))]

    def texts_of(self, split: str) -> list[tuple[str, str]]:
        """(source, target) of a split's pairs, without hints."""
        examples, decode = self.examples(split), self._tokenizer.decode
        targets = [one.ids[one.second :] for one in map(examples.read, range(len(examples)))]
        sources = self.sources(split)
        if self.texts.manifest.hints:
            sources = [bare(ids, self.eot) for ids in sources]
        return [(decode(s.tolist()), decode(t.tolist())) for s, t in zip(sources, targets, strict=True)]

    def translated(self, split: str, texts: Sequence[str]) -> dict[str, Any]:
        """Figures of what was made of its sources. Where sacrebleu is installed."""
        return translations.figures(texts, [target for _, target in self.texts_of(split)])

    def baselines(self, split: str) -> dict[str, Any]:
        return translations.baselines(self.texts_of("train"), self.texts_of(split))

    def quality(self, sums: Sums) -> dict[str, Any]:
        return {"perplexity": math.exp(min(sums.mean, 700.0))}

    def lines(self, numbers: dict[str, Any], of: str) -> list[str]:
        where = f"{numbers.get('split', 'held-out')} pairs"
        return [
            f"{where:<20}{numbers['tokens']:,} tokens of targets, ends of text among them; {of}",
            f"loss                {numbers['loss']:.4f} nats per token, perplexity {numbers['perplexity']:.2f}",
            *translations.lines(numbers),
        ]

    def refuse_other(self, path: Path, manifest: Manifest) -> None:
        if manifest.tokenizer != self.hash or manifest.catalog != self.texts.digest:
            what = "tokenizer" if manifest.tokenizer != self.hash else "catalog"
            raise CheckpointError(
                f"{path} was trained on another {what} than {self.texts.folder} holds: set data.dir to its own, "
                f"{origin(manifest)}, or give another --run"
            )
