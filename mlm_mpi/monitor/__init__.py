"""What a run tells: metrics, progress, the loss curve."""

import re
from dataclasses import dataclass

from mlm_mpi.config.keys import key
from mlm_mpi.errors import ConfigError


@dataclass(frozen=True)
class Log:
    """What a run says of itself."""

    every: int = key(
        10, says="A line is printed every so many steps where there is no terminal.", unit="steps", least=1
    )
    curve: bool = key(True, says="If true, a run draws its losses into loss.png when it ends.")
    tensorboard: bool = key(
        False,
        says="If true, a run also writes its numbers into RUN/tensorboard, for TensorBoard; needs "
        "pip install tensorboard.",
    )
    wandb: str = key(
        "",
        says="A run also sends its numbers to this project at Weights & Biases, or keeps them in RUN/wandb if it "
        "cannot; empty: no. Needs pip install wandb.",
    )

    def resolved(self) -> "Log":
        """Refuses a name of a project that Weights & Biases does not take."""
        if not re.fullmatch(r"[^/\\#?%:]{0,128}", self.wandb):
            raise ConfigError(
                f"log.wandb = {self.wandb[:200]!r} must be the name of a project, at most 128 characters without "
                r"/ \ # ? % : (whose it is, WANDB_ENTITY says)"
            )
        return self
