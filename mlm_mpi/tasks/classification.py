"""Telling the label of a text, or of a pair of texts, by an encoder with a classifier on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from mlm_mpi.config import Config
from mlm_mpi.config.keys import key
from mlm_mpi.config.rules import shares
from mlm_mpi.data.labelled import Examples, Labelled
from mlm_mpi.data.objectives import Samples
from mlm_mpi.data.texts import Noise, Nothing, Texts, balanced, too_long
from mlm_mpi.errors import CheckpointError, DataError
from mlm_mpi.figures import classes, linear
from mlm_mpi.layers.base import Least, Part, Sizes
from mlm_mpi.layers.classes import ClassHead, Pooling
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks import language_model
from mlm_mpi.train.checkpoint import Manifest
from mlm_mpi.train.corpus import origin
from mlm_mpi.train.measure import Sums

NEEDS = ("several texts a row",)  # of a model: it reads such batches
BOTH_WAYS = True  # a model may see all of a text
STEADY = False  # one text that is told wrong is a hundred times the loss of the others


@dataclass(frozen=True)
class Settings:
    """What the model learns: the labels of texts."""

    kind: str = key("classification", says="The model is trained for this task.", room="tasks")
    pooling: Literal["first", "mean"] = key(
        "first", says="The classifier sees the first position of a text, or the mean of all of them."
    )
    dropout: float = key(
        0.1, says="This share of what the classifier sees is set to zero at random in training.", least=0, below=1
    )
    weights: Literal["equal", "balanced"] = key(
        "equal",
        says="All texts count alike in the loss, or, if balanced, all labels do, however many texts each has.",
    )
    smoothing: float = key(
        0.0, says="This part of a target is shared by all labels, against certainty beyond evidence.", least=0, below=1
    )
    crop: float = key(
        0.0,
        says="In training a text is replaced with this probability by a part of it, of any length and from any place.",
        least=0,
        most=1,
    )
    hide: float = key(
        0.0,
        says="In training this share of the tokens is hidden from the model, drawn anew each time.",
        least=0,
        below=1,
    )
    split: float = key(
        0.0,
        says="In training a token of BPE is split with this probability into the two that it was merged from, and "
        "these again, so that words are also learned by their parts.",
        least=0,
        most=1,
    )
    too_long: Literal["cut", "refuse"] = key(
        "cut", says="Texts that are longer than the context are cut at their ends and counted, or refused."
    )


def build(config: Config, plugins: Plugins) -> "Classification":
    """The task over the labelled texts in `data.dir`. Raises DataError."""
    return Classification(config, plugins)


def parts(config: Config, plugins: Plugins, sizes: Sizes) -> list[Part]:
    """The model and its head; a checkpoint's, where there are no texts."""
    return ended(config, plugins, sizes, config.task.pooling)


def ended(config: Config, plugins: Plugins, sizes: Sizes, pooling: Pooling) -> list[Part]:
    """The model and a classifier on it."""
    module = plugins.find("models", config.model.kind, "model.kind")
    trunk, task = module.build(config.model, sizes), config.task
    std = getattr(config.model, "init_std", 0.02)
    norm = module.final_norm(config.model)
    head = ClassHead(trunk.width, sizes.labels, norm, pooling, task.dropout, std, task.smoothing)
    trunk.table.tied = False  # no head reads it
    return [*trunk.parts, head]


least = language_model.least


