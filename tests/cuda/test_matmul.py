"""Matrix products: every kernel by itself, in every layout and with every epilogue."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from agreement import assert_close, device, poisoned

from mlm_mpi.backend import kernels
from mlm_mpi.ops import matmul

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)


def run(gpu, variant, name, *arguments, **named):
    """A function by one of its kernels, whose contract must hold."""
    entry = kernels.entries(device="cuda")[f"{name}/{variant}"]
    assert entry.contract(*arguments, **named) == ""
    with poisoned():
        return entry.launch(gpu, *arguments, **named)


def matrix(rng, rows, columns, dtype, by_rows=True, pad=0):
    """(host, device): in device memory contiguous by rows or by columns, `pad` elements between two of them."""
    host = rng.normal(size=(rows, columns)).astype(dtype)
    stored = host if by_rows else host.T
    room = np.full((stored.shape[0], stored.shape[1] + pad), np.nan, dtype)
    room[:, : stored.shape[1]] = stored
    view = device(room)[:, : stored.shape[1]]
    return host.astype("f8"), view if by_rows else view.T


# (M, N, K), pad: ragged and whole tiles, several steps of k; sizes that the kernel's contract allows
SHAPES = {
    "plain": [((1, 1, 1), 0), ((67, 41, 19), 3), ((64, 64, 24), 0)],
    "mma": [((8, 8, 8), 0), ((72, 136, 104), 8), ((64, 64, 224), 0)],
}
LAYOUTS = list(itertools.product((True, False), repeat=2))
in_every_layout = pytest.mark.parametrize("by_rows", LAYOUTS, ids=lambda two: "".join("nt"[not one] for one in two))


def add_agrees(gpu, variant, by_rows, dtype, rng):
    for (m, n, k), pad in SHAPES[variant]:
        (a, on_a), (b, on_b) = matrix(rng, m, k, dtype, by_rows[0], pad), matrix(rng, k, n, dtype, by_rows[1], pad)
        out, on_out = matrix(rng, m, n, F32, pad=pad)
        run(gpu, variant, "matmul.add", on_a, on_b, on_out, True)
        matmul.add.__wrapped__(a, b, out, True)
        assert_close(on_out, out, F32, factor=2)
        run(gpu, variant, "matmul.add", on_a, on_b, on_out, False)
        assert_close(on_out, a @ b, F32, factor=2)


@in_every_layout
def test_plain_add(gpu, by_rows, dtype, rng):
    add_agrees(gpu, "plain", by_rows, dtype, rng)


@in_every_layout
def test_tensor_core_add(gpu, by_rows, rng):
    add_agrees(gpu, "mma", by_rows, BF16, rng)
