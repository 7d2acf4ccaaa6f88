"""Finding hidden tokens. A task is one file: its settings, its data, its model and head, its figures.

What a run asks of it is the protocol `Task` in mlm_mpi/train/task.py.
"""

import math
from dataclasses import dataclass
from typing import Any

from mlm_mpi.config import Config
from mlm_mpi.config.keys import key
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks.language_model import LanguageModel, least, parts  # noqa: F401  a task has them
from mlm_mpi.train.measure import Sums


@dataclass(frozen=True)
class Settings:
    """What the model learns: a hidden token from those before it."""

    kind: str = key("fill_in", says="The model is trained for this task.", room="tasks")
    objective: str = key("masked", says="Windows of text become inputs and targets in this way.", room="objectives")


def build(config: Config, plugins: Plugins) -> "FillIn":
    """The task over the corpus in `data.dir`. Raises DataError."""
    return FillIn(config, plugins)


class FillIn(LanguageModel):
    """A language model's data, model and head; other figures."""

    def quality(self, sums: Sums) -> dict[str, Any]:
        """Among how many equally likely tokens the model hesitates: e to the mean loss, which must not overflow."""
        return {"perplexity of hidden tokens": math.exp(min(sums.mean, 700.0))}
