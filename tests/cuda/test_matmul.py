"""Matrix products: every kernel by itself, in every layout and with every epilogue."""

import itertools
import json
from dataclasses import replace
from unittest import mock

import cupy
import ml_dtypes
import numpy as np
import pytest
from agreement import assert_close, device, poisoned, tree

from mlm_mpi.backend import choice, registry
from mlm_mpi.backend.cuda import matmul as launches
from mlm_mpi.backend.cuda.provider import KERNELS
from mlm_mpi.ops import linear, matmul

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)


def run(gpu, variant, name, *arguments, **named):
    """A function by one of its kernels, whose contract must hold."""
    entry = KERNELS.entries()[f"{name}/{variant}"]
    assert entry.contract(*arguments, **named) == ""
    with poisoned():
        return entry.launch(gpu, *arguments, **named)


def matrix(rng, rows, columns, dtype, by_rows=True, align=1):
    """(host, device): in device memory contiguous by rows or columns, each at a multiple of `align`, NaN in between."""
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
    _, on_out = matrix(rng, m, n, BF16, align=8)
    run(gpu, variant, "matmul.add", on_a, on_b, on_out, False)
    assert_close(on_out, a @ b, BF16)
    if variant != "hopper":
        run(gpu, variant, "matmul.add", on_a, on_b, on_out, True)
        assert_close(on_out, 2 * a @ b, BF16, factor=2)


def layer(rng, n, k, f, dtype):
    """x (n, k), w (k, f), b (f,), residual (n, f), dy (n, f), pre (n, k)."""
    shapes = ((n, k), (k, f), (f,), (n, f), (n, f), (n, k))
    return [(rng.normal(size=shape) / (k**0.5 if shape == (k, f) else 1)).astype(dtype) for shape in shapes]


def calls(rng, sizes, dtype):
    """function -> (arguments, float64 arguments), by a name for each of its epilogues."""
    arrays = layer(rng, *sizes, dtype)
    x, w, b, residual, dy, pre = zip(map(device, arrays), (array.astype("f8") for array in arrays), strict=True)
    known = {
        "bias": (linear.forward, (x, w, b)), "residual": (linear.forward, (x, w, b, residual)),
        "residual alone": (linear.forward, (x, w, (None, None), residual)), "relu2": (linear.forward_relu2, (x, w)),
        "gelu": (linear.forward_gelu, (x, w, b)), "store": (linear.backward_input, (dy, w)),
        "slope": (linear.backward_input, (dy, w, pre)),
    }  # fmt: skip
    return {key: (function, *zip(*arguments, strict=True)) for key, (function, arguments) in known.items()}


EPILOGUES = ("bias", "residual", "residual alone", "gelu", "relu2", "store", "slope")


def linear_agrees(gpu, variant, sizes, dtype, rng, epilogues=EPILOGUES):
    """x (N, K), w (K, F): sizes N, K, F."""
    known = calls(rng, sizes, dtype)
    for key in epilogues:
        function, arguments, exact = known[key]
        found = run(gpu, variant, f"linear.{function.__name__}", *arguments)
        wanted = function.__wrapped__(*exact)
        for one, other in zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]:
            assert_close(one, other, dtype, factor=2)


def test_plain_linear(gpu, rng):
    linear_agrees(gpu, "plain", (37, 20, 67), F32, rng)
    linear_agrees(gpu, "plain", (37, 20, 68), F32, rng, ("residual", "gelu", "relu2"))  # in runs of 16 bytes
    linear_agrees(gpu, "plain", (37, 20, 67), BF16, rng, ("residual", "gelu", "relu2"))


def test_mma_linear(gpu, rng):
    linear_agrees(gpu, "mma", (75, 104, 136), BF16, rng)


@pytest.fixture
def widest(monkeypatch):
    """Only the tiles that `plan` takes for large shapes."""
    for name in ("PLAIN_TILES", "MMA_TILES", "HOPPER_TILES"):
        monkeypatch.setattr(launches, name, getattr(launches, name)[:1])


