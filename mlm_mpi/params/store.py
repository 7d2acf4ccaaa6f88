"""Flat memory: all parameters of a rank are named views into one flat buffer, segmented by block.

Gradients and each optimiser moment are flat buffers of the same layout. A bucket, an optimiser shard and
a checkpoint part are slices of it. The layout depends on the model alone, never on the number of ranks.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import Place, cpu, fill, to_host
from mlm_mpi.params.layout import Grid, Layout
from mlm_mpi.rng import key_of, normal

ALIGN_ELEMENTS = 16  # every parameter starts on a 64-byte line (float32); the gap stays zero


@dataclass(eq=False)
class Parameter:
    """A name that does not depend on the mesh, a Layout, and a view into the flat store.

    `init`: standard deviation of a centred normal, or "ones" or "zeros". `decay`: weight decay applies.
    """

    name: str
    layout: Layout
    init: float | str
    decay: bool = False
    data: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class Span:
    """Where a parameter lies in a flat buffer."""

    parameter: Parameter
    start: int
    stop: int
    shape: tuple[int, ...]


class FlatStore:
    """The parameters of a list of blocks in one flat buffer, `data`.

    `spans` are in block order; `segments[i]` is the range of block i. Where the place computes in a narrower
    type than `dtype`, layers see a copy in that type, which `refresh` makes anew after every change of `data`.
    """

    def __init__(
        self, blocks: Sequence[Sequence[Parameter]], grid: Grid, dtype: Any, place: Place | None = None
    ) -> None:
        self.place = place or cpu(dtype)
        self.xp, self.dtype, self.grid = self.place.xp, np.dtype(dtype), grid
        self.spans: list[Span] = []
        self.segments: list[tuple[int, int]] = []
        offset = 0
        for block in blocks:
            begin = offset
            for parameter in block:
                shape = parameter.layout.local_shape(grid)
                size = int(np.prod(shape))
                self.spans.append(Span(parameter, offset, offset + size, shape))
                offset += -(-size // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
            self.segments.append((begin, offset))
        self.size = offset
        self.count = sum(span.stop - span.start for span in self.spans)
        self.data = self.xp.zeros(offset, self.dtype)
        same = self.place.compute == self.dtype
        self.working = self.data if same else self.xp.zeros(offset, self.place.compute)
        for span, view in zip(self.spans, self.views(self.working), strict=True):
            span.parameter.data = view

    def refresh(self) -> None:
        """Layers see what `data` holds now."""
        if self.working is not self.data:
            self.working[...] = self.data

    def new_buffer(self) -> Any:
        """A zeroed flat buffer of this layout."""
        return self.xp.zeros(self.size, self.dtype)

    def views(self, flat: Any) -> list[Any]:
        """Named pieces of a flat buffer, one per span, in span order."""
        return [flat[span.start : span.stop].reshape(span.shape) for span in self.spans]

    def by_parameter(self, flat: Any) -> dict[Parameter, Any]:
        """Parameter -> view into a flat buffer: where a context finds gradients."""
        return {span.parameter: view for span, view in zip(self.spans, self.views(flat), strict=True)}

    def initialise(self, seed: int) -> None:
        """Draws initial values keyed by (seed, name) from the global array and takes my slice."""
        for span, view in zip(self.spans, self.views(self.data), strict=True):
            p = span.parameter
            if isinstance(p.init, str):
                view[...] = {"ones": 1.0, "zeros": 0.0}[p.init]
                continue
            draws = normal(key_of(seed, "init", p.name), 0, int(np.prod(p.layout.shape)))
            fill(view, (p.init * draws).reshape(p.layout.shape)[p.layout.slices(self.grid)])
        self.refresh()

    def named(self, flat: Any) -> dict[str, Any]:
        """name -> view into a flat buffer."""
        return {span.parameter.name: view for span, view in zip(self.spans, self.views(flat), strict=True)}

    def weights_sha256(self) -> str:
        """SHA-256 over sorted names, dtype, shape and little-endian values, without padding."""
        digest = hashlib.sha256()
        for name, value in sorted(self.named(self.data).items()):
            little = np.ascontiguousarray(to_host(value), dtype=self.dtype.newbyteorder("<"))
            digest.update(f"{name} {self.dtype.name} {little.shape}\n".encode())
            digest.update(little.data.cast("B"))
        return digest.hexdigest()
