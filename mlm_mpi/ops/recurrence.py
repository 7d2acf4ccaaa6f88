"""What goes from one position of a recurrent layer to the next: nothing to the first of a window or a document."""

from typing import Any

from mlm_mpi.backend.arrays import module_of, wide


def carried(x: Any, starts: Any, t: int) -> Any:
    """x (B, C), zero in the rows whose document begins at position t. `starts` (B, T), or None: one document."""
    return x if starts is None else module_of(x).where((starts[:, t] == t)[:, None], 0, x)


def before(x: Any, starts: Any, t: int) -> Any:
    """x (B, T, C) of the position before t, zero before the first one. Shapes: -> (B, C)."""
    return carried(wide(x[:, t - 1]), starts, t) if t else module_of(x).zeros_like(wide(x[:, 0]))


def shifted(x: Any, starts: Any) -> Any:
    """`before` at every position: (B, T, C) -> the same."""
    xp = module_of(x)
    y = xp.empty_like(x)
    y[:, :1], y[:, 1:] = 0, x[:, :-1]
    if starts is not None:
        y[starts == xp.arange(x.shape[1])] = 0
    return y
