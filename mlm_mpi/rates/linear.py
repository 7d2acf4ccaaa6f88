"""A straight line."""


def rate(progress: float) -> float:
    """Falls from 1 to 0."""
    return 1.0 - progress
