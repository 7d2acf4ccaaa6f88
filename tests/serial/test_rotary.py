"""Rotary positions: tables, turned heads, QK-norm, gradients, the order of the gain's sums."""

import math
from fractions import Fraction

import numpy as np
import pytest
from numerics import directional, in_a_tree, poisoned, same_bits

from mlm_mpi.backend import choice, registry
from mlm_mpi.ops import rotary
from mlm_mpi.ops.rotary import Scaling

RANDOM = np.random.default_rng(5)


def _buffer(b: int, t: int, g: int, u: int, d: int, dtype: str = "f8") -> np.ndarray:
    """Queries and keys as attention's layer has them: in one array with the values."""
    return RANDOM.standard_normal((b, t, g, u + 1, d)).astype(dtype)[:, :, :, :u]


def _gain(d: int, dtype: str = "f8") -> np.ndarray:
    return (1 + 0.3 * RANDOM.standard_normal((2, d))).astype(dtype)


def _tables(t: int, width: int, dtype: str = "f8") -> tuple[np.ndarray, np.ndarray]:
    cos, sin = rotary.tables(np.arange(t), width, 100.0)
    return cos.astype(dtype), sin.astype(dtype)


# ---- tables


def _frequency(i: int, width: int, base: float, scaling: Scaling) -> float:
    """Angle per position of pair i as transformers' modeling_rope_utils.py has it, one number at a time."""
    frequency = base ** (-2 * i / width)
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "llama3":
        wavelength = 2 * math.pi / frequency
        if wavelength < scaling.original / scaling.high:
            return frequency
        if wavelength > scaling.original / scaling.low:
            return frequency / scaling.factor
        smooth = (scaling.original / wavelength - scaling.low) / (scaling.high - scaling.low)
        return (1 - smooth) * frequency / scaling.factor + smooth * frequency
    if scaling.kind == "yarn":
        low, high = (
            width * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (scaling.high, scaling.low)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), width - 1)
        ramp = min(1.0, max(0.0, (i - low) / (high - low if high != low else 0.001)))
        return frequency / scaling.factor * ramp + frequency * (1 - ramp)
    return frequency


SCALINGS = [
    Scaling(),
    Scaling("linear", 4.0),
    Scaling("llama3", 8.0, 1.0, 4.0, 8192),
    Scaling("llama3", 32.0, 1.0, 4.0, 256),
    Scaling("yarn", 4.0, 1.0, 32.0, 4096),
    Scaling("yarn", 1.0, 1.0, 32.0, 300),
    Scaling("yarn", 40.0, 1.0, 32.0, 64, 0.707),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s.kind} {s.factor:g}")
