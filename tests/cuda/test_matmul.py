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


def products(variant):
    """(M, N, K), pad: whole tiles and ragged ones, several steps of k; what the contract of the kernel asks for."""
    return {
        "plain": [((1, 1, 1), 0), ((67, 41, 19), 3), ((64, 64, 24), 0)],
    }[variant]


LAYOUTS = list(itertools.product((True, False), repeat=2))


@pytest.mark.parametrize("variant", ["plain"])
@pytest.mark.parametrize("by_rows", LAYOUTS, ids=lambda two: "".join("nt"[not one] for one in two))
def test_add_in_every_layout(gpu, variant, by_rows, dtype, rng):
    for (m, n, k), pad in products(variant):
        (a, on_a), (b, on_b) = matrix(rng, m, k, dtype, by_rows[0], pad), matrix(rng, k, n, dtype, by_rows[1], pad)
        out, on_out = matrix(rng, m, n, F32, pad=pad)
        run(gpu, variant, "matmul.add", on_a, on_b, on_out, True)
        matmul.add.__wrapped__(a, b, out, True)
        assert_close(on_out, out, F32, factor=2)
        run(gpu, variant, "matmul.add", on_a, on_b, on_out, False)
        assert_close(on_out, a @ b, F32, factor=2)