def test_hopper_linear(gpu, widest, four_processors, rng):
    linear_agrees(gpu, "hopper", (130, 72, 264), BF16, rng)  # four tiles
    linear_agrees(gpu, "hopper", (650, 136, 264), BF16, rng, ("gelu", "residual"))  # twelve: three to each block


@pytest.mark.parametrize("variant", ["plain", "mma"])
def test_widest_tiles(gpu, variant, widest, rng):
    linear_agrees(gpu, variant, (130, 72, 136), F32 if variant == "plain" else BF16, rng, ("residual",))


@pytest.fixture
def cut(monkeypatch):
    """The calls that sum tiles in pieces."""
    spy = mock.Mock(side_effect=launches._in_pieces)
    monkeypatch.setattr(launches, "_in_pieces", spy)
    return spy


@pytest.fixture
def always_cut(four_processors, cut, monkeypatch):
    """As `cut`, in pieces wherever that can be, and as few as for four multiprocessors."""
    monkeypatch.setattr(launches, "PROCESSORS", 4)
    monkeypatch.setattr(launches, "PIECES_COST", -(1 << 20))
    return cut


@pytest.mark.parametrize("variant", ["plain", "mma", "hopper"])
def test_pieces(gpu, variant, always_cut, rng):
    """Tiles that several blocks sum: every layout's shares, added to what is there, the same bits each time."""
    dtype = F32 if variant == "plain" else BF16
    (a, on_a), (b, on_b) = matrix(rng, 40, 330, dtype, False, 8), matrix(rng, 330, 24, dtype, True, 8)
    out, on_out = matrix(rng, 40, 24, F32, align=4)
    run(gpu, variant, "matmul.add", on_a, on_b, on_out, True)
    assert_close(on_out, out + a @ b, F32, factor=4)
    again = [device(np.zeros((40, 24), "f4")) for _ in range(2)]
    for one in again:
        run(gpu, variant, "matmul.add", on_a, on_b, one, False)
    assert cupy.asnumpy(again[0]).tobytes() == cupy.asnumpy(again[1]).tobytes()
    assert always_cut.call_count == 3


@pytest.mark.parametrize(
    "variant, epilogues",
    [("plain", ["bias"]), ("mma", ["residual"]), ("hopper", ["gelu", "relu2", "residual", "slope"])],
)
def test_pieces_of_several_tiles(gpu, variant, epilogues, always_cut, rng, monkeypatch):
    """More tiles than blocks: a share begins in one tile, covers others, ends in another; then the epilogues."""
    name = f"{variant.upper()}_TILES"
    narrow = replace(getattr(launches, name)[-1], blocks=1)  # four blocks in all
    monkeypatch.setattr(launches, name, (narrow,))
    dtype = F32 if variant == "plain" else BF16
    linear_agrees(gpu, variant, (3 * narrow.m - 10, 136, 3 * narrow.n - 24), dtype, rng, epilogues)
    assert [call.args[1].shares for call in always_cut.call_args_list] == [4] * len(epilogues)


@pytest.mark.parametrize("variant", ["plain", "mma", "hopper"])
def test_a_long_sum_is_cut_as_for_an_h200(gpu, variant, cut, rng):
    """What `plan` chooses by itself, on any GPU."""
    tiles, dtype = getattr(launches, f"{variant.upper()}_TILES"), F32 if variant == "plain" else BF16
    k = max(tile.k * int(tile.cut) * (64 + tile.blocks * launches.PROCESSORS) for tile in tiles)
    (a, on_a), (b, on_b) = matrix(rng, 9, k, dtype, align=8), matrix(rng, k, 16, dtype, align=8)
    out, on_out = matrix(rng, 9, 16, F32, align=4)
    run(gpu, variant, "matmul.add", on_a, on_b, on_out, True)
    assert_close(on_out, out + a @ b, F32, factor=4)
    cuts = [call.args[1].shares for call in cut.call_args_list]
    assert cuts in [[tile.blocks * launches.PROCESSORS] for tile in tiles]


# ---- shares of k


def of_variant(variant):
    return F32 if variant == "plain" else BF16


def zeros(*shape):
    return device(np.full(shape, np.nan, "f4"))


