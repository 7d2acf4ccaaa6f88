"""What a run tells: metrics, progress, the loss curve."""

from dataclasses import dataclass

from mlm_mpi.config.keys import key


@dataclass(frozen=True)
class Log:
    """How much a run prints."""

    every: int = key(
        10, says="A line is printed every so many steps where there is no terminal.", unit="steps", least=1
    )
