"""What a trained model is for: data, head and metrics of a task."""

from dataclasses import dataclass

from mlm_mpi.config.keys import key


@dataclass(frozen=True)
class Settings:
    """What the model learns: the next token of a text."""

    kind: str = key("language_model", says="The model is trained for this task.", room="tasks")
    objective: str = key(
        "causal",
        says="Windows of text become inputs and targets in this way; causal predicts each token from those before it.",
        room="objectives",
    )
