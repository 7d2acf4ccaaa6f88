"""Finding hidden tokens. A task is one file: its settings, its data, its model and head, its figures."""

import math
from dataclasses import dataclass

from mlm_mpi.config.keys import key
from mlm_mpi.tasks.language_model import LanguageModel, least, parts  # noqa: F401  a task has them


@dataclass(frozen=True)
class Settings:
    """What the model learns: a hidden token from those before it."""

    kind: str = key("fill_in", says="The model is trained for this task.", room="tasks")
    objective: str = key("masked", says="Windows of text become inputs and targets in this way.", room="objectives")


def build(config, plugins):
    return FillIn(config, plugins)


class FillIn(LanguageModel):
    """A language model's data, model and head; other figures."""

    def quality(self, sums):
        """Among how many equally likely tokens the model hesitates."""
        return {"perplexity of hidden tokens": math.exp(min(sums.mean, 700.0))}
