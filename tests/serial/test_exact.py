"""Elementary functions against exact values, and that nothing else on the way to the weights asks a library."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from mlm_mpi import exact
from mlm_mpi.rates import cosine

PACKAGE = Path(__file__).parents[2] / "mlm_mpi"
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798")
RANDOM = np.random.default_rng(11)
MOST = 1.1  # units in the last place


def ulps(found: float, wanted: Decimal) -> float:
    """How far a float64 is from an exact value, in units of the value's last place."""
    nearest = float(wanted)
    return float(abs(Decimal(found) - wanted) / Decimal(math.ulp(nearest))) if nearest else float(found != 0.0)


def sin_cos(angle: Decimal) -> tuple[Decimal, Decimal]:
    """Of an angle in [0, 2π] by their series."""
    total, term, n = [Decimal(0), Decimal(0)], Decimal(1), 0
    while abs(term) > Decimal("1e-70") or n < angle:
        total[n % 2] += term * (1, 1, -1, -1)[n % 4]
        n += 1
        term *= angle / n
    return total[1], total[0]


@pytest.fixture(autouse=True)
def many_digits():
    with localcontext() as context:
        context.prec = 80
        yield


def test_log_errs_by_less_than_a_unit_in_the_last_place():
    words = [0, 1, 2, 3, 1 << 20, (1 << 31) - 2, 3037000498, 3037000499, 3037000500, (1 << 32) - 2, (1 << 32) - 1]
    draws = (np.array([*words, *RANDOM.integers(0, 1 << 32, 300)]) + 1.0) * 2.0**-32
    every = np.concatenate([draws, np.exp(RANDOM.uniform(-700, 700, 100)), [5e-308, 1.7e308]])
    found = exact.log(every)
    assert max(ulps(y, Decimal(x).ln()) for x, y in zip(every.tolist(), found.tolist(), strict=True)) < MOST
    assert exact.log(np.ones(1))[0] == 0.0


def test_sine_and_cosine_err_by_a_unit_in_the_last_place():
    corners = [k << 29 for k in range(8)]
    near = [(corner + d) % (1 << 32) for corner in corners for d in (-2, -1, 0, 1, 2, 12345)]
    words = np.array([*near, *RANDOM.integers(0, 1 << 32, 150)], np.uint32)
    cosine, sine = exact.circle(words)
    for word, c, s in zip(words.tolist(), cosine.tolist(), sine.tolist(), strict=True):
        if word % (1 << 30) == 0:  # quarter turns
            assert (abs(c), abs(s)) == ((1.0, 0.0) if word % (1 << 31) == 0 else (0.0, 1.0))
            continue
        true_sine, true_cosine = sin_cos(2 * PI * word / 2**32)
        assert ulps(c, true_cosine) < MOST and ulps(s, true_sine) < MOST, word


def test_exp_errs_by_less_than_a_unit_in_the_last_place():
    every = np.concatenate([RANDOM.uniform(-708, 709, 200), RANDOM.uniform(-1, 1, 200), [0.0, -0.0, 1e-300, -708, 709]])
    assert max(ulps(y, Decimal(x).exp()) for x, y in zip(every.tolist(), exact.exp(every).tolist(), strict=True)) < MOST
    halves = (np.arange(-1020, 1024) + 0.5) * math.log(2)  # where the multiple of ln 2 that is taken changes
    assert np.allclose(exact.exp(halves), np.exp(halves), rtol=4e-16, atol=0)
    assert exact.exp(np.zeros(1))[0] == 1.0


def test_sine_and_cosine_of_any_turns():
    quarters = np.array([0.0, 0.25, 0.5, 0.75, 1.0, 2.0**40 + 0.25, 2.0**49])
    cosine, sine = exact.cos_sin_of_turns(quarters)
    assert cosine.tolist() == [1, 0, -1, 0, 1, 0, 1] and sine.tolist() == [0, 1, 0, -1, 0, 1, 0]
    words = RANDOM.integers(0, 1 << 32, 200)
    for whole in (0, 1, 12_345):  # a word is a fraction of a turn that float64 holds
        found = exact.cos_sin_of_turns(whole + words * 2.0**-32)
        assert all((a == b).all() for a, b in zip(found, exact.circle(words.astype(np.uint32)), strict=True))
    for turns in RANDOM.uniform(0, 3, 50):
        cosine, sine = (float(x[0]) for x in exact.cos_sin_of_turns(np.array([turns])))
        true_sine, true_cosine = sin_cos(2 * PI * (Decimal(turns) % 1))
        assert ulps(cosine, true_cosine) < MOST and ulps(sine, true_sine) < MOST


def test_what_it_gives_is_known():
    """Values of 2026-11-27 on x86-64, written down: another CPU, NumPy or Python gives the same."""
    words = np.array([0x12345678, 0x9ABCDEF0, 0x3FFFFFFF, 0xC0000001], np.uint32)
    cosine, sine = exact.circle(words)
    logs = exact.log((words + 1.0) * 2.0**-32)
    found = [[value.hex() for value in values.tolist()] for values in (cosine, sine, logs)]
    assert found == KNOWN


KNOWN = [
    ["0x1.cdbcfe320a3eep-1", "-0x1.95a6fd79bda20p-1", "0x1.921fb54442d18p-30", "0x1.921fb54442d18p-30"],
    ["0x1.ba74afb2fd1adp-2", "-0x1.3864f1bee8e6ep-1", "0x1.0000000000000p+0", "-0x1.0000000000000p+0"],
    ["-0x1.525e97373d64fp+1", "-0x1.01c39c8e7ef9ep-1", "-0x1.62e42fefa39efp+0", "-0x1.26962108a30e8p-2"],
]


@pytest.mark.parametrize("x", [0.0, 1e-9, 0.1, 0.25, 0.2500001, 1 / 3, 0.5, 0.6, 0.75, 0.7500001, 0.999, 1.0])
def test_half_turns_of_the_schedule(x):
    wanted = sin_cos(PI * Decimal(x))[1]
    if x != 0.5:
        assert ulps(exact.cos_of_half_turns(x), wanted) < MOST
    assert cosine.rate(x) == pytest.approx(0.5 * (1 + math.cos(math.pi * x)), abs=1e-15)
    assert exact.cos_of_half_turns(0.5) == 0.0


def test_a_float_and_an_array_go_the_same_way():
    x = RANDOM.uniform(-1, 1, 50)
    assert exact._sine(x, x * x).tolist() == [exact._sine(one, one * one) for one in x.tolist()]
    assert exact._cosine(x * x).tolist() == [exact._cosine(one * one) for one in x.tolist()]


@pytest.mark.parametrize("x", [0.9, 0.95, 0.999, 0.0])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 1000, 12_345])
def test_powers_are_products_by_squaring(x, n):
    wanted = Fraction(x) ** n
    assert abs(Fraction(exact.power(x, n)) - wanted) <= n * Fraction(1, 1 << 53) * wanted + Fraction(1, 1 << 1074)
    if n == 10:
        square = x * x
        assert exact.power(x, n) == square * ((square * square) * (square * square))


def test_a_power_that_is_none_is_refused():
    with pytest.raises(ValueError, match="a power of -1"):
        exact.power(0.5, -1)
