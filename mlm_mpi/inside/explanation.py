"""What is told of a model and one text: plain numbers, which pages and pictures are made of."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mlm_mpi.layers.base import Map


class Row(NamedTuple):
    """What a part's output says, through the model's head, at each of P places.

    `top`: the likeliest outputs of each place and their probabilities, the likeliest first. `came`: the probability of
    the output that was to come, NaN where nobody knows it. Shapes: came (P,).
    """

    name: str
    top: list[list[tuple[str, float]]]
    came: np.ndarray


@dataclass(frozen=True)
class Attribution:
    """How much each position adds to a score, and whether it adds up. Shapes: values (T,) float64."""

    output: str  # whose score it is: a token or a label
    probability: float
    score: str  # "logit" or "log-probability"
    value: float
    baseline: str  # what the path begins at
    baseline_value: float
    steps: int  # gradients that were asked for
    values: np.ndarray

    @property
    def total(self) -> float:
        """The sum of what positions add."""
        return float(self.values.sum())

    @property
    def difference(self) -> float:
        """What they have to add up to (completeness): the score of the text less that of the baseline."""
        return self.value - self.baseline_value

    @property
    def gap(self) -> float:
        """How far the sum is from it, as a part of the largest number in the account."""
        return abs(self.total - self.difference) / max(abs(self.value), abs(self.baseline_value), 1e-3)


@dataclass(frozen=True)
class Explanation:
    """Of T positions. `maps`: attention by the name of what attends, (H, T, T), rows look at columns; {} where a model
    has none. `lens`: a row for each part, the first one first, over `places`: the positions, or the text as a whole.

    `source`: the S tokens of a text that another is made of; then `tokens` are what the decoder reads, maps may be of
    the source too, (H, S, S) and (H, T, S), the lens is the decoder's, and attributions are those of the source.
    """

    model: str
    question: str
    tokens: list[str]
    at: int | None  # the position whose output is asked for; None: the text's
    maps: dict[str, Map]
    places: list[str]
    lens: list[Row]
    attribution: Attribution
    source: list[str] = field(default_factory=list)

    @property
    def explained(self) -> list[str]:
        """The tokens that attributions are of."""
        return self.source or self.tokens

    def layers(self) -> list[str]:
        """What maps are called for people, in their order."""
        halves = [(one.rows, one.columns) for one in self.maps.values()]
        names = {("source", "source"): "encoder {}", ("batch", "source"): "decoder {} to encoder"}
        own = "decoder {}" if self.source else "layer {}"
        return [names.get(half, own).format(halves[: number + 1].count(half)) for number, half in enumerate(halves)]
