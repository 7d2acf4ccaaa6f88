"""Finding the answer to a question in a text, by an encoder that tells where it begins and where it ends.

Source: Devlin et al., arXiv:1810.04805, sections 4.2 and 4.3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mlm_mpi.config import Config
from mlm_mpi.config.keys import key
from mlm_mpi.config.rules import shares
from mlm_mpi.data.labelled import Labelled
from mlm_mpi.data.objectives import Samples
from mlm_mpi.data.questions import ENDS, Cut, Question, Questions, best_span
from mlm_mpi.data.sides import SPLITS
from mlm_mpi.data.texts import Noise, Nothing
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.data.windows import Windows
from mlm_mpi.errors import CheckpointError, ConfigError, DataError
from mlm_mpi.figures import answers
from mlm_mpi.layers.base import Least, Part, Sizes
from mlm_mpi.layers.spans import SpanHead
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks import language_model
from mlm_mpi.train.checkpoint import Manifest
from mlm_mpi.train.corpus import origin
from mlm_mpi.train.measure import Sums

NEEDS = ("several texts a row",)  # of a model: it reads such batches
BOTH_WAYS = True  # a model may see all of a text
STEADY = False  # a window whose answer is missed has many times the loss of the others
FINDS = True  # predictions are pieces of a text


@dataclass(frozen=True)
class Settings:
    """What the model learns: where in a text the answer to a question stands."""

    kind: str = key("question_answering", says="The model is trained for this task.", room="tasks")
    question: int = key(
        64, says="Of a question the model sees at most this many tokens; longer ones lose their ends.", unit="tokens",
        least=1,
    )  # fmt: skip
    stride: int = key(
        0,
        says="Where a context does not fit beside its question, windows of it begin this many tokens after one "
        "another; 0 means half of what a window holds.",
        unit="tokens",
        least=0,
    )
    longest: int = key(30, says="An answer has at most this many tokens.", unit="tokens", least=1)
    unanswerable: bool = key(
        False,
        says="A question may have no answer in its text, and the model may say so; otherwise it always gives its best.",
    )
    matches: bool = key(
        False,
        says="Tokens of a context that are in its question too lie in the third segment; model.segments is then 3 or "
        "more. A model that begins from nothing learns from few questions with it.",
    )
    hide: float = key(
        0.0,
        says="In training this share of the tokens is hidden from the model, drawn anew each time.",
        least=0,
        below=1,
    )


def build(config: Config, plugins: Plugins) -> "QuestionAnswering":
    """The task over the questions in `data.dir`. Raises ConfigError, DataError."""
    return QuestionAnswering(config, plugins)


def parts(config: Config, plugins: Plugins, sizes: Sizes) -> list[Part]:
    """The model and its head; a checkpoint's, where there are no questions."""
    module = plugins.find("models", config.model.kind, "model.kind")
    trunk = module.build(config.model, sizes)
    norm, std = module.final_norm(config.model), getattr(config.model, "init_std", 0.02)
    trunk.table.tied = False  # no head reads it
    return [*trunk.parts, SpanHead(trunk.width, norm, config.task.longest, std)]


least = language_model.least


def cut_of(config: Config) -> Cut:
    """How questions and contexts are made to fit. Raises ConfigError where a window would have no token."""
    if config.model.context <= ENDS + 1:
        raise ConfigError(
            f"model.context = {config.model.context} has no room for a question and a context: {ENDS + 2} is the least"
        )
    segments, needed = getattr(config.model, "segments", 2), 3 if config.task.matches else 2
    if segments < needed:
        what = "task.matches = true needs a third" if segments == 2 else "a question and its context have one each"
        raise ConfigError(f"model.segments = {segments}, and {what}: set model.segments = {needed}")
    return Cut(config.model.context, config.task.question, config.task.stride, config.task.matches)


