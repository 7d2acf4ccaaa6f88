"""Who fills weights: a source of global arrays by name, of which every rank reads its own box.

A draw from a seed is one, a checkpoint of any mesh another (`train/checkpoint.py`); a file of another program can be.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np

from mlm_mpi.cut import Box
from mlm_mpi.rng import key_of, normal

Shape = tuple[int, ...]
Init = float | str | tuple[float, ...]


class Source(Protocol):
    """Named global arrays. `read` returns values of any real type; the reader converts them."""

    def shape(self, name: str) -> Shape | None:
        """The global shape; None where there is no such array."""

    def read(self, name: str, box: Box) -> Any:
        """The elements of a box, in its shape. Raises MlmError."""


class Over:
    """What one source has in the shape that another has it in, and for the rest what that other has.

    Of an array called `rows` as many of the first rows as both have.
    """

    def __init__(self, first: Source, rest: Source, rows: str = "") -> None:
        self._first, self._rest, self._rows = first, rest, rows

    def shape(self, name: str) -> Shape | None:
        return self._rest.shape(name)

    def read(self, name: str, box: Box) -> Any:
        there, here = self._first.shape(name), self._rest.shape(name)
        if there == here:
            return self._first.read(name, box)
        if name != self._rows or there is None or here is None or there[1:] != here[1:]:
            return self._rest.read(name, box)
        common = min(max(0, there[0] - box.starts[0]), box.shape[0])
        parts = [(self._first, box.rows(0, common)), (self._rest, box.rows(common, box.shape[0]))]
        return np.concatenate([source.read(name, part) for source, part in parts if part.shape[0]])


class Without:
    """Another source, but for some arrays."""

    def __init__(self, source: Source, names: Collection[str]) -> None:
        self._source, self._names = source, names

    def shape(self, name: str) -> Shape | None:
        return None if name in self._names else self._source.shape(name)

    def read(self, name: str, box: Box) -> Any:
        return self._source.read(name, box)


class Arrays:
    """Global arrays that are at hand, by name."""

    def __init__(self, named: Mapping[str, Any]) -> None:
        self._named = named

    def shape(self, name: str) -> Shape | None:
        return tuple(self._named[name].shape) if name in self._named else None

    def read(self, name: str, box: Box) -> Any:
        return self._named[name][box.slices]


class Drawn:
    """Initial values keyed by (seed, name) and the *global* element: the same on any mesh, read in any pieces.

    `parameters`: name -> (global shape, standard deviation of a centred normal, or "ones", "zeros" or "identity", or
    numbers: one for each index of the first dim).
    """

    def __init__(self, seed: int, parameters: Mapping[str, tuple[Shape, Init]]) -> None:
        self._seed, self._parameters = seed, parameters

    def shape(self, name: str) -> Shape | None:
        return self._parameters[name][0] if name in self._parameters else None

    def read(self, name: str, box: Box) -> np.ndarray:
        shape, init = self._parameters[name]
        if init == "identity":
            rows, columns = (np.arange(a, b) for a, b in zip(box.starts, box.stops, strict=True))
            return (rows[:, None] == columns).astype("f8")
        if isinstance(init, str):
            return np.full(box.shape, {"ones": 1.0, "zeros": 0.0}[init])
        if isinstance(init, tuple):
            mine = np.array(init[box.starts[0] : box.stops[0]])
            return np.broadcast_to(mine.reshape(-1, *[1] * (len(shape) - 1)), box.shape)
        row = math.prod(shape[1:])
        first, stop = box.starts[0], box.stops[0]
        draws = init * normal(key_of(self._seed, "init", name), first * row, (stop - first) * row)
        return draws.reshape(stop - first, *shape[1:])[(slice(None), *box.slices[1:])]


class Replaced:
    """Another source, but for some rows of one array, such as tokens whose vectors are known."""

    def __init__(self, source: Source, name: str, indices: np.ndarray, rows: np.ndarray) -> None:
        """Shapes: indices (n,) ascending, rows (n, …) of the array's own."""
        self._source, self._name, self._indices, self._rows = source, name, indices, rows

    def shape(self, name: str) -> Shape | None:
        return self._source.shape(name)

    def read(self, name: str, box: Box) -> Any:
        found = self._source.read(name, box)
        if name != self._name:
            return found
        first, stop = np.searchsorted(self._indices, (box.starts[0], box.stops[0]))
        found = np.array(found)  # the source's own may be read-only
        found[self._indices[first:stop] - box.starts[0]] = self._rows[first:stop][(slice(None), *box.slices[1:])]
        return found
