"""Every schedule of schedules/, proved in one process: each micro-batch forward, then back, in micro-batch order."""

import pytest

from mlm_mpi.plug import Plugins
from mlm_mpi.schedules import Backward, Forward

PLUGINS = Plugins()
KINDS = PLUGINS.kinds("schedules")
LIVE = {"single": lambda micros: 1, "gpipe": lambda micros: micros}  # micro-batches whose activations are held at most


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micros", range(1, 17))
def test_forwards_and_backwards_come_in_micro_batch_order(kind, micros):
    """Gradients leave in that order, which alone keeps the sum the same under any schedule."""
    order = list(PLUGINS.find("schedules", kind, "train.schedule").instructions(0, 1, micros))
    assert [what.micro for what in order if isinstance(what, Forward)] == list(range(micros))
    assert [what.micro for what in order if isinstance(what, Backward)] == list(range(micros))
    live = most = 0
    for what in order:
        live += 1 if isinstance(what, Forward) else -1
        most = max(most, live)
        assert live >= 0, "a backward before its forward"
    assert live == 0 and most == LIVE[kind](micros)
