"""What a run tells: metrics, progress, the loss curve."""

from dataclasses import dataclass

from mlm_mpi.config.keys import key


@dataclass(frozen=True)
class Log:
    """What a run says of itself."""

    every: int = key(
        10, says="A line is printed every so many steps where there is no terminal.", unit="steps", least=1
    )
    curve: bool = key(True, says="If true, a run draws its losses into loss.png when it ends.")