def cut_of(host, share, shares, segments, axis):
    """What a rank has of an operand whose k is cut."""
    of_segments = np.split(host, segments, axis)
    return np.concatenate([np.split(part, shares, axis)[share] for part in of_segments], axis)


@pytest.mark.parametrize("variant", ["plain", "mma", "hopper"])
@pytest.mark.parametrize(("shares", "segments"), [(2, 1), (8, 1), (4, 3)])
@pytest.mark.parametrize("by_rows", [(True, True), (True, False), (False, True)])
def test_a_share_is_the_product_of_whoever_has_it_alone(gpu, variant, shares, segments, by_rows, rng):
    dtype, (m, n, k) = of_variant(variant), (40, 24, 8 * shares * segments * 2)
    (a, on_a), (b, on_b) = matrix(rng, m, k, dtype, by_rows[0], 8), matrix(rng, k, n, dtype, by_rows[1], 8)
    out = zeros(m, n)
    run(gpu, variant, "matmul.add", on_a, on_b, out, False, shares, segments)
    parts = []
    for share in range(shares):
        own = [cut_of(x, share, shares, segments, axis).astype(dtype) for x, axis in ((a, 1), (b, 0))]
        part = zeros(m, n)
        run(gpu, variant, "matmul.add", *map(device, own), part, False, segments=segments)
        parts.append(cupy.asnumpy(part))
    assert np.array_equal(cupy.asnumpy(out), tree(parts))
    assert_close(out, a @ b, F32, factor=2)
    start = rng.normal(size=(m, n)).astype("f4")
    added = device(start)
    run(gpu, variant, "matmul.add", on_a, on_b, added, True, shares, segments)
    assert np.array_equal(cupy.asnumpy(added), start + tree(parts)), "complete before it joins"


@pytest.mark.parametrize("variant", ["plain", "mma", "hopper"])
def test_what_is_added_to_joins_the_whole_sum(gpu, variant, always_cut, rng):
    """Whole or in pieces: out + (the sum from zero)."""
    dtype = of_variant(variant)
    for k in (16, 330):
        (_, on_a), (_, on_b) = matrix(rng, 40, k, dtype, False, 8), matrix(rng, k, 24, dtype, True, 8)
        whole, start = zeros(40, 24), rng.normal(size=(40, 24)).astype("f4")
        run(gpu, variant, "matmul.add", on_a, on_b, whole, False)
        added = device(start)
        run(gpu, variant, "matmul.add", on_a, on_b, added, True)
        assert np.array_equal(cupy.asnumpy(added), start + cupy.asnumpy(whole))
    assert always_cut.call_count >= 2


@pytest.mark.parametrize("variant", ["plain", "mma", "hopper"])
def test_epilogues_come_after_the_shares(gpu, variant, rng):
    known = calls(rng, (37, 64, 72) if variant == "plain" else (40, 64, 72), of_variant(variant))
    for key, how in (
        ("bias", {"shares": 4}), ("residual", {"shares": 4}),
        ("store", {"shares": 3}), ("slope", {"shares": 3}), ("slope", {"shares": 3, "segments": 3}),
    ):  # fmt: skip
        function, arguments, exact = known[key]
        found = run(gpu, variant, f"linear.{function.__name__}", *arguments, **how)
        assert_close(found, function.__wrapped__(*exact), of_variant(variant), factor=2)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_shares_of_any_size(gpu, dtype, rng):
    known = calls(rng, (37, 63, 41), dtype)
    for key, how in (
        ("bias", {"shares": 7}), ("residual", {"shares": 3}),
        ("store", {"shares": 41}), ("slope", {"shares": 1, "segments": 41}),
    ):  # fmt: skip
        function, arguments, exact = known[key]
        found = run(gpu, "plain", f"linear.{function.__name__}", *arguments, **how)
        assert_close(found, function.__wrapped__(*exact), dtype, factor=2)


