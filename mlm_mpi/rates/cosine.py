"""Half a cosine. Source: Loshchilov, Hutter, arXiv:1608.03983."""

import math


def rate(progress: float) -> float:
    """Falls from 1 to 0, flat at both ends."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))
