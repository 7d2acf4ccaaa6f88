"""Causal self-attention of a modern decoder: groups of queries that share a key and a value, rotary positions."""

from typing import Any, NamedTuple

from mlm_mpi import order
from mlm_mpi.backend.arrays import deposit, module_of
from mlm_mpi.comm.collectives import joined
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.linear import Linear, ResidualLinear
from mlm_mpi.ops import attention, rotary
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import Parameter, equal


class Heads(NamedTuple):
    """G groups of g queries each and one key and value, all of width D."""

    groups: int
    queries: int
    width: int


class Positions:
    """Cosines and sines of every position, (T, R/2) float32 each: constants of a model, which all its blocks share."""

    def __init__(self, cos: Any, sin: Any) -> None:
        self._tables = cos, sin
        self._elsewhere: Any = None  # the same in the memory of a GPU

    def at(self, x: Any, start: int, length: int) -> tuple[Any, Any]:
        """Those of positions start … start + length − 1, where x lies."""
        tables, xp = self._tables, module_of(x)
        if not isinstance(tables[0], xp.ndarray):
            if self._elsewhere is None:
                self._elsewhere = tuple(map(xp.asarray, tables))
            tables = self._elsewhere
        return tables[0][start : start + length], tables[1][start : start + length]


class GroupedAttention:
    """Shapes: (B, T, C) -> (B, T, C). tp cuts whole groups.

    The fused projection (C, G, g + 2, D) gives each group its queries, its key and its value side by side, so that a
    share of the groups is a range of it. Source: Ainslie et al., arXiv:2305.13245 (groups), Su et al., arXiv:2104.09864
    (rotary positions), Henry et al., arXiv:2010.04245 (normalised queries and keys).
    """

    def __init__(
        self, name: str, heads: Heads, project: ResidualLinear, width: int, std: float, drop: Dropout,
        positions: Positions, window: int = 0, norm_epsilon: float | None = None, bias: bool = False,
        shares: int = order.MOST,
    ) -> None:  # fmt: skip
        """`window`: a query sees so many keys at most, its own among them; 0: all before it. `norm_epsilon`: of the
        normalisation of queries and keys; None: there is none. `shares`: at most, of a sum over groups or positions.
        """
        self.name, self.heads, self.project, self.drop = name, heads, project, drop
        self.positions, self.window, self.epsilon, self.most = positions, window, norm_epsilon, shares
        outputs = heads.groups, heads.queries + 2, heads.width
        each = equal(1, heads.groups), equal(2, heads.queries + 2)
        self.qkv = Linear(f"{name}.qkv", width, outputs, std, cut=1, shares=shares, bias=bias, matrices=each)
        self.gain = None
        if norm_epsilon is not None:  # of the queries, of the key
            self.gain = Parameter(f"{name}.norm.gain", Layout((2, heads.width)), "ones")

    def parameters(self) -> list[Parameter]:
        gain = [] if self.gain is None else [self.gain]
        return [*self.qkv.parameters(), *gain, *self.project.parameters()]

    def forward(self, x: Any, ctx: Context, residual: Any = None) -> tuple[Any, Any]:
        """`residual` or None: what the result is added to."""
        units = self._units(self.qkv.forward(x, ctx)[0])
        start = ctx.cache.length if ctx.cache is not None else 0
        turned, inverse = self._turn(units, start)
        q, k, v = *queries_and_key(turned), unit_of(units, -1)
        if ctx.cache is not None:
            k, v = ctx.cache.extend(self.name, k, v)
        draw = self.drop.of_heads(ctx, q.shape[1] * q.shape[2], k.shape[2], k.shape[2])
        starts = self.starts(units, ctx, start)
        share = order.share_length(k.shape[2], self.most) if ctx.cache is None else 0
        o, lse = attention.forward(q, k, v, draw=draw, share=share, starts=starts)  # (B, T, H, D)
        y, s_project = self.project.join(o.reshape(*o.shape[:2], -1), residual, ctx)
        return y, (x, units, turned, inverse, o, lse, draw, starts, share, s_project)

    def backward(self, dy: Any, saved: Any, ctx: Context) -> Any:
        x, units, turned, inverse, o, lse, draw, starts, share, s_project = saved
        do = self.project.backward(dy, s_project, ctx).reshape(o.shape)
        dunits = module_of(dy).empty_like(units)
        dturned = dunits[..., :-1, :]
        attention.backward(
            do, *queries_and_key(turned), unit_of(units, -1), o, lse, *queries_and_key(dturned), unit_of(dunits, -1),
            draw=draw, share=share, starts=starts,
        )  # fmt: skip
        self._turn_back(dturned, units[..., :-1, :], inverse, ctx)
        return self.qkv.backward(dunits.reshape(*units.shape[:2], -1), x, ctx)

    def maps(self, x: Any, ctx: Context) -> Any:
        """Who attends to whom, in float64: rows look at columns. Shapes: (B, T, C) -> (B, H, T, T)."""
        units = self._units(self.qkv.forward(x, ctx)[0])
        q, k = queries_and_key(self._turn(units, 0)[0])
        return attention.probabilities(q, k, starts=self.starts(units, ctx, 0))

    def _turn(self, units: Any, start: int) -> tuple[Any, Any]:
        """`rotary.forward` of queries and keys from position `start` on: (B, T, G, g + 2, D) -> (B, T, G, g + 1, D)."""
        cos, sin = self.positions.at(units, start, units.shape[1])
        gain = None if self.gain is None else self.gain.data
        turned: tuple[Any, Any] = rotary.forward(units[..., :-1, :], cos, sin, gain, self.epsilon or 0.0)
        return turned

    def _turn_back(self, dturned: Any, units: Any, inverse: Any, ctx: Context) -> None:
        """Gradients before normalisation and rotation, over those behind; the gains are those of all ranks' groups."""
        gain, dgain, accumulate = None, None, ctx.accumulate
        if self.gain is not None:
            gain, dgain = self.gain.data, ctx.grad(self.gain)
            if ctx.tp.size > 1:
                dgain, accumulate = module_of(units).empty_like(dgain), False
        cos, sin = self.positions.at(units, 0, units.shape[1])
        shares = self.qkv.shares_out // ctx.tp.size
        rotary.backward(
            dturned, units, cos, sin, gain, inverse, dgain, accumulate, ctx.pieces(units), shares, out=dturned
        )  # fmt: skip
        if self.gain is not None and ctx.tp.size > 1:
            deposit(joined(ctx.tp, dgain, f"the gains of {self.name}"), ctx.grad(self.gain), ctx.accumulate)

    def _units(self, qkv: Any) -> Any:
        """(B, T, G·(g + 2)·D) -> (B, T, G, g + 2, D), of this rank's groups."""
        return qkv.reshape(*qkv.shape[:2], -1, self.heads.queries + 2, self.heads.width)

    def starts(self, x: Any, ctx: Context, start: int) -> Any:
        """The first key that each query sees, (B, T) int32; None: all before it."""
        starts = None if ctx.batch is None else ctx.batch.inputs.get("starts")
        if not self.window:
            return starts
        xp, (batch, length) = module_of(x), x.shape[:2]
        first = xp.maximum(xp.arange(start, start + length, dtype=xp.int32) - (self.window - 1), 0)
        if starts is None:
            return xp.ascontiguousarray(xp.broadcast_to(first, (batch, length)))
        return xp.maximum(starts, first)


def unit_of(units: Any, number: int) -> Any:
    """Unit `number` of every group: (B, T, G, U, D) -> (B, G, T, D), a view."""
    return units[..., number, :].swapaxes(1, 2)


def queries_and_key(turned: Any) -> tuple[Any, Any]:
    """(B, T, G, g + 1, D) -> (B, G, g, T, D), (B, G, T, D), views."""
    return turned[..., :-1, :].transpose(0, 2, 3, 1, 4), unit_of(turned, -1)