def test_shares_that_do_not_fit_are_refused():
    x, w, out = ones(8, 48), ones(48, 24), ones(8, 24, dtype=F32)
    contracts = {name: KERNELS.entries()[f"matmul.add/{name}"].contract for name in ("hopper", "mma", "plain")}
    for contract in contracts.values():
        assert contract(x, w, out, False, shares=2) == ""
        assert "shares" in contract(x, w, out, False, shares=5) and "shares" in contract(x, w, out, False, shares=0)
        assert "shares" in contract(x, w, out, False, shares=2, segments=5)
    narrow = {name: contract(x, w, out, False, shares=4) for name, contract in contracts.items()}
    assert narrow["plain"] == "" and "16 bytes" in narrow["mma"] and "16 bytes" in narrow["hopper"]
    assert "in shares" in launches.prefers_cublas(launches.FUNCTIONS["matmul.add"](x, w, ones(8, 24), False, shares=2))


# ---- who serves, and what is refused


def chosen(function, *arguments):
    """The variant that serves a call."""
    name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
    for _, kernel in registry.in_force().candidates(name):
        if not kernel.contract(*arguments):
            return kernel.variant
    return "reference"


def ones(*shape, dtype=BF16):
    return device(np.ones(shape, dtype))


def test_the_fastest_kernel_that_fits_serves(gpu):
    x, w, out = ones(8, 16), ones(16, 24), ones(8, 24, dtype=F32)
    assert chosen(matmul.add, x, w, out, False) == "hopper"
    assert chosen(matmul.add, x, w, ones(8, 24), True) == "mma"  # adds to bfloat16
    assert chosen(matmul.add, ones(8, 16, dtype=F32), ones(16, 24, dtype=F32), out, False) == "plain"
    assert chosen(linear.forward, x, ones(16, 23), ones(23)) == "plain"  # rows of 46 bytes
    assert chosen(linear.forward, x, w) == chosen(linear.forward_relu2, x, w) == "hopper"
    padded = ones(8, 24)[:, :19]
    assert chosen(matmul.add, x, ones(16, 24)[:, :19], padded, False) == "hopper"  # ragged, but rows begin aligned
    assert chosen(matmul.add, ones(8, 24)[:, 1:17], w, out, False) == "plain"


def test_every_variant_is_reached_through_the_ops(gpu):
    x, w, b = ones(8, 16), ones(16, 24), ones(24)
    y, pre = linear.forward_gelu(x, w, b)
    linear.backward_input(y, w, ones(8, 16))
    linear.backward_weight(y, x, ones(16, 24, dtype=F32), ones(24, dtype=F32), accumulate=True)
    assert not registry.fallbacks()
    assert_close(pre, np.full((8, 24), 17.0), BF16)


