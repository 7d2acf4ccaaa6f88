"""Telling the label of each word of a sentence, such as its part of speech or the name that it belongs to, by an
encoder with a classifier on the first token of each word.

Source: Devlin et al., arXiv:1810.04805, section 5.3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from mlm_mpi.config import Config
from mlm_mpi.config.keys import key
from mlm_mpi.data.objectives import Samples
from mlm_mpi.data.sentences import ENDS, Sentences
from mlm_mpi.data.tagged import TaggedTexts
from mlm_mpi.data.texts import Noise, Nothing, balanced
from mlm_mpi.errors import ConfigError, DataError
from mlm_mpi.figures import classes, spans
from mlm_mpi.figures.lookup import looked_up
from mlm_mpi.layers.base import Part, Sizes
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks import classification
from mlm_mpi.train.measure import Sums

NEEDS = ("several texts a row",)  # of a model: it reads such batches
BOTH_WAYS = True  # a model may see all of a sentence
STEADY = False  # a sentence of rare labels has many times the loss of the others
OF_WORDS = True  # predictions are of words

least = classification.least


@dataclass(frozen=True)
class Settings:
    """What the model learns: the labels of words."""

    kind: str = key("tagging", says="The model is trained for this task.", room="tasks")
    dropout: float = key(
        0.1, says="This share of what the classifier sees is set to zero at random in training.", least=0, below=1
    )
    weights: Literal["equal", "balanced"] = key(
        "equal",
        says="All words count alike in the loss, or, if balanced, all labels do, however many words each has.",
    )
    smoothing: float = key(
        0.0, says="This part of a target is shared by all labels, against certainty beyond evidence.", least=0, below=1
    )
    hide: float = key(
        0.0,
        says="In training this share of the tokens is hidden from the model, drawn anew each time.",
        least=0,
        below=1,
    )
    too_long: Literal["cut", "refuse"] = key(
        "cut", says="Sentences that are longer than the context are cut at their ends and counted, or refused."
    )


def build(config: Config, plugins: Plugins) -> "Tagging":
    """The task over the labelled words in `data.dir`. Raises ConfigError, DataError."""
    return Tagging(config, plugins)


def parts(config: Config, plugins: Plugins, sizes: Sizes) -> list[Part]:
    """The model and its head; a checkpoint's, where there are no sentences."""
    return classification.ended(config, plugins, sizes, "token")


class Tagging(classification.Classification):
    """The task (train/task.py) on one rank."""

    unit = "words"
    of_words = True

    def __init__(self, config: Config, plugins: Plugins) -> None:
        super().__init__(config, plugins)
        if self.row_tokens <= ENDS:
            raise ConfigError(f"model.context = {self.row_tokens} has no room for a word: {ENDS + 1} is the least")
        figures = {"accuracy": True, "macro_f1": True, "weighted_f1": True}
        self.marks_spans = spans.mark_spans(self.texts.labels)
        self.figures: Mapping[str, bool] = MappingProxyType(figures | ({"span_f1": True} if self.marks_spans else {}))
        self._sentences: dict[str, Sentences] = {}

    def sentences(self, split: str) -> Sentences:
        """Those of a split, all of which stay in memory. Raises DataError."""
        if split not in self._sentences:
            self._sentences[split] = self.texts.sentences(split)
        return self._sentences[split]

    def samples(self, split: str) -> Samples:
        if split == "heldout" and split not in self.texts.splits:
            return Nothing()
        task, context, sentences = self.config.task, self.row_tokens, self.sentences(split)
        cut, _, longest = sentences.cut(context)
        if cut and task.too_long == "refuse":
            raise DataError(
                f"{cut:,} sentences of {split} in {self.texts.folder} do not fit model.context = {context}, the "
                f'longest needs {longest}: raise it, or set task.too_long = "cut"'
            )
        if split != "train":
            return TaggedTexts(sentences, context, self.eot)
        noise = Noise(0.0, task.hide, self.config.train.seed) if task.hide else None
        weights = balanced(sentences.targets, len(self.texts.labels)) if self._balances else None
        return TaggedTexts(sentences, context, self.eot, noise, weights)

    def notes(self) -> list[tuple[str, str]]:
        train = self.sentences("train")
        cut, lost, longest = train.cut(self.row_tokens)
        long = f"; {cut:,} are cut and lose {lost:,} words, the longest has {longest:,} tokens" if cut else ""
        counts = classes.counted(train.targets, self.texts.labels)
        words = f"{len(train.targets):,} words, {len(self.texts.labels):,} labels ({counts})"
        return [("sentences", f"{len(train):,} for training, {words}{long}")]

    def tokens(self, split: str) -> int:
        return int(self.sentences(split).lengths.sum()) if split in self.texts.splits else 0

    def parts(self) -> list[Part]:
        return parts(self.config, self.plugins, self._sizes)

    def quality(self, sums: Sums) -> dict[str, Any]:
        assert sums.outcomes is not None, "the head tells outcomes"
        return self._figures(sums.outcomes)

    def _figures(self, outcomes: np.ndarray) -> dict[str, Any]:
        found = classes.figures(outcomes, self.texts.labels, self.unit)
        return found | (spans.figures(outcomes, self.texts.labels) if self.marks_spans else {})

    def lines(self, numbers: dict[str, Any], of: str) -> list[str]:
        n = numbers
        told = classes.lines(n, of, self.unit)
        _, lost, _ = self.sentences(n.get("split", "heldout")).cut(self.row_tokens)
        if lost:
            told.insert(1, f"cut off             {lost:,} words behind the context of {self.row_tokens}: not measured")
        if self.marks_spans:
            told += spans.lines(n)
        if "lookup_accuracy" in n:
            of_spans = f", {n['lookup_span_f1']:.4f} of spans" if self.marks_spans else ""
            told.append(
                f"table of words      {n['lookup_accuracy']:.4f} accuracy, {n['lookup_macro_f1']:.4f} F1{of_spans}"
            )
        return told

    def baselines(self, split: str) -> dict[str, Any]:
        """Each word's most frequent label in training."""
        train, other = self.sentences("train"), self.sentences(split)
        found = looked_up(self._decoded_words(train), train.targets, self._decoded_words(other))
        certain = np.ones(len(found))
        figures = self._figures(np.stack([other.targets, found, certain, certain, other.begins()], axis=1))
        names = ("accuracy", "macro_f1", *(["span_f1"] if self.marks_spans else []))
        return {f"lookup_{name}": figures[name] for name in names}

    def _decoded_words(self, sentences: Sentences) -> list[str]:
        tokenizer, words = self.texts.tokenizer(), [tuple(ids.tolist()) for ids in sentences.words()]
        text = {ids: tokenizer.decode(ids).strip() for ids in dict.fromkeys(words)}
        return [text[ids] for ids in words]
