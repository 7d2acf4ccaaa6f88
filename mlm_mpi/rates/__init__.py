"""What is left of the learning rate after warm-up: `optim.schedule` names the file.

A file has `rate(progress) -> float`: 1 at progress 0, as a rule 0 at progress 1, whatever it wants in between.
"""

from collections.abc import Callable

Rate = Callable[[float], float]


def learning_rate(
    peak: float,
    warmup_steps: int,
    final_fraction: float,
    rate: Rate,
    steps: int,
    step: int,
    decay_fraction: float = 1.0,
) -> float:
    """A pure function of the step: linear warm-up over `warmup_steps`, then `rate` to `final_fraction` at the end.

    Of the steps after the warm-up the last `decay_fraction` is what `rate` makes its progress in; before them the rate
    stays at its peak: warm-up, stable, decay (Hu et al., arXiv:2404.06395; Hägele et al., arXiv:2405.18392).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    stable = 1.0 - decay_fraction
    if progress <= stable:
        return peak * (final_fraction + (1.0 - final_fraction) * rate(0.0))
    return peak * (final_fraction + (1.0 - final_fraction) * rate((progress - stable) / decay_fraction))
