"""Answering in a dialogue: a language model whose targets are the answers alone, by what was said before them.

Source: Ouyang et al., InstructGPT, arXiv:2203.02155, section 3.5, for training on demonstrations.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from mlm_mpi.config import Config
from mlm_mpi.config.keys import key
from mlm_mpi.config.rules import shares
from mlm_mpi.data import baselines
from mlm_mpi.data.dialogues import Dialogues, Rows
from mlm_mpi.data.labelled import Kind, Labelled
from mlm_mpi.data.objectives import Samples
from mlm_mpi.data.texts import Nothing
from mlm_mpi.errors import CheckpointError, ConfigError, DataError
from mlm_mpi.layers.base import Least, Part, Sizes
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks import language_model
from mlm_mpi.train.checkpoint import Manifest
from mlm_mpi.train.corpus import origin
from mlm_mpi.train.measure import Sums

CHATS = True  # who is told something by `mlm-mpi chat`

parts, least = language_model.parts, language_model.least


@dataclass(frozen=True)
class Settings:
    """What the model learns: to answer."""

    kind: str = key("dialogue", says="The model is trained for this task.", room="tasks")
    too_long: Literal["cut", "refuse"] = key(
        "cut",
        says="Dialogues that are longer than the context are cut behind the last answer that fits and counted, or "
        "refused.",
    )


def build(config: Config, plugins: Plugins) -> "Dialogue":
    """The task over the dialogues in `data.dir`. Raises ConfigError, DataError."""
    return Dialogue(config, plugins)


class Dialogue:
    """The task (train/task.py) on one rank."""

    texts_are: Kind = "dialogues"
    unit = "tokens"
    figures: Mapping[str, bool] = MappingProxyType({"perplexity": False, "bits_per_byte": False})

    def __init__(self, config: Config, plugins: Plugins) -> None:
        self.config, self.plugins, self.model = config, plugins, config.model.kind
        if "data.documents" not in getattr(plugins.find("models", self.model, "model.kind"), "HEEDS", ()):
            raise ConfigError(
                f'model.kind = "{self.model}" does not tell apart the dialogues of a row: set model.kind = "llama", '
                "or another task.kind"
            )
        self.texts = Labelled.open(config.data.dir, kind=self.texts_are)
        self.texts.check_files()
        self._tokenizer = tokenizer = self.texts.tokenizer()
        self.eot = tokenizer.eot
        self.tokenizer, self.hash, self.vocabulary = tokenizer.content, tokenizer.hash, tokenizer.vocab_size
        self.width, self.row_tokens = getattr(config.model, "width", 0), config.model.context
        self.content = self.texts.content[:12]
        self._read: dict[str, Dialogues] = {}

    def dialogues(self, split: str) -> Dialogues:
        """Those of a split, all of which stay in memory. Raises DataError."""
        if split not in self._read:
            self._read[split] = self.texts.dialogues(split)
        return self._read[split]

    def samples(self, split: str) -> Samples:
        if split == "heldout" and split not in self.texts.splits:
            return Nothing()
        rows, longest = self._rows(split), int(self.dialogues(split).lengths.max())
        context, long = self.row_tokens, rows.cut + rows.lost
        if long and (self.config.task.too_long == "refuse" or not len(rows)):
            raise DataError(
                f"{long:,} dialogues of {split} in {self.texts.folder} do not fit model.context = {context}, the "
                f"longest needs {longest}: set model.context = {longest}"
                + (', or task.too_long = "cut"' if len(rows) else "")
            )
        return rows

    def _rows(self, split: str) -> Rows:
        return Rows(self.dialogues(split), self.row_tokens, self._tokenizer)

    def notes(self) -> list[tuple[str, str]]:
        train, rows = self.dialogues("train"), self._rows("train")
        told = f"{len(train):,} for training in {len(rows):,} rows, {train.answers:,} tokens of answers"
        if rows.cut:
            told += f"; {rows.cut:,} are cut at a message"
        if rows.lost:
            told += f"; {rows.lost:,} are left out, not even their first answer fits"
        return [("dialogues", told)]

    def tokens(self, split: str) -> int:
        return int(self.dialogues(split).lengths.sum()) if split in self.texts.splits else 0

    def parts(self) -> list[Part]:
        return parts(self.config, self.plugins, Sizes(self.vocabulary, shares(self.config)))

    def least(self, rows: int) -> Least:
        return least(self.config, self.plugins, Sizes(self.vocabulary, shares(self.config)), rows)

    def about(self) -> dict[str, Any]:
        count = sum(map(sum, self.texts.manifest.counts.values()))
        words = f"{count:,} dialogues, template {self.texts.manifest.template}, content {self.texts.content[:12]}"
        return {"vocabulary": self.vocabulary, "catalog": self.texts.digest, "corpus": words}

    def quality(self, sums: Sums) -> dict[str, Any]:
        bits = sums.loss / math.log(2) / max(sums.bytes, 1)
        return {"perplexity": math.exp(min(sums.mean, 700.0)), "bits_per_byte": bits, "bytes": sums.bytes}

    def baselines(self, split: str) -> dict[str, Any]:
        """N-grams of the same targets, counted in those of the training side."""
        train, rows = self._rows("train").grams(3), self._rows(split)
        other, size = rows.grams(3), rows.bytes(len(rows))
        return {
            f"{name}_bits_per_byte": baselines.ngram_bits(train[:, -n:], other[:, -n:], self.vocabulary) / size
            for n, name in ((1, "unigram"), (3, "trigram"))
        }

    def lines(self, numbers: dict[str, Any], of: str) -> list[str]:
        where = f"{numbers.get('split', 'held-out')} answers"
        told = [
            f"{where:<20}{numbers['tokens']:,} tokens, ends of text among them, {numbers['bytes']:,} bytes; {of}",
            f"loss                {numbers['loss']:.4f} nats per token, perplexity {numbers['perplexity']:.2f}",
            f"bits per byte       {numbers['bits_per_byte']:.3f}",
        ]
        simple = [name for name in ("unigram", "trigram") if f"{name}_bits_per_byte" in numbers]
        return told + [f"  {name} tokens    {numbers[f'{name}_bits_per_byte']:.3f}" for name in simple]

    def refuse_other(self, path: Path, manifest: Manifest) -> None:
        if manifest.tokenizer != self.hash or manifest.catalog != self.texts.digest:
            what = "tokenizer" if manifest.tokenizer != self.hash else "catalog"
            raise CheckpointError(
                f"{path} was trained on another {what} than {self.texts.folder} holds: set data.dir to its own, "
                f"{origin(manifest)}, or give another --run"
            )
