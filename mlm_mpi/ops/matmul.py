"""The matrix product deposited where it belongs: out = a b, or out += a b.

The contraction is a sum of *shares*, a power of two of them, each summed by itself and then joined by one binary tree:
((s0 + s1) + (s2 + s3)) + ...; who holds the operands of some of them has their sums to the last bit. The contracted
index may be of several equal *segments*, such as queries, keys and values: share g is the g-th part of each of them.
"""

from collections.abc import Iterator
from typing import Any

from mlm_mpi.backend.arrays import module_of, wide
from mlm_mpi.backend.registry import served
from mlm_mpi.order import joined


def _shares(a: Any, b: Any, shares: int, segments: int) -> Iterator[tuple[Any, Any]]:
    """The operands of each share. ValueError where K has no such shares."""
    parts_a = a.reshape(a.shape[0], segments, shares, -1)
    parts_b = b.reshape(segments, shares, -1, b.shape[1])
    for share in range(shares):
        yield parts_a[:, :, share].reshape(a.shape[0], -1), parts_b[:, share].reshape(-1, b.shape[1])


def summed(a: Any, b: Any, shares: int = 1, segments: int = 1) -> Any:
    """The reference of a b, at least float32: sums of shares, joined. Shapes: as `add`."""
    a, b = wide(a), wide(b)
    return a @ b if shares == 1 else joined([x @ y for x, y in _shares(a, b, shares, segments)])


@served
def add(a: Any, b: Any, out: Any, accumulate: bool, shares: int = 1, segments: int = 1) -> None:
    """out = a b, or out = out + (the whole of a b). Shapes: a (M, K), b (K, N), out (M, N). Cost: 2·M·N·K flops.

    ValueError where `segments` times `shares` does not divide K.
    """
    if accumulate:
        out += summed(a, b, shares, segments)
    elif shares == 1 and out.dtype == a.dtype == wide(a).dtype:
        module_of(out).matmul(a, b, out=out)
    else:
        out[...] = summed(a, b, shares, segments)


def product(a: Any, b: Any, shares: int = 1, segments: int = 1) -> Any:
    """a b. Shapes: (M, K), (K, N) -> (M, N)."""
    out = module_of(a).empty((a.shape[0], b.shape[1]), a.dtype)
    add(a, b, out, False, shares, segments)
    return out
