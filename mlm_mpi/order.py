"""The order of additions: which sums of a step are formed in shares, and how the shares are joined.

A mesh may cut a sum over heads, features, the vocabulary or positions. So that no mesh decides bits, such a sum always
consists of the same shares, whoever holds them: each is summed by itself, from zero, and they are joined by one binary
tree, as lanes are (`comm/tree.py`). What is added to the sum (bias, residual, a lane) is added to the whole of it.
"""

MOST = 8  # shares of a sum, unless numerics.shares allows fewer: as many ranks may hold parts of it
_POSITIONS = 256  # at least in a share of attention's keys: shorter ones cost more merging than a mesh gains


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
    """Positions of a share of attention's keys and queries."""
    return length // shares(length, min(most, max(1, length // _POSITIONS)))
