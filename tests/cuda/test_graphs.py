import cupy
import numpy as np
import pytest

from mlm_mpi.backend.cuda.graphs import Graphs
from mlm_mpi.ops import gelu


def test_replays_compute_with_what_the_arrays_hold_now(gpu):
    graphs, calls = Graphs(cupy), []
    x, total = cupy.asarray(np.ones((3, 7), np.float32)), cupy.zeros((3, 7), np.float32)

    def work():
        nonlocal total
        calls.append(1)
        y = gelu.forward(x * 2.0)
        total += y
        return y

    for number in range(5):
        x.set(np.full((3, 7), number, np.float32))
        y = graphs.run("key", work).copy()
        assert np.allclose(y.get(), gelu.forward.__wrapped__(np.full((3, 7), 2.0 * number)), rtol=1e-5)
    assert len(calls) == 2, "once to warm up, once to be captured"
    wanted = sum(gelu.forward.__wrapped__(np.full((3, 7), 2.0 * number)) for number in range(5))
    assert np.allclose(total.get(), wanted, rtol=1e-5)


def test_work_that_waits_cannot_be_captured(gpu):
    graphs, x = Graphs(cupy), cupy.zeros(3, np.float32)
    graphs.run("key", lambda: float(x[0]))
    with pytest.raises(Exception, match="cudaErrorStreamCapture|stream is capturing"):
        graphs.run("key", lambda: float(x[0]))
