"""From text to micro-batches: cleaning, tokenizer, shards, catalog, mixture, sampler, loader."""

import os
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from mlm_mpi.config.keys import key
from mlm_mpi.errors import ConfigError

_WHOLE = 10**9  # parts of a mixture
_NEAR = 10**6  # 0.001 of it: thirds are written as 0.333


@dataclass(frozen=True)
class Data:
    """Where the tokens of a run come from, how corpora are mixed, and how far tokens are read ahead."""

    dir: str = key("corpus", says="The corpus is read from this folder, which `mlm-mpi prepare --out` has written.")
    mixture: tuple[str, ...] = key(
        (),
        says="Corpora are read from these folders, instead of the one in dir, and mixed by their weights; they share "
        "a tokenizer.",
    )
    weights: tuple[float, ...] = key(
        (),
        says="Each corpus of the mixture gives this share of the samples, in the order of its folders; shares sum to "
        "1, within 0.001.",
        least=1e-9,
        most=1,
    )
    documents: Literal["joined", "separate"] = key(
        "joined",
        says="Attention sees the documents of a window as one text, or, if separate, no token of another document.",
    )
    prefetch: int = key(
        4, says="A thread reads at most this many micro-batches ahead of the step.", unit="micro-batches", least=1
    )

    @property
    def parts(self) -> tuple[int, ...]:
        """Weights as whole numbers, parts of a billion: as decimals they are exact, whatever a float rounds."""
        return tuple(round(Decimal(repr(weight)) * _WHOLE) for weight in self.weights)

    def resolved(self) -> "Data":
        """The same. Raises ConfigError for weights that are no shares of the mixture, or a folder named twice."""
        if len(self.weights) != len(self.mixture):
            raise ConfigError(
                f"data.weights has {len(self.weights)} numbers, data.mixture {len(self.mixture)} folders: "
                "give one weight for each folder"
            )
        if self.mixture and abs(sum(self.parts) - _WHOLE) > _NEAR:
            raise ConfigError(
                f"data.weights = {list(self.weights)} sum to {sum(self.parts) / _WHOLE:g}, must sum to 1 (within "
                "0.001): they are shares of the samples"
            )
        seen: dict[str, str] = {}
        for folder in self.mixture:
            real = os.path.realpath(folder)
            if twin := seen.get(real):
                named = repr(folder) + (f", which is {twin!r}," if twin != folder else "")
                raise ConfigError(f"data.mixture names {named} twice: name it once, with the sum of its weights")
            seen[real] = folder
        return self
