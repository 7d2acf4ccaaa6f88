"""Who updates which weights: each data-parallel rank a range of the flat store, whose moments only it holds.

Ranges lie one after another and end between rows of a parameter, so that a checkpoint can save them as boxes, and never
inside a matrix that the optimiser sees as a whole. An update is made element by element or matrix by matrix: its bits
do not depend on who makes it. Where a rank has the sum of its own gradients only, a range ends between blocks of the
norm too (`params/clip.py`). Source: Rajbhandari et al., ZeRO, arXiv:1910.02054.
"""

import bisect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mlm_mpi.backend.arrays import fill
from mlm_mpi.cut import Box, cut
from mlm_mpi.errors import DataError
from mlm_mpi.params.clip import whole_block_rows
from mlm_mpi.params.sources import Source
from mlm_mpi.params.store import FlatStore, Span


def ranges(store: FlatStore, ranks: int, whole_matrices: bool, whole_blocks: bool = False) -> list[tuple[int, int]]:
    """[start, stop) of each rank in the flat store, as equal as rows allow; some may be empty."""
    edges = [0]
    for span in store.spans:
        kept = whole_matrices and span.parameter.matrices is not None
        rows = 1 if kept else span.shape[0]
        row = (span.stop - span.start) // max(1, rows)
        cuts = range(rows) if not whole_blocks else whole_block_rows(span, store.grid) if not kept else (0,)
        edges += [span.start + number * row for number in cuts]
    edges.append(store.size)
    cuts = [0]
    for rank in range(1, ranks):
        wanted = store.size * rank / ranks
        after = bisect.bisect_left(edges, wanted)
        nearest = min(edges[max(0, after - 1) : after + 1], key=lambda edge: abs(edge - wanted))
        cuts.append(max(cuts[-1], nearest))
    return list(zip(cuts, [*cuts[1:], store.size], strict=True))


class Owned:
    """A range of a store as an optimiser sees it: what it reads of a `FlatStore` is here of that range only."""

    def __init__(self, store: FlatStore, every: Sequence[tuple[int, int]], rank: int) -> None:
        self.store, self.every, (self.start, self.stop) = store, every, every[rank]
        self.xp, self.dtype, self.grid, self.place = store.xp, store.dtype, store.grid, store.place
        self.size = self.stop - self.start
        self.data = self.part(store.data)
        self.working = self.data if store.working is store.data else self.part(store.working)
        self.spans = [part for span in store.spans if (part := self._mine(span)) is not None]

    def part(self, flat: Any) -> Any:
        """My range of a flat buffer of the store, a view."""
        return flat[self.start : self.stop]

    def _mine(self, span: Span) -> Span | None:
        """My rows of a parameter, where they lie in my range."""
        start, stop = max(span.start, self.start), min(span.stop, self.stop)
        if start >= stop:
            return None
        rows = (stop - start) * span.shape[0] // (span.stop - span.start)
        return replace(span, start=start - self.start, stop=stop - self.start, shape=(rows, *span.shape[1:]))

    def new_buffer(self) -> Any:
        """A zeroed flat buffer of my range."""
        return self.xp.zeros(self.size, self.dtype)

    def box(self, span: Span) -> Box:
        """Where one of my spans lies in the global array."""
        held = span.parameter.layout.box(self.grid)
        whole = next(other for other in self.store.spans if other.parameter is span.parameter)
        row = (whole.stop - whole.start) // whole.shape[0]
        first = held.starts[0] + (self.start + span.start - whole.start) // row
        return Box((first, *held.starts[1:]), (first + span.shape[0], *held.stops[1:]))

    def boxes(self) -> dict[str, Box]:
        """What I save: ranks of tp that hold copies of it share it out."""
        found = {}
        for span in self.spans:
            box, layout = self.box(span), span.parameter.layout
            if "tp" not in layout.axes:
                start, stop = cut(box.shape[0], self.grid.size("tp"), self.grid.coord("tp"))
                box = Box((box.starts[0] + start, *box.starts[1:]), (box.starts[0] + stop, *box.stops[1:]))
            if span.parameter.name not in self.store.borrowed and all(box.shape):
                found[span.parameter.name] = box
        return found

    def named(self, flat: Any) -> dict[str, tuple[Box, Any]]:
        """name -> (box, view) of my rows in a flat buffer of my range."""
        return {
            span.parameter.name: (self.box(span), flat[span.start : span.stop].reshape(span.shape))
            for span in self.spans
        }

    def fill(self, source: Source, flat: Any) -> None:
        """Reads my rows of every parameter into a flat buffer of my range. Raises DataError."""
        for name, (box, view) in self.named(flat).items():
            if source.shape(name) is None:
                raise DataError(f"{name} is missing there")
            fill(view, source.read(name, box))