class QuestionAnswering:
    """The task (train/task.py) on one rank."""

    unit, sample = "windows", "windows"
    figures: Mapping[str, bool] = MappingProxyType({"f1": True, "exact": True})

    def __init__(self, config: Config, plugins: Plugins) -> None:
        self.config, self.plugins, self.model = config, plugins, config.model.kind
        self.texts, self.cut = Labelled.open(config.data.dir, kind="questions"), cut_of(config)
        self.texts.check_files()
        tokenizer = self._tokenizer
        self.eot = tokenizer.eot
        self.tokenizer, self.hash, self.vocabulary = tokenizer.content, tokenizer.hash, tokenizer.vocab_size
        self.width, self.row_tokens, self.content = config.model.width, config.model.context, self.texts.content[:12]
        self._read: dict[str, Questions] = {}
        self._wanted: dict[str, list[tuple[str, ...]]] = {}

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self.texts.tokenizer()

    def questions(self, split: str) -> Questions:
        """Those of a split, all of which stay in memory. Raises DataError."""
        if split not in self._read:
            self._read[split] = self.texts.questions(split)
        return self._read[split]

    def samples(self, split: str) -> Samples:
        if split == "heldout" and split not in self.texts.splits:
            return Nothing()
        questions, task, training = self.questions(split), self.config.task, split == "train"
        without = int((questions.stops == 0).sum())
        if training and without and not task.unanswerable:
            raise DataError(
                f"{without:,} questions of {split} in {self.texts.folder} have no answer: set task.unanswerable = true"
            )
        noise = Noise(0.0, task.hide, self.config.train.seed) if task.hide and training else None
        return Windows(questions, self.cut, self.eot, SPLITS.index(split), noise)

    def notes(self) -> list[tuple[str, str]]:
        """Lines of the start table."""
        train, longest = self.questions("train"), self.config.task.longest
        table = self.cut.of(train)
        several, sizes = len(np.unique(table[table[:, 1] > 0, 0])), train.stops - train.starts
        counts = {
            "of them have no answer": int((train.stops == 0).sum()),
            f"contexts do not fit, in {len(table) - len(train) + several:,} windows": several,
            "are cut": int((train.lengths > self.cut.kept(1 << 30)).sum()),
            f"answers are longer than task.longest = {longest}": int((sizes > longest).sum()),
        }
        told = [f"{count:,} {what}" for what, count in counts.items() if count]
        return [("questions", "; ".join([f"{len(train):,} for training", *told]))]

    def tokens(self, split: str) -> int:
        if split not in self.texts.splits:
            return 0
        questions = self.questions(split)
        return int(questions.lengths.sum() + questions.contexts.sum())

    def parts(self) -> list[Part]:
        return parts(self.config, self.plugins, Sizes(self.vocabulary, shares(self.config)))

    def least(self, rows: int) -> Least:
        return least(self.config, self.plugins, Sizes(self.vocabulary, shares(self.config)), rows)

    def about(self) -> dict[str, Any]:
        count = sum(map(sum, self.texts.manifest.counts.values()))
        words = f"{count:,} questions, content {self.texts.content[:12]}"
        return {"vocabulary": self.vocabulary, "catalog": self.texts.digest, "corpus": words}

    def quality(self, sums: Sums) -> dict[str, Any]:
        assert sums.outcomes is not None, "the head tells outcomes"
        pairs: list[tuple[str, Sequence[str]]] = []
        for side in np.unique(sums.outcomes[:, 0]).astype(int).tolist():
            split, rows = SPLITS[side], sums.outcomes[sums.outcomes[:, 0] == side, 1:]
            pairs += self._answered(split, rows[np.argsort(rows[:, 0])])
        return answers.figures(pairs)

    def _answered(self, split: str, rows: np.ndarray) -> list[tuple[str, Sequence[str]]]:
        """(answer, those that are given) of each question all of whose windows were read. Shapes: windows in their
        order (w, 5): number, first, stop, log P of it and of none."""
        questions, wanted = self.questions(split), self.wanted(split)
        table = self.cut.of(questions)[rows[:, 0].astype(int)]
        found = []
        for number in np.unique(table[:, 0]).tolist():
            own = table[:, 0] == number
            question = questions.read(number)
            if table[own, 2].max() < len(question.context):
                continue  # a limit of windows was reached
            span = best_span(table[own, 1], rows[own, 1:], self.config.task.unanswerable)
            found.append((self._decoded(question, span.first, span.stop), wanted[number]))
        return found

    def _decoded(self, question: Question, first: int, stop: int) -> str:
        return self._tokenizer.decode(question.context[first:stop].tolist()).strip()

    def wanted(self, split: str) -> list[tuple[str, ...]]:
        """The answers that are given to each question of a split."""
        if split not in self._wanted:
            questions, decode = self.questions(split), self._tokenizer.decode
            read = map(questions.read, range(len(questions)))
            self._wanted[split] = [tuple(decode(ids.tolist()) for ids in one.answers) for one in read]
        return self._wanted[split]

    def lines(self, numbers: dict[str, Any], of: str) -> list[str]:
        n, where = numbers, f"{numbers.get('split', 'held-out')} questions"
        return [
            f"{where:<20}{n['questions']:,} in {n['tokens']:,} windows; {of}",
            f"loss                {n['loss']:.4f} nats per window",
            *answers.lines(n),
        ]

    def baselines(self, split: str) -> dict[str, Any]:
        return answers.baselines(self._texts("train"), self._texts(split))

    def _texts(self, split: str) -> list[answers.Asked]:
        questions, decode = self.questions(split), self._tokenizer.decode
        read = map(questions.read, range(len(questions)))
        return [
            answers.Asked(decode(one.ids.tolist()), decode(one.context.tolist()), wanted)
            for one, wanted in zip(read, self.wanted(split), strict=True)
        ]

    def refuse_other(self, path: Path, manifest: Manifest) -> None:
        if manifest.tokenizer != self.hash or manifest.catalog != self.texts.digest:
            what = "tokenizer" if manifest.tokenizer != self.hash else "catalog"
            raise CheckpointError(
                f"{path} was trained on another {what} than {self.texts.folder} holds: set data.dir to its own, "
                f"{origin(manifest)}, or give another --run"
            )
