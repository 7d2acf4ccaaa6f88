"""One minus a root, which falls fast at first: for the last part of a run (`optim.decay_fraction`).

Source: Hägele et al., arXiv:2405.18392.
"""

import math


def rate(progress: float) -> float:
    """Falls from 1 to 0."""
    return 1.0 - math.sqrt(progress)
