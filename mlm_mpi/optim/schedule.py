"""Learning rate as a pure function of the step."""

import math

from mlm_mpi.optim import Common


def learning_rate(optim: Common, steps: int, step: int) -> float:
    """Linear warm-up over `warmup_steps`, then cosine, linear or constant to `final_fraction` at the end.

    Source: Loshchilov, Hutter, arXiv:1608.03983 (cosine).
    """
    peak, final = optim.learning_rate, optim.final_fraction
    if step < optim.warmup_steps:
        return peak * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return peak
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    remaining = 1.0 - progress if optim.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (final + (1.0 - final) * remaining)
