"""Whether a kernel agrees with the float64 reference."""

from contextlib import contextmanager
from unittest import mock

import cupy
import numpy as np

from mlm_mpi.backend import registry

TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3}  # of the norm; half an ulp of bfloat16 is 2^-9 = 2e-3


def device(array):
    """A copy in device memory."""
    return cupy.asarray(np.ascontiguousarray(array))


@contextmanager
def poisoned():
    """Every array that `cupy.empty` makes is full of NaN, so that an element nobody wrote is seen."""
    plain, plain_like = cupy.empty, cupy.empty_like

    def fill(array):
        if array.dtype.kind not in "iu":
            array.fill(float("nan"))
        return array

    with (
        mock.patch.object(cupy, "empty", lambda *a, **k: fill(plain(*a, **k))),
        mock.patch.object(cupy, "empty_like", lambda *a, **k: fill(plain_like(*a, **k))),
    ):
        yield


def assert_close(found, wanted, dtype, factor=1.0):
    """||found − wanted|| ≤ tolerance · ||wanted||, shape and finiteness included."""
    host = cupy.asnumpy(found).astype("f8")
    assert host.shape == wanted.shape
    error = np.linalg.norm(host - wanted) / max(np.linalg.norm(wanted), 1e-30)
    assert error <= factor * TOLERANCE[np.dtype(dtype).name], f"relative error {error:.2e}"


def run(function, *arguments, **named):
    """The result of a kernel, the reference not asked, written to arrays that were full of NaN."""
    with poisoned():
        result = function(*arguments, **named)
    assert not registry.fallbacks()
    return result


def same_bits(a, b):
    """Whether two device arrays hold the same bytes."""
    return cupy.asnumpy(a).tobytes() == cupy.asnumpy(b).tobytes()


def tree(terms):
    """Their sum in the order of mlm_mpi/order.py: split at the largest power of two below their number."""
    if len(terms) == 1:
        return terms[0]
    middle = 1 << (len(terms) - 1).bit_length() - 1
    return tree(terms[:middle]) + tree(terms[middle:])


def shifted(array):
    """The array in device memory one element behind an aligned address, so that no 16-byte access is possible."""
    host = np.asarray(array)
    flat = cupy.empty(host.size + 1, host.dtype)[1:]
    flat.set(np.ascontiguousarray(host).reshape(-1))
    return flat.reshape(host.shape)