@pytest.mark.parametrize(
    "reason, call",
    [
        ("matrices", lambda: (ones(8, 8).get(), ones(8, 8), ones(8, 8), False)),
        ("matrices", lambda: (ones(8), ones(8, 8), ones(8, 8), False)),
        ("float64", lambda: (ones(8, 8, dtype="f8"), ones(8, 8, dtype="f8"), ones(8, 8, dtype="f8"), False)),
        ("float32 and bfloat16", lambda: (ones(8, 8, dtype=F32), ones(8, 8), ones(8, 8, dtype=F32), False)),
        ("result", lambda: (ones(8, 8), ones(8, 8), ones(8, 8, dtype="f8"), False)),
        ("empty", lambda: (ones(8, 0), ones(0, 8), ones(8, 8), False)),
        ("shapes", lambda: (ones(8, 8), ones(9, 8), ones(8, 8), False)),
        ("shapes", lambda: (ones(8, 8), ones(8, 8), ones(8, 9), False)),
        ("contiguous", lambda: (ones(8, 16)[:, ::2], ones(8, 8), ones(8, 8), False)),
        ("contiguous", lambda: (ones(8, 8), ones(8, 8), ones(8, 8).T, False)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_kernel_takes(reason, call):
    for variant in ("plain", "mma", "hopper"):
        assert reason in KERNELS.entries()[f"matmul.add/{variant}"].contract(*call())


def test_a_bias_of_another_shape_or_dtype_is_refused():
    x, w = ones(8, 16), ones(16, 24)
    contract = KERNELS.entries()["linear.forward/hopper"].contract
    assert contract(x, w, ones(24)) == ""
    assert contract(x, w, ones(16)) and contract(x, w, ones(24, dtype=F32)) and contract(x, w, ones(48)[::2])
    assert contract(x, w, ones(24), ones(8, 16)) and contract(x, w, ones(24), ones(24, 8).T)


def test_what_is_not_finite_stays_so(gpu):
    for variant, dtype in (("plain", F32), ("mma", BF16), ("hopper", BF16)):
        x, w = np.ones((16, 16)), np.ones((16, 24))
        x[3, 5], x[4, 5], w[7, 9] = np.nan, np.inf, -np.inf
        y = run(gpu, variant, "linear.forward", *(device(a.astype(dtype)) for a in (x, w, np.ones(24))))
        with np.errstate(invalid="ignore"):
            wanted = x @ w + 1
        assert np.array_equal(cupy.asnumpy(y).astype("f8"), wanted, equal_nan=True)


# ---- the plan


def test_plan_takes_wide_tiles_where_they_fill_the_gpu():
    wide, narrow = launches.HOPPER_TILES
    assert launches.plan((32768, 3072, 768), launches.HOPPER_TILES) == (wide, 3072)
    assert launches.plan((128, 128, 64), launches.HOPPER_TILES) == (narrow, 1)


def test_plan_cuts_few_tiles_of_a_long_sum():
    """A weight's gradient of GPT-2 124M: 18 tiles for 132 multiprocessors."""
    tile, shares = launches.plan((768, 768, 32768), launches.HOPPER_TILES)
    assert shares == 132 > tile.count(768, 768)
    tile, shares = launches.plan((768, 768, 256), launches.HOPPER_TILES)
    assert shares == tile.count(768, 768)  # too short to be worth a second kernel


@pytest.mark.parametrize(
    ("sizes", "number", "cut"),
    [
        ((4096, 4096, 4096), 0, False),
        ((8192, 8192, 8192), 0, False),
        ((768, 768, 32768), 1, True),
        ((768, 2304, 32768), 1, False),
        ((768, 3072, 32768), 0, False),
        ((3072, 768, 32768), 0, False),
        ((512, 768, 50304), 1, True),
        ((8192, 768, 50304), 1, False),
    ],
)
def test_plan_is_what_an_h200_does_fastest(sizes, number, cut):
    """Each tile was timed whole and cut (LOG.md, 2026-11-27)."""
    tile, shares = launches.plan(sizes, launches.HOPPER_TILES)
    assert (tile, shares != tile.count(*sizes[:2])) == (launches.HOPPER_TILES[number], cut)


@pytest.mark.parametrize("kernel", ["PLAIN", "MMA", "HOPPER"])
def test_plan_never_cuts_finer_than_a_step(kernel, rng):
    for _ in range(1000):
        sizes = tuple(int(2**exponent) for exponent in rng.uniform(0, 14, 3))
        tile, shares = launches.plan(sizes, getattr(launches, f"{kernel}_TILES"))
        tiles, steps = tile.count(*sizes[:2]), -(-sizes[2] // tile.k)
        assert shares == tiles or (shares == tile.blocks * launches.PROCESSORS and shares <= tiles * steps)


def test_cublas_serves_what_was_measured(gpu, tmp_path, monkeypatch):
    a, b = ones(8, 16, dtype=F32), ones(16, 24, dtype=F32)
    out = ones(8, 24, dtype=F32)
    assert chosen(matmul.add, a, b, out, False) == "plain"
    table = tmp_path / "cublas.json"
    table.write_text(json.dumps({"architecture": gpu.architecture, "faster": ["float32 8x24x16 nn"]}))
    monkeypatch.setattr(launches, "MEASURED", table)
    choice.select(device="cuda")
    assert chosen(matmul.add, a, b, out, False) == "cublas"
    assert chosen(matmul.add, a, b, out, True) == "plain"
    assert chosen(matmul.add, b.T, a.T, ones(24, 8, dtype=F32), False) == "plain"
    matmul.add(a, b, out, False)
    assert_close(out, np.full((8, 24), 16.0), F32)
