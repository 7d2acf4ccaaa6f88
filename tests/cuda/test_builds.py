"""`kernels/cuda/builds.txt` has what whole models ask for on real GPUs, where `plan` takes other tiles than in small
tests: what is not there is neither searched for spilled registers nor compiled by `make kernels`.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import assert_recorded

from mlm_mpi.backend.arrays import BFLOAT16
from mlm_mpi.backend.cuda.device import Device
from mlm_mpi.backend.cuda.provider import KERNELS

GPUS = {"A100": ((8, 0), 108), "H100 PCIe": ((9, 0), 114), "H100": ((9, 0), 132), "B200": ((10, 0), 148)}
ROWS = (1, 512, 1024, 8192, 32768)
WIDTHS = (256, 384, 768, 1024, 1600)
VOCABULARIES = (2048, 50257)


class Matrix:
    """The shape of a device array, without its memory."""

    __module__ = "cupy"  # by which contracts know device arrays
    data = SimpleNamespace(ptr=1 << 20)

    def __init__(self, shape, dtype, strides=None):
        self.shape, self.dtype, self.ndim, self.size = shape, np.dtype(dtype), len(shape), int(np.prod(shape))
        self.itemsize = self.dtype.itemsize
        natural = (*(shape[1] * self.itemsize for _ in shape[1:]), self.itemsize)
        self.strides = strides or natural
        self.flags = SimpleNamespace(c_contiguous=self.strides == natural)

    def __getitem__(self, row):
        return Matrix(self.shape[1:], self.dtype)

    @property
    def T(self):
        return Matrix(self.shape[::-1], self.dtype, self.strides[::-1])


class OnPaper(Device):
    """A GPU that only notes which builds it is asked for."""

    cupy = SimpleNamespace(empty=Matrix)

    def __init__(self, capability, processors):
        self.capability, self.processors, self.builds = capability, processors, set()

    def _module(self, stem, defines):
        self.builds.add((stem, defines))
        return SimpleNamespace(get_function=lambda name: lambda *arguments, **named: None)

    def tensor_map(self, *arguments):
        return None


def calls(rows, width, vocabulary, dtype):
    """(function, arguments) of what is compiled for its shapes in a step: norms, linear layers, heads of 64,
    classifier, head."""

    def new(*shape, dtype=dtype):
        return Matrix(shape, dtype)

    yield "layernorm.forward", (new(rows, width), new(width), new(width), 1e-5)
    yield "rmsnorm.forward", (new(rows, width), new(width), 1e-5)
    sizes = {"qkv": (width, 3 * width), "project": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    for name, (k, n) in sizes.items():
        x, w, b, dy = new(rows, k), new(k, n), new(n), new(rows, n)
        yield ("linear.forward_gelu", (x, w, b)) if name == "up" else ("linear.forward", (x, w, b))
        if name == "up":
            yield "linear.forward_relu2", (x, w)
        yield "linear.forward", (x, w)
        if name in ("project", "down"):
            yield "linear.forward", (x, w, b, dy)
        yield "linear.backward_input", (dy, w, x) if name == "down" else (dy, w)
        yield "matmul.add", (x.T, dy, new(k, n, dtype=np.float32), True)
    for labels in (2, 3, 16, 100):  # of a classifier, behind an affine map of its own
        x, dy = new(rows, width), new(rows, labels)
        yield "linear.forward_gelu", (x, new(width, width), new(width))
        yield "linear.forward", (x, new(width, labels), new(labels))
        yield "linear.backward_input", (dy, new(width, labels))
        yield "matmul.add", (x.T, dy, new(width, labels, dtype=np.float32), True)
    x, w, pitch = new(rows, width), new(vocabulary, width), -(-vocabulary // 8) * 8 * np.dtype(dtype).itemsize
    logits = Matrix((rows, vocabulary), dtype, (pitch, np.dtype(dtype).itemsize))
    yield "matmul.add", (x, w.T, logits, False)
    yield "matmul.add", (logits, w, x, False)
    yield "matmul.add", (logits.T, x, new(vocabulary, width, dtype=np.float32), True)


def launch(gpu, name, arguments):
    """By the first kernel that takes it, as in `registry.served`."""
    known = [kernel for kernel in KERNELS[name] if not kernel.lacks(gpu)]
    next(kernel for kernel in known if not kernel.contract(*arguments)).launch(gpu, *arguments)


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
def test_whole_models(name, dtype):
    gpu = OnPaper(*GPUS[name])
    for sizes in itertools.product(ROWS, WIDTHS, VOCABULARIES):
        for call in calls(*sizes, dtype):
            launch(gpu, *call)
    assert len(gpu.builds) > 10
    assert_recorded(gpu.builds)
