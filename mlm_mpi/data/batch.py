"""What a micro-batch holds, wherever it lies."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Batch:
    """Micro-batch `index` of `step`: named arrays that the model reads, named arrays that its head compares with.

    `count`: targets that count, what the summed loss of all micro-batches is divided by. `digest`: of the numbers of
    its samples (sampler.py), where a loader made it.
    Shapes of a language model: ids (B, T) int32, starts (B, T) int32 where documents are separate (documents.py);
    targets ids (B, T) int32, mask (B, T) bool where some do not count.
    `texts`: where each of several texts ends that lie one behind the other in row 0, the only one, so that no text is
    padded; what lies behind the last is filled up. () where a row is a text.
    `source`: what an encoder reads, where a decoder reads the batch: as many rows or texts. It has no targets.
    """

    step: int
    index: int
    inputs: dict[str, Any]
    targets: dict[str, Any]
    count: int
    digest: int = 0
    texts: tuple[int, ...] = ()
    source: "Batch | None" = None

    def map(self, change: Callable[[Any], Any]) -> "Batch":
        """The same with every array changed, for example brought to a GPU."""
        inputs = {name: change(array) for name, array in self.inputs.items()}
        targets = {name: change(array) for name, array in self.targets.items()}
        source = None if self.source is None else self.source.map(change)
        return replace(self, inputs=inputs, targets=targets, source=source)

    def spans(self) -> list[tuple[int, int]]:
        """[start, stop) of each text of row 0; [] where rows are texts."""
        return list(zip((0, *self.texts), self.texts, strict=False))

    def arrays(self) -> list[Any]:
        """All arrays, in a fixed order."""
        source = [] if self.source is None else self.source.arrays()
        return [*self.inputs.values(), *self.targets.values(), *source]
