"""The binary tree that joins sums of shares and pieces, whoever has formed them."""

from collections.abc import Sequence
from typing import Any


def joined(sums: Sequence[Any]) -> Any:
    """The sum of sums, split at the largest power of two below their number: ((s0 + s1) + (s2 + s3)) + s4."""
    if len(sums) == 1:
        return sums[0]
    middle = 1 << (len(sums) - 1).bit_length() - 1
    return joined(sums[:middle]) + joined(sums[middle:])
