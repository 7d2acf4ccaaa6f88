"""Recurrent layers: a cell that goes through the positions one after another, and the part that it is in a stack."""

from typing import Any, ClassVar, Protocol

from mlm_mpi import order
from mlm_mpi.backend.arrays import module_of
from mlm_mpi.layers.base import Array, Context, Flow
from mlm_mpi.layers.block import Norm
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.linear import Linear, flat
from mlm_mpi.ops import gru, linear, lstm, matmul
from mlm_mpi.ops.recurrence import shifted
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import Parameter, equal


class Cell(Protocol):
    """The state of every position, from zero at the beginning of a window or of a document. Shapes: (B, T, C) both."""

    def parameters(self) -> list[Parameter]: ...
    def forward(self, x: Array, ctx: Context) -> tuple[Array, Any]: ...
    def backward(self, dy: Array, saved: Any, ctx: Context) -> Array: ...


class _Gated:
    """What gated cells share: G gates, each given x W + b for all positions by one product, and h u step by step.

    tp cuts hidden units, so columns of W, b and u; a rank needs all of h at every step.
    """

    GATES: ClassVar[int]
    BIAS: ClassVar[str | tuple[float, ...]] = "zeros"  # what those of the gates start at

    def __init__(self, name: str, width: int, std: float, shares: int = order.MOST) -> None:
        """`shares`: at most, of a sum over units."""
        self.name, gates = name, self.GATES
        each = (equal(1, gates),)
        self.input = Linear(f"{name}.input", width, (gates, width), std, cut=2, shares=shares, matrices=each)
        assert self.input.bias is not None
        self.input.bias.init = self.BIAS
        layout = Layout((width, gates, width), (None, None, "tp"), (1, 1, 1), self.input.shares_out)
        self.recurrent = Parameter(f"{name}.recurrent.weight", layout, std, decay=True, matrices=each)
        self.shares = self.input.shares_out

    def parameters(self) -> list[Parameter]:
        return [*self.input.parameters(), self.recurrent]

    def _given(self, x: Array, ctx: Context) -> tuple[Array, Array | None, tuple[Array, ...]]:
        """x W + b (B, T, G, C), where documents start, the state before (none of it at the beginning)."""
        pre = self.input.forward(x, ctx)[0].reshape(*x.shape[:2], self.GATES, -1)
        starts = None if ctx.batch is None else ctx.batch.inputs.get("starts")
        return pre, starts, () if ctx.cache is None else ctx.cache.states.get(self.name, ())

    def _keep(self, ctx: Context, *states: Array) -> None:
        if ctx.cache is not None:
            ctx.cache.states[self.name] = tuple(module_of(x).ascontiguousarray(x[:, -1]) for x in states)

    def _backward_input(self, dpre: Array, x: Array, ctx: Context) -> Array:
        return self.input.backward(dpre.reshape(*x.shape[:2], -1), x, ctx)


class LSTM(_Gated):
    """Long short-term memory (`ops/lstm.py`). Its forget gates start open, with a bias of 1 (Gers et al., 2000).

    W and u are (C, 4, C), the bias (4, C); gates i, f, g, o.
    """

    GATES, BIAS = 4, (0.0, 1.0, 0.0, 0.0)

    def forward(self, x: Array, ctx: Context) -> tuple[Array, Any]:
        pre, starts, state = self._given(x, ctx)
        h, c = lstm.forward(pre, self.recurrent.data, starts, *state)
        self._keep(ctx, h, c)
        return h, (x, pre, starts, h, c)

    def backward(self, dy: Array, saved: Any, ctx: Context) -> Array:
        x, gates, starts, h, c = saved
        lstm.backward(dy, gates, c, self.recurrent.data, starts, self.shares)
        dp, before = gates.reshape(-1, 4 * h.shape[2]), flat(shifted(h, starts))
        matmul.add(before.T, dp, ctx.grad(self.recurrent).reshape(h.shape[2], -1), ctx.accumulate)
        return self._backward_input(gates, x, ctx)


class GRU(_Gated):
    """The gated recurrent unit (`ops/gru.py`). W and u are (C, 3, C), the bias (3, C), that of h u_n (C,); r, z, n."""

    GATES = 3

    def __init__(self, name: str, width: int, std: float, shares: int = order.MOST) -> None:
        super().__init__(name, width, std, shares)
        layout = Layout((width,), ("tp",), (1,), self.shares)
        self.bias = Parameter(f"{name}.recurrent.bias", layout, "zeros")

    def parameters(self) -> list[Parameter]:
        return [*super().parameters(), self.bias]

    def forward(self, x: Array, ctx: Context) -> tuple[Array, Any]:
        pre, starts, state = self._given(x, ctx)
        h, m = gru.forward(pre, self.recurrent.data, self.bias.data, starts, *state)
        self._keep(ctx, h)
        return h, (x, pre, starts, h, m)

    def backward(self, dy: Array, saved: Any, ctx: Context) -> Array:
        x, gates, starts, h, m = saved
        gru.backward(dy, gates, h, m, self.recurrent.data, starts, self.shares)
        width = h.shape[2]
        dp, dm, before = gates.reshape(-1, 3 * width), flat(m), flat(shifted(h, starts))
        du = ctx.grad(self.recurrent).reshape(width, -1)
        matmul.add(before.T, dp[:, : 2 * width], du[:, : 2 * width], ctx.accumulate)
        matmul.add(before.T, dm, du[:, 2 * width :], ctx.accumulate)
        linear.bias_gradient(dm, ctx.grad(self.bias), ctx.accumulate, ctx.pieces(m))
        return self._backward_input(gates, x, ctx)


class RecurrentBlock:
    """x -> dropout(cell(x)), or x + dropout(cell(norm(x))) where it has a norm. Shapes: (B, T, C) -> (B, T, C).

    Dropout is between layers and never on the way from one position to the next: Zaremba et al., arXiv:1409.2329.
    """

    def __init__(self, cell: Cell, drop: Dropout, norm: Norm | None = None) -> None:
        self.cell, self.drop, self.norm = cell, drop, norm

    def parameters(self) -> list[Parameter]:
        return [*(self.norm.parameters() if self.norm else []), *self.cell.parameters()]

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, Any]:
        n, s_norm = self.norm.forward(x[0], ctx) if self.norm else (x[0], None)
        h, s_cell = self.cell.forward(n, ctx)
        y, draw = self.drop.forward(h, ctx)
        return (x[0] + y if self.norm else y,), (s_norm, s_cell, draw)

    def backward(self, dy: Flow, saved: Any, ctx: Context) -> Flow:
        s_norm, s_cell, draw = saved
        dx = self.cell.backward(self.drop.backward(dy[0], draw, ctx), s_cell, ctx)
        return (self.norm.backward(dx, s_norm, ctx, add=dy[0]) if self.norm else dx,)


class Identity:
    """What it is given: where a model has no final norm."""

    def parameters(self) -> list[Parameter]:
        return []

    def forward(self, x: Array, ctx: Context) -> tuple[Array, Any]:
        return x, None

    def backward(self, dy: Array, saved: Any, ctx: Context) -> Array:
        return dy
