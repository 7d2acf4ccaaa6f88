"""What is left of the learning rate after warm-up: `optim.schedule` names the file.

A file has `rate(progress) -> float`: 1 at progress 0, as a rule 0 at progress 1, whatever it wants in between.
"""

from collections.abc import Callable

Rate = Callable[[float], float]


def learning_rate(peak: float, warmup_steps: int, final_fraction: float, rate: Rate, steps: int, step: int) -> float:
    """A pure function of the step: linear warm-up over `warmup_steps`, then `rate` to `final_fraction` at the end."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (final_fraction + (1.0 - final_fraction) * rate(progress))
