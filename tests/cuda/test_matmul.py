"""Matrix products: every kernel by itself, in every layout and with every epilogue."""

import itertools

import cupy
import ml_dtypes
import numpy as np
import pytest
from agreement import assert_close, device, poisoned

from mlm_mpi.backend import kernels
from mlm_mpi.backend.cuda import matmul as launches
from mlm_mpi.ops import linear, matmul

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)


def run(gpu, variant, name, *arguments, **named):
    """A function by one of its kernels, whose contract must hold."""
    entry = kernels.entries(device="cuda")[f"{name}/{variant}"]
    assert entry.contract(*arguments, **named) == ""
    with poisoned():
        return entry.launch(gpu, *arguments, **named)


def matrix(rng, rows, columns, dtype, by_rows=True, align=1):
    """(host, device): in device memory contiguous by rows or by columns, NaN between two, starts `align` elements apart."""
    host = rng.normal(size=(rows, columns)).astype(dtype)
    stored = host if by_rows else host.T
    room = np.full((stored.shape[0], (stored.shape[1] // align + 1) * align), np.nan, dtype)
    room[:, : stored.shape[1]] = stored
    view = device(room)[:, : stored.shape[1]]
    return host.astype("f8"), view if by_rows else view.T


# (M, N, K), align: ragged and whole tiles, several steps of k; sizes that the kernel's contract allows
SHAPES = {
    "plain": [((1, 1, 1), 1), ((67, 41, 19), 1), ((70, 68, 22), 4)],
    "mma": [((8, 8, 8), 8), ((72, 136, 104), 8), ((64, 64, 224), 8)],
    "hopper": [((1, 1, 1), 8), ((201, 133, 75), 8), ((72, 56, 328), 8)],
}
LAYOUTS = list(itertools.product((True, False), repeat=2))
in_every_layout = pytest.mark.parametrize("by_rows", LAYOUTS, ids=lambda two: "".join("nt"[not one] for one in two))


def add_agrees(gpu, variant, by_rows, dtype, rng):
    for (m, n, k), align in SHAPES[variant]:
        a, on_a = matrix(rng, m, k, dtype, by_rows[0], align)
        b, on_b = matrix(rng, k, n, dtype, by_rows[1], align)
        out, on_out = matrix(rng, m, n, F32, align=align)
        run(gpu, variant, "matmul.add", on_a, on_b, on_out, True)
        matmul.add.__wrapped__(a, b, out, True)
        assert_close(on_out, out, F32, factor=2)
        run(gpu, variant, "matmul.add", on_a, on_b, on_out, False)
        assert_close(on_out, a @ b, F32, factor=2)


@in_every_layout
def test_plain_add(gpu, by_rows, dtype, rng):
    add_agrees(gpu, "plain", by_rows, dtype, rng)


@pytest.mark.parametrize("variant", ["mma", "hopper"])
@in_every_layout
def test_tensor_core_add(gpu, variant, by_rows, rng):
    add_agrees(gpu, variant, by_rows, BF16, rng)


@pytest.mark.parametrize("variant", ["plain", "mma", "hopper"])
def test_add_into_bfloat16(gpu, variant, rng):
    m, n, k = 40, 72, 80
    (a, on_a), (b, on_b) = matrix(rng, m, k, BF16, align=8), matrix(rng, k, n, BF16, align=8)
    out, on_out = matrix(rng, m, n, BF16, align=8)
    run(gpu, variant, "matmul.add", on_a, on_b, on_out, False)
    assert_close(on_out, a @ b, BF16)
    if variant != "hopper":
        run(gpu, variant, "matmul.add", on_a, on_b, on_out, True)
        assert_close(on_out, 2 * a @ b, BF16, factor=2)


def layer(rng, n, k, f, dtype):
    """x (n, k), w (k, f), b (f,), residual (n, f), dy (n, f), pre (n, k)."""
    shapes = ((n, k), (k, f), (f,), (n, f), (n, f), (n, k))
    return [(rng.normal(size=shape) / (k**0.5 if shape == (k, f) else 1)).astype(dtype) for shape in shapes]


def linear_agrees(gpu, variant, sizes, dtype, rng):
    arrays = layer(rng, *sizes, dtype)
    x, w, b, residual, dy, pre = (array.astype("f8") for array in arrays)
    on_x, on_w, on_b, on_residual, on_dy, on_pre = map(device, arrays)
    y = linear.forward.__wrapped__(x, w, b)
    assert_close(run(gpu, variant, "linear.forward", on_x, on_w, on_b), y, dtype)
    assert_close(run(gpu, variant, "linear.forward", on_x, on_w, on_b, on_residual), y + residual, dtype)
    found, found_pre = run(gpu, variant, "linear.forward_gelu", on_x, on_w, on_b)
    wanted, wanted_pre = linear.forward_gelu.__wrapped__(x, w, b)
    assert_close(found_pre, wanted_pre, dtype)
    assert_close(found, wanted, dtype, factor=2)
    dx = run(gpu, variant, "linear.backward_input", on_dy, on_w)
    assert_close(dx, linear.backward_input.__wrapped__(dy, w), dtype)
    dx = run(gpu, variant, "linear.backward_input", on_dy, on_w, pre=on_pre)
    assert_close(dx, linear.backward_input.__wrapped__(dy, w, pre), dtype)


def test_plain_linear(gpu, dtype, rng):
    linear_agrees(gpu, "plain", (37, 20, 67), dtype, rng)
    if dtype == F32:
        linear_agrees(gpu, "plain", (37, 20, 68), dtype, rng)


@pytest.mark.parametrize("variant", ["mma", "hopper"])
def test_tensor_core_linear(gpu, variant, rng):
    linear_agrees(gpu, variant, (75, 104, 136), BF16, rng)


@pytest.mark.parametrize("sizes", [(130, 72, 264), (130, 264, 72)], ids=str)
@pytest.mark.parametrize("variant", ["plain", "mma", "hopper"])
def test_widest_tiles(gpu, variant, sizes, rng, monkeypatch):
    """The tiles that `plan` takes for large shapes, several to a block where blocks stay."""
    kernel = variant.upper()
    monkeypatch.setattr(launches, f"{kernel}_TILES", getattr(launches, f"{kernel}_TILES")[:1])
    linear_agrees(gpu, variant, sizes, F32 if variant == "plain" else BF16, rng)


@pytest.mark.parametrize("variant", ["plain", "mma", "hopper"])
def test_pieces(gpu, variant, rng, monkeypatch):
    """Tiles that several blocks sum: the same bits each time, every epilogue, added to what is there."""
    monkeypatch.setattr(launches, "PIECES_COST", -(1 << 20))
    dtype = F32 if variant == "plain" else BF16
    linear_agrees(gpu, variant, (75, 200, 136), dtype, rng)
    (a, on_a), (b, on_b) = matrix(rng, 40, 330, dtype, False, 8), matrix(rng, 330, 24, dtype, True, 8)
    out, on_out = matrix(rng, 40, 24, F32, align=4)
    run(gpu, variant, "matmul.add", on_a, on_b, on_out, True)
    assert_close(on_out, out + a @ b, F32, factor=4)
    again = [device(np.zeros((40, 24), "f4")) for _ in range(2)]
    for one in again:
        run(gpu, variant, "matmul.add", on_a, on_b, one, False)
    assert cupy.asnumpy(again[0]).tobytes() == cupy.asnumpy(again[1]).tobytes()
