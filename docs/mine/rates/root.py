"""A learning rate that falls like a square root. A schedule of it is one file."""


def rate(progress):
    return (1.0 - progress) ** 0.5
