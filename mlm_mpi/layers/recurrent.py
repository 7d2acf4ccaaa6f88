"""Recurrent layers: a cell that goes through the positions one after another, and the part that it is in a stack."""

from typing import Any, ClassVar, Protocol

from mlm_mpi import order
from mlm_mpi.backend.arrays import module_of, wide
from mlm_mpi.comm.collectives import gathered, scattered
from mlm_mpi.layers.base import Array, Context, Flow
from mlm_mpi.layers.block import Norm
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.linear import Linear, flat
from mlm_mpi.ops import gru, linear, lstm, matmul
from mlm_mpi.ops.recurrence import carried, shifted
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import Parameter, equal


class Cell(Protocol):
    """The state of every position, from zero at the beginning of a window or of a document. Shapes: (B, T, C) both."""

    def parameters(self) -> list[Parameter]: ...
    def forward(self, x: Array, ctx: Context) -> tuple[Array, Any]: ...
    def backward(self, dy: Array, saved: Any, ctx: Context) -> Array: ...


class _Gated:
    """What gated cells share: G gates, each given x W + b for all positions by one product, and h u step by step.

    tp cuts hidden units, so columns of W, b and u. A rank needs all of h at every step, which is gathered there, and of
    the gradient of h its units' part of a sum over all: a message a step and way, to every rank. One op runs all steps
    of a rank that has all units.
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
        """x W + b (B, T, G, C / R), where documents start, the state before (none of it at the beginning)."""
        pre = self.input.forward(x, ctx)[0]
        pre = pre.reshape(*pre.shape[:2], self.GATES, -1)
        starts = None if ctx.batch is None else ctx.batch.inputs.get("starts")
        return pre, starts, () if ctx.cache is None else ctx.cache.states.get(self.name, ())

    def _keep(self, ctx: Context, *states: Array) -> None:
        if ctx.cache is not None:
            ctx.cache.states[self.name] = tuple(module_of(x).ascontiguousarray(x[:, -1]) for x in states)

    def _backward_input(self, dpre: Array, x: Array, ctx: Context) -> Array:
        return self.input.backward(dpre.reshape(*dpre.shape[:2], -1), x, ctx)

    def _by_steps(self, pre: Array, ctx: Context) -> bool:
        """Whether each step is a call: ranks have some units each, or the only row is multiplied as it lies."""
        return ctx.tp.size > 1 or (pre.shape[0] * pre.shape[1] == 1 and wide(pre) is pre)

    def _forward_steps(
        self, pre: Array, starts: Array | None, state: tuple[Array, ...], ctx: Context
    ) -> tuple[Array, Array, Array]:
        """(h (B, T, C) of all units, of mine the gates (B, T, G, C / R) and what `_step` gives beside h (B, T, C / R)).

        Collective over tp.
        """
        xp, (batch, length, _, units) = module_of(pre), pre.shape
        first, matrix = ctx.tp.rank * units, self.recurrent.data.reshape(self.recurrent.data.shape[0], -1)
        gates = _by_time(pre)
        h, second = xp.empty((length, batch, len(matrix)), pre.dtype), xp.empty((length, batch, units), pre.dtype)
        whole, *more = state or (xp.zeros_like(h[0]),)
        also = more[0] if more else xp.zeros_like(second[0])
        for t in range(length):
            whole, also = carried(whole, starts, t), carried(also, starts, t)
            products = matmul.product(whole, matrix).reshape(batch, self.GATES, units)
            mine, also = self._step(gates[t], products, _some(whole, first, units), also)
            whole = gathered(ctx.tp, mine[..., None], f"the states of {self.name}").reshape(batch, -1)
            h[t], second[t] = whole, also
        return _by_time(h), _by_time(gates), _by_time(second)

    def _backward_steps(
        self, dy: Array, gates: Array, h: Array, second: Array, starts: Array | None, ctx: Context
    ) -> None:
        """`gates` and `second` become gradients, as in the op that runs all steps. Collective over tp."""
        batch, length, count, units = gates.shape
        first, turned = ctx.tp.rank * units, self.recurrent.data.reshape(h.shape[2], -1).T
        saved = tuple(map(_by_time, (_some(dy, first, units), gates, _some(h, first, units), second)))
        sums, carry = (module_of(dy).zeros_like(saved[0][0]) for _ in range(2))
        for t in range(length - 1, -1, -1):
            row = self._step_backward(saved, t, starts, sums, carry)
            if t:
                shares = self.shares // ctx.tp.size
                part = matmul.product(row.reshape(batch, -1), turned, shares, count)
                sums = scattered(ctx.tp, part, f"the gradient of the states of {self.name}")
                sums, carry = carried(sums, starts, t), carried(carry, starts, t)
        gates[...], second[...] = _by_time(saved[1]), _by_time(saved[3])

    def _step(self, gates: Array, products: Array, before: Array, also: Array) -> tuple[Array, Array]:
        """(h, what is kept beside it) of my units; `gates` (B, G, C / R) become what they are behind their function."""
        raise NotImplementedError

    def _step_backward(
        self, saved: tuple[Array, ...], t: int, starts: Array | None, sums: Array, carry: Array
    ) -> Array:
        """The gradient of h u (B, G, C / R) at step t. `saved`: dy, gates, h and what `_step` kept, (T, …) each, the
        second and the last to be written over; `sums`: what comes from the step behind through h u; `carry`: what comes
        past it, to be written over."""
        raise NotImplementedError


def _by_time(x: Array) -> Array:
    """(B, T, …) -> (T, B, …) in one piece, or back."""
    return module_of(x).ascontiguousarray(x.swapaxes(0, 1))


def _some(x: Array, first: int, units: int) -> Array:
    """Those of some units: (…, C) -> (…, C / R) in one piece."""
    return module_of(x).ascontiguousarray(x[..., first : first + units])


class LSTM(_Gated):
    """Long short-term memory (`ops/lstm.py`). Its forget gates start open, with a bias of 1 (Gers et al., 2000).

    W and u are (C, 4, C), the bias (4, C); gates i, f, g, o.
    """

    GATES, BIAS = 4, (0.0, 1.0, 0.0, 0.0)

    def forward(self, x: Array, ctx: Context) -> tuple[Array, Any]:
        pre, starts, state = self._given(x, ctx)
        if self._by_steps(pre, ctx):
            h, pre, c = self._forward_steps(pre, starts, state, ctx)
        else:
            h, c = lstm.forward(pre, self.recurrent.data, starts, *state)
        self._keep(ctx, h, c)
        return ctx.positions(h), (x, pre, starts, h, c)

    def _step(self, gates: Array, products: Array, before: Array, also: Array) -> tuple[Array, Array]:
        found: tuple[Array, Array] = lstm.step(gates, products, also)
        return found

    def backward(self, dy: Array, saved: Any, ctx: Context) -> Array:
        x, gates, starts, h, c = saved
        dy = ctx.entered(dy, f"the gradient of {self.name}")
        if ctx.tp.size > 1:
            self._backward_steps(dy, gates, h, c, starts, ctx)
        else:
            lstm.backward(dy, gates, c, self.recurrent.data, starts, self.shares)
        dp, before = gates.reshape(-1, 4 * c.shape[2]), flat(shifted(h, starts))
        matmul.add(before.T, dp, ctx.grad(self.recurrent).reshape(h.shape[2], -1), ctx.accumulate)
        return self._backward_input(gates, x, ctx)

    def _step_backward(
        self, saved: tuple[Array, ...], t: int, starts: Array | None, sums: Array, carry: Array
    ) -> Array:
        dy, gates, _, c = saved
        lstm.step_backward(dy[t], sums, _before(c, starts, t), c[t], gates[t], carry)
        return gates[t]


def _before(x: Array, starts: Array | None, t: int) -> Array:
    """x (T, B, C) of the position before t, zero before the first one."""
    return carried(x[t - 1], starts, t) if t else module_of(x).zeros_like(x[0])


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
        if self._by_steps(pre, ctx):
            h, pre, m = self._forward_steps(pre, starts, state, ctx)
        else:
            h, m = gru.forward(pre, self.recurrent.data, self.bias.data, starts, *state)
        self._keep(ctx, h)
        return ctx.positions(h), (x, pre, starts, h, m)

    def _step(self, gates: Array, products: Array, before: Array, also: Array) -> tuple[Array, Array]:
        found: tuple[Array, Array] = gru.step(gates, products, self.bias.data, before)
        return found

    def backward(self, dy: Array, saved: Any, ctx: Context) -> Array:
        x, gates, starts, h, m = saved
        dy = ctx.entered(dy, f"the gradient of {self.name}")
        if ctx.tp.size > 1:
            self._backward_steps(dy, gates, h, m, starts, ctx)
        else:
            gru.backward(dy, gates, h, m, self.recurrent.data, starts, self.shares)
        width = m.shape[2]
        dp, dm, before = gates.reshape(-1, 3 * width), flat(m), flat(shifted(h, starts))
        du = ctx.grad(self.recurrent).reshape(h.shape[2], -1)
        matmul.add(before.T, dp[:, : 2 * width], du[:, : 2 * width], ctx.accumulate)
        matmul.add(before.T, dm, du[:, 2 * width :], ctx.accumulate)
        linear.bias_gradient(dm, ctx.grad(self.bias), ctx.accumulate, ctx.pieces(m))
        return self._backward_input(gates, x, ctx)

    def _step_backward(
        self, saved: tuple[Array, ...], t: int, starts: Array | None, sums: Array, carry: Array
    ) -> Array:
        dy, gates, h, m = saved
        carry += sums
        return gru.step_backward(dy[t], _before(h, starts, t), gates[t], m[t], carry)


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
