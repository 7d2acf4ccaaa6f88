"""A learning rate that falls like a square root. A curve is one file."""


def rate(progress: float) -> float:
    """Falls from 1 at progress 0, after the warm-up, to 0 at progress 1, ever faster."""
    return (1.0 - progress) ** 0.5
