"""Predicting the tokens of a corpus: an objective over it, a model of models/, a head over the vocabulary."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlm_mpi.config import Config
from mlm_mpi.config.keys import key
from mlm_mpi.config.rules import shares
from mlm_mpi.data import baselines
from mlm_mpi.data.corpora import Corpora
from mlm_mpi.data.documents import Documents
from mlm_mpi.data.mixture import Joined
from mlm_mpi.data.objectives import Samples
from mlm_mpi.data.stream import TokenStream
from mlm_mpi.data.warmup import Pieces
from mlm_mpi.errors import CheckpointError
from mlm_mpi.layers.base import Least, Part, Sizes
from mlm_mpi.layers.head import TokenHead
from mlm_mpi.plug import Plugins
from mlm_mpi.train.checkpoint import Manifest
from mlm_mpi.train.corpus import in_words, origin
from mlm_mpi.train.measure import Sums

HEEDS = ("data.documents", "data.mixture", "train.context_warmup_steps")


@dataclass(frozen=True)
class Settings:
    """What the model learns: the next token of a text."""

    kind: str = key("language_model", says="The model is trained for this task.", room="tasks")
    objective: str = key(
        "causal",
        says="Windows of text become inputs and targets in this way; causal predicts each token from those before it.",
        room="objectives",
    )


def build(config: Config, plugins: Plugins) -> "LanguageModel":
    """The task over the corpora that `data` names. Raises DataError."""
    return LanguageModel(config, plugins)


def parts(config: Config, plugins: Plugins, sizes: Sizes) -> list[Part]:
    """The model and its head; a checkpoint's, where there is no corpus."""
    trunk = plugins.find("models", config.model.kind, "model.kind").build(config.model, sizes)
    return [*trunk.parts, TokenHead(trunk)]


def least(config: Config, plugins: Plugins, sizes: Sizes, rows: int) -> Least:
    """What the model says of itself, or what it has once built."""
    model = plugins.find("models", config.model.kind, "model.kind")
    if hasattr(model, "least"):
        found: Least = model.least(config.model, sizes, rows)
        return found
    made = parts(config, plugins, sizes)
    return Least(len(made), sum(math.prod(p.layout.shape) for part in made for p in part.parameters()))


class LanguageModel:
    """The task (train/task.py) on one rank."""

    unit = "tokens"
    figures: Mapping[str, bool] = MappingProxyType({"perplexity": False, "bits_per_character": False})

    def __init__(self, config: Config, plugins: Plugins) -> None:
        self.config, self.plugins, self.model = config, plugins, config.model.kind
        self.corpora = Corpora.open(config.data)
        self.corpora.check_files()
        tokenizer = self.corpora.tokenizer()
        self.eot = tokenizer.eot
        self.tokenizer, self.hash, self.vocabulary = tokenizer.content, tokenizer.hash, tokenizer.vocab_size
        self.width = getattr(config.model, "width", 0)  # a kind that heeds mesh.pp has it
        self.row_tokens, self.content = config.model.context, self.corpora.content[:12]

    def samples(self, split: str) -> Samples:
        corpora = self.corpora
        made = [self._samples(TokenStream(catalog, split), split == "train") for catalog in corpora.catalogs]
        return made[0] if len(made) == 1 else Joined(made, corpora.weights, corpora.names)

    def _samples(self, stream: TokenStream, training: bool) -> Samples:
        """Those of one corpus, as the steps and the model want them."""
        objective = self.plugins.find("objectives", self.config.task.objective, "task.objective")
        made: Samples = objective.samples(stream, self.row_tokens, training)
        if training and self.config.train.context_warmup_steps:
            made = Pieces(made, self.config.train.context_ramp(self.row_tokens))
        return Documents(made, self.eot) if self.config.data.documents == "separate" else made

    def tokens(self, split: str) -> int:
        return self.corpora.tokens(split)

    def parts(self) -> list[Part]:
        return parts(self.config, self.plugins, Sizes(self.vocabulary, shares(self.config)))

    def least(self, rows: int) -> Least:
        return least(self.config, self.plugins, Sizes(self.vocabulary, shares(self.config)), rows)

    def about(self) -> dict[str, Any]:
        return {"vocabulary": self.vocabulary, "catalog": self.corpora.digest, "corpus": in_words(self.corpora)}

    def quality(self, sums: Sums) -> dict[str, Any]:
        return quality(sums, self.corpora.characters("heldout"))

    def notes(self) -> list[tuple[str, str]]:
        return []

    def lines(self, numbers: dict[str, Any], of: str) -> list[str]:
        return lines(numbers, of) if "bits_per_character" in numbers else []

    def baselines(self, split: str) -> dict[str, Any]:
        (catalog,), tokenizer = self.corpora.catalogs, self.corpora.tokenizer()
        alone, after = baselines.xz_bits_per_character(catalog, tokenizer)
        return {
            "unigram_bits_per_character": baselines.unigram_bits_per_character(catalog, tokenizer.vocab_size),
            "xz_bits_per_character": alone, "xz_after_training_bits_per_character": after,
        }  # fmt: skip

    def refuse_other(self, path: Path, manifest: Manifest) -> None:
        if manifest.tokenizer != self.hash or manifest.catalog != self.corpora.digest:
            what = "tokenizer" if manifest.tokenizer != self.hash else "catalog"
            several = len(self.corpora.catalogs) > 1
            holder = f"the mixture of {' and '.join(self.corpora.names)}" if several else self.corpora.names[0]
            key = "data.mixture" if several else "data.dir"
            raise CheckpointError(
                f"{path} was trained on another {what} than {holder} holds: set {key} to its own, "
                f"{origin(manifest)}, or give another --run"
            )


def quality(sums: Sums, characters: int) -> dict[str, Any]:
    """Bits per character compare across tokenizers; the text's first token is not predicted."""
    return {
        "perplexity": math.exp(min(sums.mean, 700.0)),
        "bits_per_character": sums.loss / math.log(2) / characters,
        "characters": characters,
    }


def lines(numbers: dict[str, Any], of: str) -> list[str]:
    """Figures in words."""
    told = [
        f"held-out text       {numbers['tokens']:,} tokens, {numbers['characters']:,} characters; {of}",
        f"loss                {numbers['loss']:.4f} nats per token, perplexity {numbers['perplexity']:.2f}",
        f"bits per character  {numbers['bits_per_character']:.3f}",
    ]
    told += [f"  {name}  {loss:.4f} nats per token" for name, loss in numbers.get("loss_by_corpus", {}).items()]
    if "unigram_bits_per_character" in numbers:
        alone, after = numbers["xz_bits_per_character"], numbers["xz_after_training_bits_per_character"]
        told += [
            f"  unigram tokens    {numbers['unigram_bits_per_character']:.3f}",
            f"  xz -9e            {alone:.3f}; {after:.3f} with the training text in its window",
        ]
    return told