class Classification:
    """The task (train/task.py) on one rank."""

    unit = "texts"
    of_words = False
    figures: Mapping[str, bool] = MappingProxyType({"accuracy": True, "macro_f1": True, "weighted_f1": True})

    def __init__(self, config: Config, plugins: Plugins) -> None:
        self.config, self.plugins, self.model = config, plugins, config.model.kind
        self.texts = Labelled.open(config.data.dir, kind="words" if self.of_words else "texts")
        self.texts.check_files()
        tokenizer = self.texts.tokenizer()
        self.eot = tokenizer.eot
        self.tokenizer, self.hash, self.vocabulary = tokenizer.content, tokenizer.hash, tokenizer.vocab_size
        self.width, self.row_tokens, self.content = config.model.width, config.model.context, self.texts.content[:12]
        self._sizes = Sizes(self.vocabulary, shares(config), len(self.texts.labels))
        self._read: dict[str, Examples] = {}

    def examples(self, split: str) -> Examples:
        """Those of a split, all of which stay in memory. Raises DataError."""
        if split not in self._read:
            self._read[split] = self.texts.examples(split)
        return self._read[split]

    def samples(self, split: str) -> Samples:
        if split == "heldout" and split not in self.texts.splits:
            return Nothing()
        examples, context, pairs = self.examples(split), self.row_tokens, self.texts.has_pairs
        cut, longest = too_long(examples, context, pairs)
        if cut and self.config.task.too_long == "refuse":
            raise DataError(
                f"{cut:,} texts of {split} in {self.texts.folder} do not fit model.context = {context}, the longest "
                f'needs {longest}: raise it, or set task.too_long = "cut"'
            )
        training = split == "train"
        weights = balanced(examples.targets, len(self.texts.labels)) if self._balances and training else None
        task = self.config.task
        noise = self._noise() if training and (task.crop or task.hide or task.split) else None
        return Texts(examples, context, self.eot, pairs, weights, noise)

    def _noise(self) -> Noise:
        task = self.config.task
        parents = self.texts.tokenizer().parents() if task.split else np.zeros((0, 2), np.int32)
        return Noise(task.crop, task.hide, self.config.train.seed, task.split, parents)

    @property
    def _balances(self) -> bool:
        return bool(self.config.task.weights == "balanced")

    def notes(self) -> list[tuple[str, str]]:
        """Lines of the start table."""
        train = self.examples("train")
        cut, longest = too_long(train, self.row_tokens, self.texts.has_pairs)
        long = f"; {cut:,} are cut, the longest has {longest:,} tokens" if cut else ""
        counts = classes.counted(train.targets, self.texts.labels)
        return [("texts", f"{len(train):,} for training, {len(self.texts.labels):,} labels ({counts}){long}")]

    def tokens(self, split: str) -> int:
        return int(self.examples(split).lengths.sum()) if split in self.texts.splits else 0

    def parts(self) -> list[Part]:
        return parts(self.config, self.plugins, self._sizes)

    def least(self, rows: int) -> Least:
        return least(self.config, self.plugins, self._sizes, rows)

    def about(self) -> dict[str, Any]:
        count = sum(map(sum, self.texts.manifest.counts.values()))
        words = f"{count:,} {self.unit} of {len(self.texts.labels):,} labels, content {self.texts.content[:12]}"
        about = {"vocabulary": self.vocabulary, "catalog": self.texts.digest, "corpus": words}
        return about | {"labels": [*self.texts.labels], "pairs": self.texts.has_pairs}

    def quality(self, sums: Sums) -> dict[str, Any]:
        assert sums.outcomes is not None, "the head tells outcomes"
        return classes.figures(sums.outcomes, self.texts.labels)

    def lines(self, numbers: dict[str, Any], of: str) -> list[str]:
        return classes.lines(numbers, of)

    def baselines(self, split: str) -> dict[str, Any]:
        (train, targets), (other, wanted) = (self._decoded(name) for name in ("train", split))
        return linear.baselines(train, targets, other, wanted)

    def _decoded(self, split: str) -> tuple[list[str], np.ndarray]:
        """The texts of a split, pairs joined, and their labels' numbers."""
        examples, tokenizer = self.examples(split), self.texts.tokenizer()
        read = (examples.read(number) for number in range(len(examples)))
        texts = [
            " ".join(tokenizer.decode(part.tolist()) for part in np.split(one.ids, [one.second] if one.second else []))
            for one in read
        ]
        return texts, examples.targets

    def refuse_other(self, path: Path, manifest: Manifest) -> None:
        if manifest.tokenizer != self.hash or manifest.catalog != self.texts.digest:
            what = "tokenizer" if manifest.tokenizer != self.hash else "catalog"
            raise CheckpointError(
                f"{path} was trained on another {what} than {self.texts.folder} holds: set data.dir to its own, "
                f"{origin(manifest)}, or give another --run"
            )