@pytest.mark.parametrize(("width", "base"), [(2, 10.0), (64, 10_000.0), (128, 500_000.0), (96, 1_000_000.0)])
def test_tables_are_the_formulas(scaling: Scaling, width: int, base: float) -> None:
    positions = np.array([0, 1, 2, 3, 100, 4095, 131_071])
    angles = positions[:, None] * np.array([_frequency(i, width, base, scaling) for i in range(width // 2)])
    factor = 1.0
    if scaling.kind == "yarn":
        factor = scaling.attention or (0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0)
    cos, sin = rotary.tables(positions, width, base, scaling)
    assert cos.dtype == sin.dtype == np.float32 and cos.shape == (7, width // 2)
    for found, wanted in ((cos, np.cos(angles) * factor), (sin, np.sin(angles) * factor)):
        assert np.abs(found - wanted).max() <= 1.01 * (2**-24 if factor > 1 else 2**-25)  # half a unit


def test_tables_do_not_depend_on_their_neighbours() -> None:
    cos, sin = rotary.tables(np.arange(300), 64, 10_000.0)
    for rows in (slice(7, 8), slice(100, 300)):
        again = rotary.tables(np.arange(300)[rows], 64, 10_000.0)
        assert same_bits(again[0], cos[rows]) and same_bits(again[1], sin[rows])
    assert [x.shape for x in rotary.tables(np.arange(5), 0, 10_000.0)] == [(5, 0), (5, 0)]


def test_what_it_gives_is_known() -> None:
    """Values of 2026-11-28 on x86-64, written down: another CPU, NumPy or Python gives the same."""
    cos, sin = rotary.tables([1000, 131_071], 8, 500_000.0, Scaling("llama3", 8.0, 1.0, 4.0, 8192))
    assert cos.astype("<f4").tobytes().hex() == "13f80f3f4de47e3fec8a5d3f8dfe7f3f5e6751bf71c07ebf7bc4723f0bd0243f"
    assert sin.astype("<f4").tobytes().hex() == "61ae533fc45abebdc546003ff7d5d93b0a4313bff3ffc93de47aa2bec5e3433f"


def test_tables_refuse_what_they_cannot_be() -> None:
    with pytest.raises(ValueError, match="a rotation of 7 numbers"):
        rotary.tables(np.arange(3), 7, 10.0)
    with pytest.raises(ValueError, match="a scaling 'ntk': choose among none, linear"):
        rotary.tables(np.arange(3), 8, 10.0, Scaling("ntk"))


# ---- heads


@pytest.mark.parametrize("width", [0, 6, 8])  # of heads of 8
def test_pairs_are_turned_as_complex_numbers(width: int) -> None:
    x, (cos, sin) = _buffer(2, 7, 2, 3, 8), _tables(7, width)
    y, inverse = rotary.forward(x, cos, sin)
    half = width // 2
    turned = (x[..., :half] + 1j * x[..., half:width]) * (cos + 1j * sin)[:, None, None]
    assert inverse is None and y.flags.c_contiguous
    assert np.allclose(y, np.concatenate([turned.real, turned.imag, x[..., width:]], axis=4), rtol=1e-13, atol=1e-14)
    assert same_bits(y[:, 0], np.ascontiguousarray(x[:, 0])), "at position 0 nothing is turned"


def test_products_depend_on_the_distance_alone() -> None:
    q, k = RANDOM.standard_normal((2, 16))
    x, (cos, sin) = np.broadcast_to(np.stack([q, k]), (1, 40, 1, 2, 16)), _tables(40, 16)
    y = rotary.forward(x, cos, sin)[0][0, :, 0]
    for distance in (0, 1, 13):
        products = [y[t + distance, 0] @ y[t, 1] for t in range(40 - distance)]
        assert np.allclose(products, products[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [0, 4, 10])
@pytest.mark.parametrize("normal", [False, True])
def test_gradients(width: int, normal: bool) -> None:
    x, (cos, sin) = _buffer(2, 6, 4, 3, 10), _tables(6, width)
    gain = _gain(10) if normal else None
    y, inverse = rotary.forward(x, cos, sin, gain, 1e-3)
    if gain is not None:
        assert same_bits(y[:, 0], (x[:, 0] * inverse[:, 0, ..., None]) * gain[[0, 0, 1]])
        assert np.allclose(inverse, 1 / np.sqrt((x**2).mean(axis=4) + 1e-3), rtol=1e-13)
    dy, dgain = RANDOM.standard_normal(y.shape), None if gain is None else poisoned(2, 10)
    dx = rotary.backward(dy, x if normal else None, cos, sin, gain, inverse, dgain, False, 3, 2)

    def objective() -> float:
        return float((rotary.forward(x, cos, sin, gain, 1e-3)[0] * dy).sum())

    directional(objective, x, dx)
    if gain is not None:
        directional(objective, gain, dgain)


@pytest.mark.parametrize("dtype", ["f4", "f8"])  # the kernel, the reference
@pytest.mark.parametrize("normal", [False, True])
def test_the_gradient_may_take_the_memory_of_what_came(normal: bool, dtype: str) -> None:
    x, dy, (cos, sin) = _buffer(2, 9, 2, 3, 20, dtype), _buffer(2, 9, 2, 3, 20, dtype), _tables(9, 12, "f4")
    gain = _gain(20, dtype) if normal else None
    _, inverse = rotary.forward(x, cos, sin, gain, 1e-3)

    def backward(out: np.ndarray | None) -> np.ndarray:
        dgain = None if gain is None else np.ones_like(gain)
        return rotary.backward(dy, x if normal else None, cos, sin, gain, inverse, dgain, True, 2, 1, out)

    fresh, values = backward(None), dy.base.copy()[:, :, :, 3]
    assert backward(dy) is dy and same_bits(dy.copy(), fresh)
    assert same_bits(dy.base[:, :, :, 3].copy(), values), "the values' gradients beside it stay"


# ---- the order of the gain's sums

SHARED = [(1, 1), (3, 1), (2, 2), (9, 4), (18, 4)]  # pieces, shares


def _backward(arrays: tuple[np.ndarray, ...], pieces: int, shares: int, accumulate: bool = False) -> np.ndarray:
    dy, x, gain, inverse = arrays
    dgain = np.ones_like(gain) if accumulate else np.full_like(gain, np.nan)
    rotary.backward(dy, x, *_tables(x.shape[1], 8, "f4"), gain, inverse, dgain, accumulate, pieces, shares)
    return dgain


def _arrays(dtype: str) -> tuple[np.ndarray, ...]:
    x, dy, gain = _buffer(2, 9, 4, 3, 11, dtype), _buffer(2, 9, 4, 3, 11, dtype), _gain(11, dtype)
    return dy, x, gain, rotary.forward(x, *_tables(9, 8, "f4"), gain, 0.1)[1]


def _cut(arrays: tuple[np.ndarray, ...], rows: slice, groups: slice) -> tuple[np.ndarray, ...]:
    dy, x, gain, inverse = (a if a.ndim == 2 else a.reshape(1, 18, *a.shape[2:])[:, rows, groups] for a in arrays)
    return dy, x, gain, np.ascontiguousarray(inverse)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize(("pieces", "shares"), SHARED)
def test_pieces_are_joined_by_the_tree_then_shares_and_the_whole_is_added(dtype: str, pieces: int, shares: int) -> None:
    arrays = tuple(np.ascontiguousarray(a) for a in _arrays(dtype))
    cos, sin = _tables(9, 8, "f4")
    cos, sin, rows, groups = np.tile(cos, (2, 1)), np.tile(sin, (2, 1)), 18 // pieces, 4 // shares
    sums = []
    for share in range(shares):
        parts = []
        for piece in range(pieces):
            r, g = slice(piece * rows, (piece + 1) * rows), slice(share * groups, (share + 1) * groups)
            dy, x, gain, inverse = _cut(arrays, r, g)
            parts.append(poisoned(2, 11, dtype=dtype))
            rotary.backward(dy, x, cos[r], sin[r], gain, inverse, parts[-1], False)
        sums.append(in_a_tree(parts))
    assert same_bits(_backward(arrays, pieces, shares), in_a_tree(sums))
    assert same_bits(_backward(arrays, pieces, shares, True), 1 + in_a_tree(sums))


@pytest.mark.parametrize("ranks", [2, 4])
def test_who_holds_some_groups_has_the_sums_of_their_shares(ranks: int) -> None:
    chosen = choice.select()
    dy, x, gain, inverse = _arrays("f4")
    parts = []
    for groups in np.split(np.arange(4), ranks):
        g = slice(groups[0], groups[-1] + 1)
        parts.append(_backward((dy[:, :, g], x[:, :, g], gain, inverse[:, :, g].copy()), 9, 4 // ranks))
    assert same_bits(in_a_tree(parts), _backward((dy, x, gain, inverse), 9, 4)) and not chosen.fallen


@pytest.mark.skipif(choice.select().first.level == "off", reason="no kernels here")
def test_a_sum_is_one_chain_of_multiply_adds_over_rows_groups_and_units() -> None:
    """Without a rotation, with an inverse of 1: every term is dy·x exactly; the chain rounds each sum once."""
    dy, x, gain, _ = _arrays("f4")
    inverse, dgain = np.ones(x.shape[:4], "f4"), poisoned(2, 11, dtype="f4")
    cos = np.empty((9, 0), "f4")
    rotary.backward(dy, x, cos, cos, gain, inverse, dgain, False)
    sums = [[0.0] * 11, [0.0] * 11]
    fused = "no fused" not in registry.in_force().first.rounding
    for where in np.ndindex(x.shape):
        kind, i = int(where[3] == 2), where[4]
        if fused:
            exact = Fraction(float(dy[where])) * Fraction(float(x[where])) + Fraction(sums[kind][i])
            sums[kind][i] = _to_float32(exact)
        else:
            sums[kind][i] = float(np.float32(dy[where] * x[where]) + np.float32(sums[kind][i]))
    assert dgain.tolist() == sums


def _to_float32(x: Fraction) -> float:
    """The float32 nearest to an exact number, ties to even."""
    if not x:
        return 0.0
    exponent = math.frexp(float(x))[1] - 24
    return float(round(x / Fraction(2) ** exponent)) * 2.0**exponent


def test_what_does_not_fall_into_equal_ranges_is_refused() -> None:
    for dtype in ("f4", "f8"):
        for pieces, shares in ((4, 1), (1, 3)):
            with pytest.raises(ValueError, match=f"18 rows in {pieces} pieces, 4 groups in {shares} shares"):
                _backward(_arrays(dtype), pieces, shares)


def test_nan_stays_in_its_head() -> None:
    for dtype in ("f4", "f8"):
        x, gain = _buffer(1, 5, 2, 2, 8, dtype), _gain(8, dtype)
        x[0, 3, 1, 0, 5] = np.nan
        y, _ = rotary.forward(x, *_tables(5, 8, "f4"), gain, 1e-5)
        bad = np.isnan(y).any(axis=4)
        assert bad[0, 3, 1, 0] and bad.sum() == 1
