"""Flat memory: all parameters of a rank are named views into one flat buffer, segmented by block.

Gradients and each optimiser moment are flat buffers of the same layout. A bucket, an optimiser shard and
a checkpoint part are slices of it. The layout depends on the model alone, never on the number of ranks.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import Place, cpu, fill, to_host
from mlm_mpi.cut import Box
from mlm_mpi.errors import DataError
from mlm_mpi.params.layout import Grid, Layout
from mlm_mpi.params.sources import Drawn, Source

_FILL_ELEMENTS = 1 << 20  # in flight while a source is read: 8 MiB of float64, several chunks of a checkpoint
ALIGN_ELEMENTS = 16  # every parameter starts on a 64-byte line (float32); the gap stays zero


Cuts = tuple[tuple[int, tuple[int, ...]], ...]  # (dim, lengths of the pieces along it), each once


def equal(dim: int, pieces: int, length: int = 1) -> tuple[int, tuple[int, ...]]:
    """A cut along a dim into pieces of one length."""
    return dim, (length,) * pieces


@dataclass(eq=False)
class Parameter:
    """A name that does not depend on the mesh, a Layout, and a view into the flat store.

    `init`: standard deviation of a centred normal, or "ones", "zeros" or "identity" (of a matrix), or a number for each
    index of the first dim.
    `decay`: weight decay applies. `tied`: two
    parts read it, and each has a sum of its own over the gradients of a lane (layers/embedding.py).
    `frozen`: training leaves it as it is, so it has no gradient, no moments and no part in the norm.
    `matrices`: how an optimiser of matrices (optim/muon.py) sees the weight of a hidden layer: cut along some dims, and
    each piece, seen as (its first extent, -1), is one matrix stored (in, out); (): the whole is one. None: there is
    none, as in tables, heads, gains and biases. A cut of ownership may lie between matrices and never inside one, which
    has no update by halves. ValueError where lengths do not fill a dim.
    """

    name: str
    layout: Layout
    init: float | str | tuple[float, ...]
    decay: bool = False
    tied: bool = False
    matrices: Cuts | None = None
    frozen: bool = False
    data: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for dim, lengths in self.matrices or ():
            if list(itertools.accumulate(lengths))[-1:] != [self.layout.shape[dim]]:
                raise ValueError(f"{self.name}: matrices {self.matrices} do not fill the shape {self.layout.shape}")

    def as_matrices(self, array: Any, box: Box | None = None) -> list[Any]:
        """The matrices (in, …) in an array of this parameter's shape, views of it; [] where it has none.

        `box`: what of the parameter the array holds, all of it by default. ValueError where it cuts a matrix.
        """
        if self.matrices is None:
            return []
        box = box or Box.whole(self.layout.shape)
        pieces = [[slice(None)] for _ in self.layout.shape]
        for dim, lengths in self.matrices:
            first, last = box.starts[dim], box.stops[dim]
            edges = [edge - first for edge in (0, *itertools.accumulate(lengths)) if first <= edge <= last]
            if edges[:1] != [0] or edges[-1] != last - first:
                raise ValueError(f"{self.name}: a cut at {first} or {last} of dim {dim} goes through a matrix")
            pieces[dim] = [slice(a, b) for a, b in itertools.pairwise(edges)]
        return [array[piece] for piece in itertools.product(*pieces)]


@dataclass(frozen=True)
class Span:
    """Where a parameter lies in a flat buffer."""

    parameter: Parameter
    start: int
    stop: int
    shape: tuple[int, ...]


class Apart(dict[Parameter, Any]):
    """Parameter -> what is known of it, or an array of its own, made when it is asked for, with zeros in it.

    The gradient of a frozen parameter is such an array, which nobody reads: a layer that does not spare itself that
    work need not know.
    """

    def __init__(self, store: "FlatStore", known: Mapping[Parameter, Any] | None = None) -> None:
        super().__init__(known or {})
        self._store = store

    def __missing__(self, parameter: Parameter) -> Any:
        shape = parameter.layout.local_shape(self._store.grid)
        self[parameter] = self._store.xp.zeros(shape, self._store.dtype)
        return self[parameter]


class FlatStore:
    """The parameters of a list of blocks in one flat buffer, `data`.

    `spans` are in block order; `segments[i]` is the range of block i. Frozen parameters lie in a store of their own,
    `still`, None where there are none: what has this layout, gradients say, has nothing of theirs. Where the place
    computes in a narrower type than `dtype`, layers see a copy in that type, which `refresh` makes anew after every
    change of `data`.
    """

    def __init__(
        self, blocks: Sequence[Sequence[Parameter]], grid: Grid, dtype: Any, place: Place | None = None,
        model: Sequence[Parameter] | None = None, borrowed: Sequence[Parameter] = (), frozen: bool = False,
    ) -> None:  # fmt: skip
        """`model`: all parameters in their order, where other ranks hold others of them; `borrowed`: what a segment of
        its own, the last one, holds beside the blocks, and another stage of a pipeline saves and counts; `frozen`: it
        is the store of those that are.
        """
        self.model = [p for block in blocks for p in block] if model is None else list(model)
        self.still: FlatStore | None = None
        if not frozen and any(p.frozen for block in (*blocks, borrowed) for p in block):
            self.still = FlatStore(blocks, grid, dtype, place, self.model, borrowed, frozen=True)
        blocks = [[p for p in block if p.frozen == frozen] for block in blocks]
        borrowed = [p for p in borrowed if p.frozen == frozen]
        self.borrowed = frozenset(p.name for p in borrowed)
        blocks = [*blocks, borrowed] if borrowed else blocks
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
        self.kept = slice(0, offset)  # what of `data` is always here; the rest comes when it is read, train/sharing.py
        self.own = [span for span in self.spans if span.parameter.name not in self.borrowed]
        self.data = self.xp.zeros(offset, self.dtype)
        same = self.place.compute == self.dtype
        self.working = self.data if same else self.xp.zeros(offset, self.place.compute)
        self._bind(self.working)

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Those of the whole model's arrays, plain data."""
        return {parameter.name: list(parameter.layout.shape) for parameter in self.model}

    @property
    def stores(self) -> "list[FlatStore]":
        """This one, and that of the frozen parameters where there are any."""
        return [self] if self.still is None else [self, self.still]

    @property
    def count(self) -> int:
        """Numbers in all of the model's parameters."""
        return sum(math.prod(parameter.layout.shape) for parameter in self.model)

    @property
    def frozen_count(self) -> int:
        """Numbers in those that are frozen."""
        return sum(math.prod(parameter.layout.shape) for parameter in self.model if parameter.frozen)

    def refresh(self) -> None:
        """Layers see what `data` holds now."""
        if self.working is not self.data:
            self.working[self.kept] = self.data[self.kept]

    @contextmanager
    def showing(self, flat: Any) -> Iterator[None]:
        """Layers see another flat buffer instead of `data` until the block ends, such as averaged weights."""
        if self.working is self.data:
            shown = flat
        else:
            shown = self.xp.zeros(self.size, self.place.compute)
            shown[self.kept] = flat[self.kept]
        try:
            self._bind(shown)
            yield
        finally:
            self._bind(self.working)

    def _bind(self, flat: Any) -> None:
        self.shown = flat  # what layers see
        for span, view in zip(self.spans, self.views(flat), strict=True):
            span.parameter.data = view

    def new_buffer(self) -> Any:
        """A zeroed flat buffer of this layout."""
        return self.xp.zeros(self.size, self.dtype)

    def views(self, flat: Any) -> list[Any]:
        """Named pieces of a flat buffer, one per span, in span order."""
        return [flat[span.start : span.stop].reshape(span.shape) for span in self.spans]

    def by_parameter(self, flat: Any) -> dict[Parameter, Any]:
        """Parameter -> view into a flat buffer: where a context finds gradients."""
        return Apart(self, {span.parameter: view for span, view in zip(self.spans, self.views(flat), strict=True)})

    def apart(self) -> "Apart":
        """Where gradients go that are no lane's yet."""
        return Apart(self)

    def fill(self, source: Source, flat: Any = None) -> None:
        """Reads every parameter's box of the global array, what is kept of it, into `flat`, by default `data`, a few
        rows at a time.

        Raises DataError for an array that is missing or has another shape; MlmError of the source.
        """
        flat = self.data if flat is None else flat
        for span, view in zip(self.spans, self.views(flat), strict=True):
            name, layout = span.parameter.name, span.parameter.layout
            if source.shape(name) != layout.shape:
                raise DataError(f"{name} has the shape {source.shape(name)} there and {layout.shape} in this model")
            first, stop = self.rows(span)
            mine = layout.box(self.grid).rows(first, stop)
            for rows, box in mine.row_blocks(max(1, _FILL_ELEMENTS // max(1, view[:1].size))):
                fill(view[first:stop][rows], source.read(name, box))
        if flat is self.data:
            self.refresh()

    def rows(self, span: Span) -> tuple[int, int]:
        """[first, stop) of a parameter's rows that are kept here."""
        if self.kept == slice(0, self.size) or span.start == span.stop:
            return 0, span.shape[0]
        row = (span.stop - span.start) // span.shape[0]
        edges = (min(max(edge, span.start), span.stop) for edge in (self.kept.start, self.kept.stop))
        first, stop = ((edge - span.start) // row for edge in edges)
        return first, stop

    def initialise(self, seed: int, over: Callable[[Source], Source] = lambda drawn: drawn) -> None:
        """Fills in initial values: drawn from a seed, or what `over` makes of the source that draws them."""
        source = over(Drawn(seed, {p.name: (p.layout.shape, p.init) for p in self.model}))
        for store in self.stores:
            store.fill(source)

    def named(self, flat: Any) -> dict[str, Any]:
        """name -> view into a flat buffer."""
        return {span.parameter.name: view for span, view in zip(self.spans, self.views(flat), strict=True)}

    def weights_sha256(self, whole: Callable[[Parameter, Any], Any] = lambda parameter, mine: mine) -> str:
        """SHA-256 over sorted names, dtype, shape and little-endian values of the global arrays, without padding.

        `whole`: of a parameter and what I hold of it in the CPU's memory (None: nothing), all of it.
        """
        digest = hashlib.sha256()
        named = {name: view for store in self.stores for name, view in store.named(store.data).items()}
        for parameter in sorted(self.model, key=lambda parameter: parameter.name):
            mine = named.get(parameter.name)
            found = whole(parameter, None if mine is None else to_host(mine))
            little = np.ascontiguousarray(found, dtype=self.dtype.newbyteorder("<"))
            digest.update(f"{parameter.name} {self.dtype.name} {little.shape}\n".encode())
            digest.update(little.data.cast("B"))
        return digest.hexdigest()
