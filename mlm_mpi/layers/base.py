"""What every layer is: parameters, a forward that returns what backward needs, and where it all happens."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.params.store import Parameter


@dataclass(frozen=True)
class Context:
    """Immutable: where and when a forward or backward runs.

    `accumulate`: gradients are added to what the buffer holds; otherwise written over it, so that the
    first micro-batch of a lane needs no zeroed buffer. `cache`: keys and values of earlier positions.
    """

    mesh: Mesh = field(default_factory=Mesh)
    seed: int = 0
    step: int = 0
    micro_batch: int = 0
    training: bool = False
    accumulate: bool = False
    cache: "Any | None" = None


class Layer(Protocol):
    """A forward/backward pair. Nothing about an activation stays in the layer."""

    def parameters(self) -> list[Parameter]: ...
    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]: ...
    def backward(self, dy: Any, saved: Any, ctx: Context) -> Any: ...
