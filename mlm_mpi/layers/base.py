"""What layers and parts are: parameters, a forward that returns what backward needs, and where it all happens."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

from mlm_mpi import order
from mlm_mpi.backend.arrays import module_of
from mlm_mpi.comm.collectives import gathered, joined, scattered
from mlm_mpi.comm.group import Group
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.data.batch import Batch
from mlm_mpi.params.store import Parameter

Array = Any  # NumPy's, or CuPy's
Flow = tuple[Array, ...]  # the arrays that cross the border between two parts


@dataclass(frozen=True)
class Context:
    """Immutable: where and when a forward or backward runs, on which micro-batch, and where its gradients go.

    `gradients`: views of the buffer of the lane at hand. `accumulate`: gradients are added to what it holds; otherwise
    written over it, so that the first micro-batch of a lane needs no zeroed buffer. `tally`: takes the sums that the
    head forms, "loss" among them. `cache`: keys and values of earlier positions. `shares`: at most, of a sum over rows.
    `lane`: the second sums of tied parameters over the lane at hand, none where this micro-batch is all of it;
    `closes`: it is the lane's last. `later`: takes what `owe` is given, in the input half of a backward (`Chain`).
    """

    mesh: Mesh = field(default_factory=Mesh)
    seed: int = 0
    step: int = 0
    micro_batch: int = 0
    training: bool = False
    batch: Batch | None = None
    tally: dict[str, Any] = field(default_factory=dict)
    gradients: Mapping[Parameter, Array] = field(default_factory=dict)
    accumulate: bool = False
    cache: "Any | None" = None
    shares: int = order.MOST
    lane: Mapping[Parameter, Array] = field(default_factory=dict)
    closes: bool = True
    later: "list[Callable[[Context], None]] | None" = None

    @property
    def tp(self) -> Group:
        """The ranks that share this forward and backward with me."""
        return self.mesh.group("tp")

    @property
    def cuts_positions(self) -> bool:
        """Whether I hold some positions only of what lies between the sums of tp ranks."""
        return self.mesh.sequence and self.tp.size > 1

    def entered(self, x: Array, what: str) -> Array:
        """All positions of an activation, for a product over some features. Shapes: (B, t, C) -> (B, T, C)."""
        return gathered(self.tp, x, what) if self.cuts_positions else x

    def positions(self, x: Array) -> Array:
        """Those of an activation that are mine, in one piece: (B, T, C) -> (B, t, C)."""
        if not self.cuts_positions:
            return x
        length = x.shape[1] // self.tp.size
        return module_of(x).ascontiguousarray(x[:, self.tp.rank * length : (self.tp.rank + 1) * length])

    def uncut(self) -> "Context":
        """The same for arrays of which each tp rank has all rows."""
        return replace(self, mesh=replace(self.mesh, sequence=False)) if self.cuts_positions else self

    def of_source(self) -> "Context":
        """The same for an encoder, which reads the batch's source."""
        assert self.batch is not None and self.batch.source is not None, "the batch has no source"
        return replace(self, batch=self.batch.source)

    def left(self, part: Array, what: str) -> Array:
        """Σ over tp ranks of their parts, of my positions. Shapes: (B, T, C) -> (B, t, C); over `part` where t is T."""
        return scattered(self.tp, part, what) if self.cuts_positions else joined(self.tp, part, what)

    def grad(self, parameter: Parameter) -> Array:
        """Where the gradient of a parameter belongs."""
        return self.gradients[parameter]

    def owe(self, work: "Callable[[Context], None]") -> None:
        """Does what no gradient of an input waits for: now, or in the weight half, with the context of that.

        What uses `lane` has to be owed; any other gradient may be formed at once, and is then added in its turn.
        """
        if self.later is None:
            work(self)
        else:
            self.later.append(work)

    def pieces(self, x: Array) -> int:
        """In so many pieces sums over the rows of an activation are formed. Shapes: x (B, T, …), or (N, …): one."""
        return order.pieces(x.shape[0], x.shape[1], self.shares) if x.ndim > 2 else 1

    def pieces_of_mine(self, x: Array) -> int:
        """So many of one row's pieces lie in my positions of it. Shapes: x (B, t, …)."""
        return order.shares(x.shape[1] * self.tp.size, self.shares) // self.tp.size


Side = Literal["batch", "source"]  # what a decoder reads, or the only text, and what its encoder does


class Map(NamedTuple):
    """Who attends to whom: rows look at columns. Shapes: probabilities (B, H, T, S) float64."""

    probabilities: Array
    rows: Side = "batch"
    columns: Side = "batch"


class Layer(Protocol):
    """A forward/backward pair over one array. Nothing about an activation stays in the layer."""

    def parameters(self) -> list[Parameter]: ...
    def forward(self, x: Array, ctx: Context) -> tuple[Array, Any]: ...
    def backward(self, dy: Array, saved: Any, ctx: Context) -> Array: ...


class Part(Protocol):
    """What lies between two places where a pipeline may be cut.

    The first part of a model takes the empty flow and reads `ctx.batch.inputs`. The last one, the task's head, reads
    `ctx.batch.targets`, returns the empty flow and tallies: in training its forward keeps x only, and its backward
    computes the loss, so that gradients leave in the order of backwards, whatever the order of forwards was.
    """

    def parameters(self) -> list[Parameter]: ...
    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, Any]: ...
    def backward(self, dy: Flow, saved: Any, ctx: Context) -> Flow: ...


def flows_into(part: Part) -> tuple[Side, ...]:
    """Whose positions each array has that flows into a part: the batch's, unless the part says otherwise (`INTO`)."""
    return getattr(part, "INTO", ("batch",))


def elements(part: Layer | Part) -> int:
    """Numbers in its parameters, on all ranks together."""
    return sum(math.prod(parameter.layout.shape) for parameter in part.parameters())


class Sizes(NamedTuple):
    """What a model must know of its data, and how many shares a sum that a mesh may cut may have."""

    vocabulary: int
    shares: int = order.MOST
    labels: int = 0  # of a task that has some


class Least(NamedTuple):
    """Lower bounds in numbers, before anything is built that may not fit."""

    parts: int
    parameters: int
    kept: int = 0  # elements that a training forward keeps for its backward
    passing: int = 0  # elements of the largest array between two parts


class Trunk(NamedTuple):
    """A model without its head: the parts, and what a head over them needs."""

    parts: list[Part]
    norm: Layer  # the final one, before the head
    width: int
    table: Parameter  # of the head of a language model; the embedding's, unless it is not `tied`
    cap: float = 0.0  # of the logits: cap · tanh(logit / cap); 0: none
