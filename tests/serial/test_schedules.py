"""Every schedule of schedules/, proved in one process: each micro-batch forward, then back, in micro-batch order."""

import pytest

from mlm_mpi.errors import ConfigError
from mlm_mpi.plug import Plugins
from mlm_mpi.schedules import Backward, Forward, check

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


F, B = Forward, Backward


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ([F(0), B(0), F(1)], "runs 2 forwards and 1 backwards of 2 micro-batches"),
        ([F(0), F(1), B(1), B(0)], "Backward(micro=1) comes out of turn"),
        ([B(0), F(0), F(1), B(1)], "Backward(micro=0) comes out of turn"),
        ([F(0), B(0), F(1), B(1), F(2)], "Forward(micro=2) comes out of turn"),
        ([F(0), B(0), B(0), F(1), B(1)], "Backward(micro=0) comes out of turn"),
        ([], "runs 0 forwards"),
    ],
)
def test_a_schedule_that_forgets_is_refused_before_the_first_step(order, said):
    with pytest.raises(ConfigError) as refused:
        check(order, 2, "mine")
    assert said in str(refused.value) and refused.value.agreed
    check([F(0), F(1), B(0), B(1)], 2, "mine")
