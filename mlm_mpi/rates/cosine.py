"""Half a cosine. Source: Loshchilov, Hutter, arXiv:1608.03983."""

from mlm_mpi.exact import cos_of_half_turns


def rate(progress: float) -> float:
    """Falls from 1 to 0, flat at both ends."""
    return 0.5 * (1.0 + cos_of_half_turns(progress))
