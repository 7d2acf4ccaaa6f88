"""Muon: the momentum of a hidden layer's weight, made orthogonal, is its update; AdamW moves every other parameter.

    M ← μ M + (1 − μ) g,   u = μ M + (1 − μ) g (Nesterov),   W ← (1 − η λ) W − η √max(1, out/in) · polar(u)

polar(U S Vᵀ) = U Vᵀ: all directions move alike, however much the gradient prefers a few of them. Its iteration is a
polynomial x ← a x + b x³ + c x⁵ of the singular values: five times that of Jordan, or the five best ones in turn. The
scale is Jordan's, with which a learning rate serves other widths too; that of Liu et al., 0.2 √max(in, out), gives
updates the size of AdamW's.

ops/polar.py is that iteration.

The matrices are shared out over the data-parallel ranks by their cost, every rank makes its own orthogonal, and the
results are gathered: nothing that is added depends on the owner, so neither do the bits.

Source: Jordan et al., "Muon", 2024; Liu et al., "Muon is scalable for LLM training", arXiv:2502.16982 (weight decay);
Amsel et al., "The Polar Express", arXiv:2505.16932.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlm_mpi.backend.arrays import fill, row_blocks, to_host
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.config.keys import key
from mlm_mpi.exact import power
from mlm_mpi.ops import cast, polar
from mlm_mpi.optim import Common, adamw
from mlm_mpi.params.clip import norms_of
from mlm_mpi.params.store import FlatStore, Span

MOMENTS = 2  # flat buffers that `state` holds

_JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
_POLAR_EXPRESS = (  # optimal for singular values in [0.001, 1], each in its turn
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
_SAFETY = 1.01  # of the paper: what is rounded may not leave the interval for which a polynomial is made
_LEAST_NORM = 1e-30  # of a matrix that has a direction at all; 1 / it is still a float32


@dataclass(frozen=True)
class Settings(Common):
    """Muon: weights of hidden layers move by their momentum made orthogonal, every other parameter by AdamW."""

    name: str = key("muon", says="This optimiser updates the weights.", room="optim")
    learning_rate: float = key(
        0.02,
        says="The learning rate of the hidden layers' weights rises to this value during the warm-up; its schedule "
        "scales that of AdamW too.",
        above=0,
    )
    weight_decay: float = key(
        0.1,
        says="Each step takes this much, times the learning rate, of a hidden layer's weight off it, apart from the "
        "gradient.",
        least=0,
    )
    momentum: float = key(
        0.95, says="This much of the running mean of gradients is kept at each step.", least=0, below=1
    )
    momentum_start: float = key(
        0.85, says="The momentum begins with this value and rises linearly to optim.momentum.", least=0, below=1
    )
    momentum_steps: int = key(
        300, says="The momentum rises during this many steps; 0 means that it does not.", unit="steps", least=0
    )
    nesterov: bool = key(
        True, says="If true, the update looks one step ahead: the gradient is mixed into the momentum once more."
    )
    iteration: Literal["polar-express", "newton-schulz"] = key(
        "newton-schulz",  # by 0.008 nats after 120 steps, 2 layers of C 128, with either of two seeds
        says="The momentum is made orthogonal by this iteration: five times the polynomial of Jordan et al., 2024, or "
        "five optimal ones in turn (Amsel et al., arXiv:2505.16932).",
    )
    adam_learning_rate: float = key(
        8e-3, says="The learning rate of all other parameters, tables, gains and biases, at its largest.", least=0
    )
    adam_weight_decay: float = key(
        0.0, says="The weight decay of those other parameters that have one, such as tables.", least=0
    )
    beta1: float = key(
        0.9, says="AdamW keeps this much of the running mean of gradients at each step.", least=0, below=1
    )
    beta2: float = key(0.95, says="AdamW keeps this much of the running mean of their squares.", least=0, below=1)
    epsilon: float = key(
        1e-8, says="AdamW adds this to the root of the mean square, against division by zero.", above=0
    )


def coefficients(iteration: str) -> tuple[float, polar.Polynomials]:
    """(the largest singular value that it is meant for, a b c of each polynomial)."""
    if iteration == "newton-schulz":
        return 1.0, _JORDAN
    safe = [(a / _SAFETY, b / power(_SAFETY, 3), c / power(_SAFETY, 5)) for a, b, c in _POLAR_EXPRESS[:-1]]
    return 1.0 / _SAFETY, [*safe, _POLAR_EXPRESS[-1]]


def orthogonalise(stack: Any, largest: float, polynomials: polar.Polynomials) -> None:
    """u = p(u) for each u of a stack, in place: p of u's singular values · largest / ‖u‖; zero of what is zero.

    Shapes: (matrices, rows, columns), contiguous. A row or column has one singular value, which becomes 1 exactly.
    """
    single = 1 in stack.shape[1:]
    for u, length in zip(stack, norms_of(stack), strict=True):
        u *= 0.0 if length < _LEAST_NORM else (1.0 if single else largest) / length
    if not single:
        polar.iterate(stack, polynomials)


def shared_out(costs: Sequence[int], ranks: int) -> list[int]:
    """The rank that owns each of these pieces of work: the costliest first, each to whoever has least so far."""
    loads, owners = [0] * ranks, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        owners[number] = min(range(ranks), key=lambda rank: (loads[rank], rank))
        loads[owners[number]] += costs[number]
    return owners


@dataclass(frozen=True)
class _Matrix:
    """One matrix (in, …) of a parameter: which of all, its owner, and where its update lies, contiguous."""

    span: Span
    number: int
    owner: int
    update: Any

    @property
    def scale(self) -> float:
        """√max(1, out/in): an update of a wider result may be larger for the same change of its elements."""
        rows = len(self.update)
        return math.sqrt(max(1.0, self.update.size / (rows * rows)))


WHOLE_MATRICES = True  # no range of weights that a rank owns may end inside one


class Muon:
    """`moment1` is the momentum of matrices and AdamW's first moment of the rest; `moment2` AdamW's second, else zero.

    Beside them it holds all updates of a step, as large as the matrices are, and work for the largest one. Those of one
    shape that a rank owns are one stack.
    """

    def __init__(self, optim: Settings, store: FlatStore, mesh: Mesh) -> None:
        self.optim, self.store = optim, store
        self.moment1, self.moment2 = store.new_buffer(), store.new_buffer()
        self._largest, self._polynomials = coefficients(optim.iteration)
        self.hidden = [span for span in store.spans if span.parameter.matrices is not None]
        self.others = [span for span in store.spans if span.parameter.matrices is None]
        self.adam = adamw.Settings(
            learning_rate=optim.adam_learning_rate, weight_decay=optim.adam_weight_decay, beta1=optim.beta1,
            beta2=optim.beta2, epsilon=optim.epsilon,
        )  # fmt: skip
        self.regroup(mesh)

    def regroup(self, mesh: Mesh) -> None:
        """Shares the matrices out over the ranks of a mesh."""
        self.group = mesh.group("dp")
        self._share_out()

    def _share_out(self) -> None:
        """Owners of all matrices, and one buffer for their updates, those of an owner side by side, shape by shape."""
        found = [(span, view.shape) for span in self.hidden for view in self._matrices(span, self.moment1)]
        sides = [(shape[0], math.prod(shape[1:])) for _, shape in found]
        owners = shared_out([polar.flops(*pair) for pair in sides], self.group.size)
        order = sorted(range(len(found)), key=lambda number: (owners[number], sides[number], number))
        edges = [0, *itertools.accumulate(math.prod(sides[number]) for number in order)]
        self.updates = self.store.xp.zeros(edges[-1], self.store.dtype)
        places = list(zip(order, itertools.pairwise(edges), strict=True))
        self.matrices = [
            _Matrix(found[number][0], number, owners[number], self.updates[start:stop].reshape(found[number][1]))
            for number, (start, stop) in places
        ]
        self._stacks, self._counts = [], [0] * self.group.size
        for (owner, pair), some in itertools.groupby(places, key=lambda place: (owners[place[0]], sides[place[0]])):
            spans = [span for _, span in some]
            start, stop = spans[0][0], spans[-1][1]
            self._counts[owner] += stop - start
            if owner == self.group.rank:
                self._stacks.append(self.updates[start:stop].reshape(len(spans), *pair))
        largest = max((stack[0].size for stack in self._stacks), default=0)
        self._work = self.store.xp.empty(largest, self.store.dtype)

    def state(self) -> dict[str, Any]:
        return {"moment1": self.moment1, "moment2": self.moment2}

    @property
    def work_bytes(self) -> int:
        """What it holds beside its state, and what its products take for one matrix."""
        side = max((min(stack.shape[1:]) for stack in self._stacks), default=0)
        return int(self.updates.nbytes + 2 * self._work.nbytes + 4 * side * side * self.store.dtype.itemsize)

    def momentum(self, number: int) -> float:
        """That of update `number` (from 1)."""
        o = self.optim
        share = min(1.0, (number - 1) / o.momentum_steps) if o.momentum_steps else 1.0
        return o.momentum_start + (o.momentum - o.momentum_start) * share

    def prepare(self, gradient: Any, learning_rate: float, scale: float, number: int) -> None:
        """The updates of all matrices, before anything else is changed. Collective over dp."""
        self._directions(gradient, self.momentum(number), scale)
        for stack in self._stacks:
            orthogonalise(stack, self._largest, self._polynomials)
        self._gather(number)

    def step(self, gradient: Any, learning_rate: float, scale: float, number: int) -> None:
        """Update number `number` (from 1) with g = scale · gradient, after its `prepare`."""
        keep = self.momentum(number)
        for span in self.hidden:
            part = slice(span.start, span.stop)
            _mix(self.moment1[part], gradient[part], keep, (1.0 - keep) * scale)
        rate = self.adam.learning_rate * (learning_rate / self.optim.learning_rate)
        moments = self.moment1, self.moment2
        adamw.move(self.store, self.others, gradient, moments, self.adam, rate, scale, number)
        weights = self._views(self.store.data)
        for matrix in self.matrices:
            _move(weights[matrix.number], matrix.update, learning_rate * matrix.scale,
                  1.0 - learning_rate * self.optim.weight_decay * matrix.span.parameter.decay)  # fmt: skip
        if self.store.working is not self.store.data:
            for span in self.hidden:
                cast.to(self.store.data[span.start : span.stop], self.store.working[span.start : span.stop])

    def _directions(self, gradient: Any, keep: float, scale: float) -> None:
        """Into the updates of what this rank owns: the momentum that `step` will hold, with Nesterov's look ahead."""
        gradients, moments = self._views(gradient), self._views(self.moment1)
        multiply, take = self.store.xp.multiply, (1.0 - keep) * scale
        for matrix in self.matrices:
            if matrix.owner != self.group.rank:
                continue
            out, fresh = matrix.update, self._work[: matrix.update.size].reshape(matrix.update.shape)
            multiply(gradients[matrix.number], take, out=fresh)
            multiply(moments[matrix.number], keep, out=out)
            out += fresh
            if self.optim.nesterov:
                out *= keep
                out += fresh

    def _views(self, flat: Any) -> list[Any]:
        """All matrices (in, …) in a flat buffer, by number."""
        return [view for span in self.hidden for view in self._matrices(span, flat)]

    def _matrices(self, span: Span, flat: Any) -> list[Any]:
        mine = flat[span.start : span.stop].reshape(span.shape)
        return span.parameter.as_matrices(mine, span.parameter.layout.box(self.store.grid))

    def _gather(self, number: int) -> None:
        """Everybody's updates to everybody, through the CPU's memory."""
        if self.group.size == 1:
            return
        host = to_host(self.updates)
        self.group.gather_parts(host, self._counts, f"the orthogonal updates of step {number}")
        if host is not self.updates:
            fill(self.updates, host)


def _mix(mean: Any, gradient: Any, keep: float, take: float) -> None:
    """mean = keep · mean + take · gradient. Shapes: (n,)."""
    for part in row_blocks(mean):
        mean[part] *= keep
        mean[part] += gradient[part] * take


def _move(weights: Any, update: Any, rate: float, shrink: float) -> None:
    """weights = shrink · weights − rate · update. Shapes: (rows, …)."""
    for rows in row_blocks(update):
        weights[rows] *= shrink
        weights[rows] -= update[rows] * rate


def build(settings: Settings, store: FlatStore, mesh: Mesh) -> Muon:
    """The optimiser over the parameters of a store."""
    return Muon(settings, store, mesh)
