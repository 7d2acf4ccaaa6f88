"""Preferring one answer to another: a model of dialogues learns what people chose, by comparison with how it began.

Source: Rafailov et al., Direct preference optimization, arXiv:2305.18290.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from mlm_mpi.config import Config
from mlm_mpi.config.keys import key
from mlm_mpi.config.rules import shares
from mlm_mpi.data.labelled import Kind
from mlm_mpi.data.objectives import Samples
from mlm_mpi.data.preferences import Pairs
from mlm_mpi.data.texts import Nothing
from mlm_mpi.errors import CheckpointError, DataError
from mlm_mpi.layers.base import Least, Part, Sizes
from mlm_mpi.layers.preference import PreferenceHead
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks import language_model
from mlm_mpi.tasks.dialogue import Dialogue
from mlm_mpi.train.measure import Sums

CHATS = True  # as a model of dialogues
STEADY = False  # a pair that is told wrong has many times the loss of the others


@dataclass(frozen=True)
class Settings:
    """What the model learns: to prefer the chosen answer."""

    kind: str = key("preference", says="The model is trained for this task.", room="tasks")
    beta: float = key(
        0.1,
        says="A pair's margin is so many times what the log-probability of the chosen answer has gained over that of "
        "the rejected one since the start; the smaller, the further the model may leave the start.",
        above=0,
    )
    too_long: Literal["leave_out", "refuse"] = key(
        "leave_out",
        says="Pairs of which a dialogue is longer than the context are left out and counted, or refused.",
    )


def build(config: Config, plugins: Plugins) -> "Preference":
    """The task over the pairs in `data.dir`. Raises ConfigError, DataError."""
    return Preference(config, plugins)


def parts(config: Config, plugins: Plugins, sizes: Sizes) -> list[Part]:
    """The model and its head; a checkpoint's, where there are no pairs."""
    trunk = plugins.find("models", config.model.kind, "model.kind").build(config.model, sizes)
    return [*trunk.parts, PreferenceHead(trunk, config.task.beta)]


def least(config: Config, plugins: Plugins, sizes: Sizes, rows: int) -> Least:
    """A pair is two rows."""
    return language_model.least(config, plugins, sizes, 2 * rows)


class Preference(Dialogue):
    """The task (train/task.py) on one rank, which compares with the start (`Refers`)."""

    texts_are: Kind = "preferences"
    unit = "pairs"
    figures: Mapping[str, bool] = MappingProxyType({"accuracy": True, "margin": True})

    def __init__(self, config: Config, plugins: Plugins) -> None:
        super().__init__(config, plugins)
        self.splits = self.texts.splits
        self._reference: Mapping[str, np.ndarray] = {}

    def samples(self, split: str) -> Samples:
        if split == "heldout" and split not in self.texts.splits:
            return Nothing()
        pairs, context = self._pairs(split), self.row_tokens
        if pairs.lost and (self.config.task.too_long == "refuse" or not len(pairs)):
            raise DataError(
                f"{pairs.lost:,} pairs of {split} in {self.texts.folder} do not fit model.context = {context}, the "
                f"longest dialogue needs {pairs.longest}: give a model of a longer context, or pairs of shorter ones"
                + (', or set task.too_long = "leave_out"' if len(pairs) else "")
            )
        return pairs

    def refer(self, found: Mapping[str, np.ndarray]) -> None:
        for split in self.splits:
            if len(found.get(split, ())) != len(self._pairs(split)):
                raise CheckpointError(
                    f"the reference of {split} is not of its {len(self._pairs(split)):,} pairs: begin again with "
                    "another --run"
                )
        self._reference = found

    def _pairs(self, split: str) -> Pairs:
        return Pairs(self.dialogues(split), self.row_tokens, self.eot, self._reference.get(split))

    def notes(self) -> list[tuple[str, str]]:
        pairs = self._pairs("train")
        chosen, rejected = (int(lengths.sum()) for lengths in pairs.answers().T)
        told = f"{len(pairs):,} for training, {chosen:,} tokens of chosen answers, {rejected:,} of rejected ones"
        return [("pairs", told + (f"; {pairs.lost:,} are left out, they are too long" if pairs.lost else ""))]

    def parts(self) -> list[Part]:
        return parts(self.config, self.plugins, Sizes(self.vocabulary, shares(self.config)))

    def least(self, rows: int) -> Least:
        return least(self.config, self.plugins, Sizes(self.vocabulary, shares(self.config)), rows)

    def about(self) -> dict[str, Any]:
        count = sum(map(sum, self.texts.manifest.counts.values()))
        words = f"{count:,} preferences, template {self.texts.manifest.template}, content {self.texts.content[:12]}"
        return {"vocabulary": self.vocabulary, "catalog": self.texts.digest, "corpus": words}

    def quality(self, sums: Sums) -> dict[str, Any]:
        """Of the model, and which answer the start thought the likelier one."""
        assert sums.outcomes is not None, "the head has told each pair"
        chosen, rejected, began_chosen, began_rejected = sums.outcomes.T
        rewards = self.config.task.beta * (chosen - began_chosen), self.config.task.beta * (rejected - began_rejected)
        return {
            "accuracy": float(np.mean(rewards[0] > rewards[1])),
            "margin": _mean(rewards[0] - rewards[1]),
            "chosen_reward": _mean(rewards[0]),
            "rejected_reward": _mean(rewards[1]),
            "start_accuracy": float(np.mean(began_chosen > began_rejected)),
        }

    def baselines(self, split: str) -> dict[str, Any]:
        """Who prefers whatever is longer: people often do."""
        lengths = self._pairs(split).answers()
        return {"longer_accuracy": float(np.mean(lengths[:, 0] > lengths[:, 1]))}

    def lines(self, numbers: dict[str, Any], of: str) -> list[str]:
        where = f"{numbers.get('split', 'held-out')} pairs"
        told = [
            f"{where:<20}{numbers['tokens']:,}; {of}",
            f"loss                {numbers['loss']:.4f} nats per pair ({math.log(2):.4f} at the start)",
            f"accuracy            {numbers['accuracy']:.2%} of pairs have a margin above 0",
            f"  the start         {numbers['start_accuracy']:.2%} were likelier answers then",
        ]
        if "longer_accuracy" in numbers:
            told.append(f"  the longer one    {numbers['longer_accuracy']:.2%} are chosen")
        gains = f"chosen {numbers['chosen_reward']:+.3f}, rejected {numbers['rejected_reward']:+.3f}"
        return [*told, f"margin              {numbers['margin']:.3f}, mean rewards: {gains}"]


def _mean(values: np.ndarray) -> float:
    return math.fsum(values) / len(values)
