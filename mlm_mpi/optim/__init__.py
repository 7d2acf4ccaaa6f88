"""Optimisers over flat buffers: `optim.name` names the file, with `Settings(Common)` and
`build(settings, store, mesh) -> Optimizer`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mlm_mpi.config.keys import key

if TYPE_CHECKING:
    from mlm_mpi.comm.mesh import Mesh  # imports NumPy, which must not load before its environment is set


@dataclass(frozen=True)
class Common:
    """What every optimiser has: a learning rate over the run, clipping, decay."""

    name: str = key("adamw", says="This optimiser updates the weights.", room="optim")
    learning_rate: float = key(1e-3, says="The learning rate rises to this value during the warm-up.", least=0)
    schedule: str = key("cosine", says="After the warm-up the learning rate follows this curve.", room="rates")
    warmup_steps: int = key(
        0, says="The learning rate rises linearly to its largest value during this many steps.", unit="steps", least=0
    )
    final_fraction: float = key(
        0.0,
        says="At the last step this fraction of the largest learning rate is left, unless it is constant.",
        least=0,
        most=1,
    )
    decay_fraction: float = key(
        1.0,
        says="The learning rate follows the curve during this last fraction of the steps after the warm-up and stays "
        "at its largest before; less than 1 makes of any curve warm-up, stable and decay (Hägele et al., "
        "arXiv:2405.18392).",
        least=0,
        most=1,
    )
    clip: float = key(
        1.0,
        says="A gradient whose global norm is larger is scaled down to this norm; 0 means no clipping (Pascanu, "
        "Mikolov, Bengio, arXiv:1211.5063).",
        least=0,
    )
    weight_decay: float = key(
        0.1,
        says="Each step takes this much, times the learning rate, of a weight off it, apart from the gradient; gains "
        "and biases keep theirs.",
        least=0,
    )
    average: float = key(
        0.0,
        says="A moving average of the weights keeps this much of itself at each step, 0.99 say, and the held-out text "
        "is measured and text is generated with it; training goes on with the weights themselves; 0 means no average.",
        least=0,
        below=1,
    )


class Optimizer(Protocol):
    """Updates `store.data` in place, to the same bits on all ranks; its state is flat buffers of the store's layout."""

    def step(self, gradient: Any, learning_rate: float, scale: float, number: int) -> None: ...
    def state(self) -> dict[str, Any]: ...


@runtime_checkable
class Shared(Protocol):
    """An optimiser whose ranks do parts of each other's work.

    Messages are exchanged in `prepare` alone, which changes no state, so that a rank that dies leaves nobody with half
    an update; `step` of the same arguments follows, or nothing.
    """

    def prepare(self, gradient: Any, learning_rate: float, scale: float, number: int) -> None: ...
    def regroup(self, mesh: "Mesh") -> None: ...
