"""The order of additions: which sums of a step are formed in shares, and how the shares are joined.

A mesh may cut a sum over heads, features, the vocabulary or positions. So that no mesh decides bits, such a sum always
consists of the same shares, whoever holds them: each is summed by itself, from zero, and they are joined by one binary
tree, as lanes are (`comm/tree.py`). What is added to the sum (bias, residual, a lane) is added to the whole of it.
"""

from collections.abc import Sequence
from typing import Any

MOST = 8  # shares of a sum, unless numerics.shares allows fewer: as many ranks may hold parts of it
_POSITIONS = 512  # at least in a share of attention: in shares of 256 its backward takes 1.02 to 1.04 times as long


def shares(extent: int, most: int = MOST) -> int:
    """The largest power of two, at most `most`, that divides an extent: heads, features, the vocabulary, positions."""
    count = 1
    while 2 * count <= most and extent % (2 * count) == 0:
        count *= 2
    return count


def pieces(batch: int, length: int, most: int = MOST) -> int:
    """Sums over the rows of an activation (B, T, C): a piece is a share of the positions of one row of the batch."""
    return batch * shares(length, most)


def share_length(length: int, most: int = MOST) -> int:
    """Positions of a share of attention's keys and queries; 0: there is one share."""
    count = shares(length, min(most, max(1, length // _POSITIONS)))
    return length // count if count > 1 else 0


def middle(first: int, stop: int) -> int:
    """Where the tree splits [first, stop): at the largest power of two below their number."""
    return first + (1 << ((stop - first - 1).bit_length() - 1))


def joined(sums: Sequence[Any]) -> Any:
    """The tree over one sum or more, numbers or arrays: ((s0 + s1) + (s2 + s3)) + s4."""
    if len(sums) == 1:
        return sums[0]
    centre = middle(0, len(sums))
    return joined(sums[:centre]) + joined(sums[centre:])
