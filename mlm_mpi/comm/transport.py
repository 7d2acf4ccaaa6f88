"""How gradients get from where they are computed to where MPI can send them from, and back.

`Direct`: MPI reads the buffers themselves. `Staged`: a GPU's buffers have mirrors in pinned host memory; copies
run on a stream of their own, so that the backward goes on meanwhile. `Aware`: MPI reads a GPU's memory itself,
once the kernels that write it are done. A reduction asks, never waits: what is not there yet is polled.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from mlm_mpi.backend.arrays import Place
from mlm_mpi.comm.group import Group

Ready = Callable[[], bool]


class Transport(Protocol):
    """What a reduction sees of a kind of memory."""

    name: str

    def mirror(self, buffer: Any) -> Any:
        """What MPI sees of a buffer; the buffer itself where MPI can read it."""

    def empty(self, elements: int, dtype: Any) -> Any:
        """Memory that MPI receives into and sums are formed in."""

    def leave(self, pairs: Sequence[tuple[Any, Any]]) -> Ready:
        """Begins to bring slices of buffers to slices of their mirrors; asks whether MPI may read these."""

    def settled(self) -> Ready:
        """Asks whether sums formed in mirrors so far may be read by MPI."""

    def arrive(self, mirror: Any, buffer: Any) -> None:
        """Brings what MPI received back, before whatever is computed next with the buffer."""


def _at_once() -> bool:
    return True


class Direct:
    """The CPU's memory: nothing moves."""

    name = "in place"

    def mirror(self, buffer: Any) -> Any:
        return buffer

    def empty(self, elements: int, dtype: Any) -> Any:
        return np.empty(elements, dtype)

    def leave(self, pairs: Sequence[tuple[Any, Any]]) -> Ready:
        return _at_once

    def settled(self) -> Ready:
        return _at_once

    def arrive(self, mirror: Any, buffer: Any) -> None:
        pass


class Aware:
    """A GPU's memory under an MPI that reads it."""

    name = "GPU-aware MPI"

    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy

    def mirror(self, buffer: Any) -> Any:
        return buffer

    def empty(self, elements: int, dtype: Any) -> Any:
        return self.cupy.empty(elements, dtype)

    def leave(self, pairs: Sequence[tuple[Any, Any]]) -> Ready:
        return self.settled()

    def settled(self) -> Ready:
        written = self.cupy.cuda.Event(disable_timing=True)
        written.record()
        return lambda: bool(written.done)

    def arrive(self, mirror: Any, buffer: Any) -> None:
        pass


class Staged:
    """A GPU's memory under any MPI: mirrors in pinned host memory, copied on a stream of their own."""

    name = "staged through pinned memory"

    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)

    def mirror(self, buffer: Any) -> np.ndarray:
        return self.empty(buffer.size, buffer.dtype)

    def empty(self, elements: int, dtype: Any) -> np.ndarray:
        memory = self.cupy.cuda.alloc_pinned_memory(max(1, elements * np.dtype(dtype).itemsize))
        return np.frombuffer(memory, dtype, elements)

    def leave(self, pairs: Sequence[tuple[Any, Any]]) -> Ready:
        computed = self.cupy.cuda.Event(disable_timing=True)
        computed.record()
        self.stream.wait_event(computed)
        for buffer, mirror in pairs:
            buffer.get(stream=self.stream, out=mirror, blocking=False)
        copied = self.cupy.cuda.Event(disable_timing=True)
        copied.record(self.stream)
        return lambda: bool(copied.done)

    def settled(self) -> Ready:
        return _at_once

    def arrive(self, mirror: np.ndarray, buffer: Any) -> None:
        buffer.set(mirror, stream=self.cupy.cuda.get_current_stream())


def transport(place: Place, group: Group, gpu_aware: str) -> Transport:
    """The transport for arrays of this place. `gpu_aware`: "yes", "no", or "auto" to ask the MPI library."""
    if not place.on_gpu:
        return Direct()
    aware = gpu_aware == "yes" or (gpu_aware == "auto" and group.reads_gpus())
    return Aware(place.xp) if aware else Staged(place.xp)
