"""Launches of the recurrent layers: all time steps in one call, the rows of the batch shared out among threads."""

import ctypes
from typing import Any

import numpy as np

from mlm_mpi.backend.cpu.contracts import dense, elements, halved, shaped
from mlm_mpi.backend.cpu.library import at
from mlm_mpi.backend.cpu.matmul import ONE_ROW
from mlm_mpi.backend.registry import Table

KERNELS = Table()

_LEAST_ROWS = 8  # of the batch, for a thread: each packs u for itself, and brings it at every step


class _Recurrence(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "length", "width", "gates", "shares")),
        ("u", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
    ]


def _fit(gates: Any, u: Any, starts: Any, states: tuple[Any, ...], first: tuple[Any, ...], count: int) -> str:
    """`gates` (B, T, count, C) and what has the shapes of `states` (B, T, C) and of the `first` one (B, C)."""
    if reason := elements(gates, u, *states, *first) or dense(starts, dtype=np.int32):
        return reason
    if gates.ndim != 4 or gates.size == 0 or gates.shape[2] != count:
        return "shapes differ"
    batch, length, _, width = gates.shape
    if batch * length == 1:
        return ONE_ROW
    return (
        shaped((width, count, width), u) or shaped((batch, length), starts)
        or shaped((batch, length, width), *states) or shaped((batch, width), *first)
    )  # fmt: skip


def _launch(lib: Any, function: str, u: Any, starts: Any, shares: int, fixed: tuple[Any, ...], *arrays: Any) -> None:
    """`function` of every thread's rows of `arrays` (B, …), each of which may be None, behind what is `fixed`."""
    batch, length = arrays[-1].shape[:2]
    parts = max(1, min(lib.threads, batch // _LEAST_ROWS))
    edges = [batch * part // parts for part in range(parts + 1)]

    def some(first: int, stop: int) -> None:
        mine = [None if x is None else x[first:stop] for x in (starts, *arrays)]
        recurrence = _Recurrence(stop - first, length, u.shape[0], u.shape[1], shares, at(u), at(mine[0]))
        pointer = lib.pointer(recurrence)
        work = np.empty(lib.of("recurrence_work", u)(pointer), np.float32)
        lib.of(function, u)(pointer, *map(at, fixed), *map(at, mine[1:]), at(work))

    if parts == 1:
        some(0, batch)
    else:
        list(lib.pool.map(some, edges[:-1], edges[1:]))


def _like_states(pre: Any) -> Any:
    return np.empty((*pre.shape[:2], pre.shape[3]), pre.dtype)


def _fit_step(gates: Any, count: int, wide: tuple[Any, ...], *rows: Any) -> str:
    """Those of one step: `gates` and what is as `wide` (B, count, C), `rows` (B, C)."""
    if reason := dense(gates, *wide, *rows):
        return reason
    if gates.ndim != 3 or gates.size == 0 or gates.shape[1] != count:
        return "shapes differ"
    return shaped(gates.shape, *wide) or shaped((gates.shape[0], gates.shape[2]), *rows)


# ---- lstm


@KERNELS.kernel(
    "lstm.forward", lambda pre, u, starts=None, h0=None, c0=None: _fit(pre, u, starts, (), (h0, c0), 4)
)  # fmt: skip
def _lstm_forward(lib: Any, pre: Any, u: Any, starts: Any = None, h0: Any = None, c0: Any = None) -> tuple[Any, Any]:
    h, c = _like_states(pre), _like_states(pre)
    _launch(lib, "lstm_forward", u, starts, 1, (), h0, c0, pre, h, c)
    return h, c


@KERNELS.kernel(
    "lstm.backward",
    lambda dy, gates, c, u, starts=None, shares=1: (
        _fit(gates, u, starts, (dy, c), (), 4) or halved(gates.shape[3], shares)
    ),
)
def _lstm_backward(lib: Any, dy: Any, gates: Any, c: Any, u: Any, starts: Any = None, shares: int = 1) -> None:
    _launch(lib, "lstm_backward", u, starts, shares, (), dy, gates, c)


@KERNELS.kernel("lstm.step", lambda pre, products, c0: _fit_step(pre, 4, (products,), c0))
def _lstm_step(lib: Any, pre: Any, products: Any, c0: Any) -> tuple[Any, Any]:
    h, c = np.empty_like(c0), np.empty_like(c0)
    lib.lstm_step(*c0.shape, *map(at, (pre, products, c0, c, h)))
    return h, c


@KERNELS.kernel(
    "lstm.step_backward",
    lambda dy, sums, before, c, gates, dc: _fit_step(gates, 4, (), dy, sums, before, c, dc),
)
def _lstm_step_backward(lib: Any, dy: Any, sums: Any, before: Any, c: Any, gates: Any, dc: Any) -> None:
    lib.lstm_step_backward(*dc.shape, *map(at, (dy, sums, before, c, gates, dc)))


# ---- gru


@KERNELS.kernel(
    "gru.forward",
    lambda pre, u, bias, starts=None, h0=None: _fit(pre, u, starts, (), (h0,), 3)
    or elements(pre, bias) or shaped(u.shape[:1], bias),
)  # fmt: skip
def _gru_forward(lib: Any, pre: Any, u: Any, bias: Any, starts: Any = None, h0: Any = None) -> tuple[Any, Any]:
    h, m = _like_states(pre), _like_states(pre)
    _launch(lib, "gru_forward", u, starts, 1, (bias,), h0, pre, h, m)
    return h, m


@KERNELS.kernel(
    "gru.backward",
    lambda dy, gates, h, m, u, starts=None, shares=1: (
        _fit(gates, u, starts, (dy, h, m), (), 3) or halved(gates.shape[3], shares)
    ),
)
def _gru_backward(lib: Any, dy: Any, gates: Any, h: Any, m: Any, u: Any, starts: Any = None, shares: int = 1) -> None:
    _launch(lib, "gru_backward", u, starts, shares, (), dy, gates, h, m)


@KERNELS.kernel(
    "gru.step",
    lambda pre, products, bias, h0: _fit_step(pre, 3, (products,), h0) or dense(bias) or shaped(h0.shape[1:], bias),
)
def _gru_step(lib: Any, pre: Any, products: Any, bias: Any, h0: Any) -> tuple[Any, Any]:
    h, m = np.empty_like(h0), np.empty_like(h0)
    lib.gru_step(*h0.shape, *map(at, (pre, products, bias, h0, m, h)))
    return h, m


@KERNELS.kernel(
    "gru.step_backward",
    lambda dy, before, gates, m, carry: _fit_step(gates, 3, (), dy, before, m, carry),
)
def _gru_step_backward(lib: Any, dy: Any, before: Any, gates: Any, m: Any, carry: Any) -> Any:
    row = np.empty_like(gates)
    lib.gru_step_backward(*carry.shape, *map(at, (dy, before, gates, m, row, carry)))
    return row
