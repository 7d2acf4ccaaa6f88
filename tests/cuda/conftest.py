"""CUDA kernels: on a GPU where CuPy finds one, else on the CPU's emulator behind the stand-in for CuPy."""

import os
import shutil
import sys
import zlib
from pathlib import Path

import pytest
from sanitizers import findings


def _real_gpu() -> bool:
    if os.environ.get("MLM_MPI_TEST_GPU") != "1":
        return False
    import cupy

    return cupy.cuda.runtime.getDeviceCount() > 0


ON_GPU = _real_gpu()
if not ON_GPU and not shutil.which("g++"):
    raise pytest.UsageError("tests/cuda need a GPU (MLM_MPI_TEST_GPU=1) or g++, which runs the kernels on the CPU")
if not ON_GPU:
    sys.path.insert(0, str(Path(__file__).parent / "standin"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))

sys.path.insert(0, str(Path(__file__).parents[1] / "programs"))

import cupy  # noqa: E402  the real one or the stand-in

from mlm_mpi.backend import choice  # noqa: E402
from mlm_mpi.backend.cuda import nvrtc  # noqa: E402

BUILDS = set(nvrtc.builds())  # those that test_nvrtc.py compiles


def assert_recorded(builds):
    """That `kernels/cuda/builds.txt` has them."""
    asked = {(stem, tuple((key, str(value)) for key, value in defines)) for stem, defines in builds}
    if os.environ.get("MLM_MPI_TEST_BUILDS") == "record":
        nvrtc.record(asked)
    else:
        missing = sorted(asked - BUILDS)
        assert not missing, f"kernels/cuda/builds.txt lacks these (MLM_MPI_TEST_BUILDS=record adds them): {missing}"


# orders in which the emulator runs threads, each with the multiprocessors of another GPU: few, an A100's, an H100's,
# a B200's; MLM_MPI_STANDIN_PROCESSORS gives all of them its own
PROCESSORS = [4, 108, 132, 148]
if fixed := os.environ.get("MLM_MPI_STANDIN_PROCESSORS"):
    PROCESSORS = [int(fixed)] * len(PROCESSORS)
ORDERS = range(1 if ON_GPU else len(PROCESSORS))


@pytest.fixture(params=ORDERS, ids=lambda order: f"order{order}")
def gpu(request, monkeypatch):
    """The device, chosen for every op of the test; on the emulator, with threads in four orders."""
    if not ON_GPU:
        cupy.seed(request.param)
        monkeypatch.setattr(cupy.cuda.Device, "multiprocessors", PROCESSORS[request.param])
    device = choice.select(device="cuda").first.library
    yield device
    choice.select()
    assert_recorded(device.builds)


@pytest.fixture
def four_processors(gpu, monkeypatch):
    """The device as launches see it, so that a small matrix has more tiles than it has blocks, whatever GPU it is."""
    monkeypatch.setattr(gpu, "processors", 4)


@pytest.fixture(autouse=True)
def sanitizer():
    """Under `sanitizers.py`: what it found in a test is the test's failure."""
    logs = os.environ.get("MLM_MPI_SANITIZER_LOGS")
    before = len(findings(logs)) if logs else 0
    yield
    if logs and (found := findings(logs)[before:]):
        pytest.fail(found[:4000], pytrace=False)


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    """The element types kernels are compiled for."""
    import ml_dtypes
    import numpy as np

    return np.dtype(np.float32 if request.param == "float32" else ml_dtypes.bfloat16)


@pytest.fixture
def rng(request):
    """Inputs of this test: fixed, or fresh with MLM_MPI_TEST_SEED=fresh."""
    import numpy as np

    fresh = os.environ.get("MLM_MPI_TEST_SEED") == "fresh"
    return np.random.default_rng(None if fresh else zlib.crc32(request.node.nodeid.split("[")[0].encode()))
