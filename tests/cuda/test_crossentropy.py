import cupy
import numpy as np
import pytest
from agreement import assert_close, device, run, same_bits, shifted

from mlm_mpi.backend.cuda.provider import KERNELS
from mlm_mpi.ops import crossentropy

SHAPES = [(1, 1), (3, 7), (5, 333), (2, 5000), (1, 8200)]


def drawn(rng, shape, dtype, scale=3.0):
    """logits (R, V), targets (R,), mask (R,)"""
    targets = rng.integers(0, shape[1], shape[0]).astype("i4")
    return rng.normal(0, scale, shape).astype(dtype), targets, rng.random(shape[0]) < 0.6


def exact(logits, targets, mask):
    gradient = logits.astype("f8")
    return crossentropy.rows.__wrapped__(gradient, targets, mask, True), gradient


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("place", [device, shifted])
def test_losses_and_gradients(gpu, dtype, shape, masked, place, rng):
    logits, targets, mask = drawn(rng, shape, dtype)
    mask = mask if masked else None
    found = place(logits)
    losses = run(crossentropy.rows, found, device(targets), device(mask) if masked else None, True)
    wanted, gradient = exact(logits, targets, mask)
    assert losses.dtype == np.float64 and found.dtype == dtype
    assert_close(losses, wanted, "f4")
    assert_close(found, gradient, dtype)
    again = run(crossentropy.rows, place(logits), device(targets), device(mask) if masked else None, False)
    assert same_bits(losses, again), "the loss does not depend on `gradient`"


@pytest.mark.parametrize("shape", [(3, 7), (2, 5000), (1, 8200)])
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("place", [device, shifted])
def test_capped_logits(gpu, dtype, shape, shares, place, rng):
    logits, targets, mask = drawn(rng, shape, dtype)
    shares = (7 if shape[1] == 7 else 8) if shares else 1
    logits[0, :3] = np.inf, -np.inf, 1e-3
    found, gradient = place(logits), logits.astype("f8")
    losses = run(crossentropy.rows, found, device(targets), device(mask), True, shares, 4.0)
    wanted = crossentropy.rows.__wrapped__(gradient, targets, mask, True, shares, 4.0)
    assert_close(losses, wanted, "f4")
    assert_close(found, gradient, dtype)
    again = run(crossentropy.rows, place(logits), device(targets), device(mask), False, shares, 4.0)
    assert same_bits(losses, again), "the loss does not depend on `gradient`"


@pytest.mark.parametrize(("columns", "shares"), [(16, 2), (1000, 8), (1001, 7), (8200 * 2, 2)])
@pytest.mark.parametrize("place", [device, shifted])
def test_shares_of_the_vocabulary(gpu, dtype, columns, shares, place, rng):
    logits, targets, mask = drawn(rng, (2, columns), dtype)
    found = place(logits)
    losses = run(crossentropy.rows, found, device(targets), device(mask), True, shares)
    wanted, gradient = exact(logits, targets, mask)
    assert_close(losses, wanted, "f4")
    assert_close(found, gradient, dtype)
    other = device(logits) if place is shifted else shifted(logits)
    assert same_bits(losses, run(crossentropy.rows, other, device(targets), device(mask), True, shares)), "any address"


def test_a_share_of_the_vocabulary_is_summed_by_itself(gpu):
    """256 weights of 2^-25 are lost one by one beside a weight of 1, and seen as the sum of a share."""
    logits = np.full((1, 2 * 8192), -1e30, "f4")
    logits[0, 0], logits[0, 8192:] = 0.0, -25 * np.log(2)
    logits[0, 8192::2] = -1e30
    target = device(np.zeros(1, "i4"))
    small = 4096 * 2.0**-25
    found = run(crossentropy.rows, device(logits), target, None, False, 2).get()[0]
    assert found == pytest.approx(small, rel=1e-2)
    whole = run(crossentropy.rows, device(logits), target, None, False).get()[0]
    assert whole != found


def test_a_vocabulary_of_no_whole_shares_is_refused():
    contract = KERNELS.entries()["crossentropy.rows"].contract
    logits, targets = device(np.ones((2, 12), "f4")), device(np.zeros(2, "i4"))
    assert contract(logits, targets, None, True, 4) == ""
    assert "shares" in contract(logits, targets, None, True, 5) and "shares" in contract(logits, targets, None, True, 0)


def test_rows_of_a_wider_matrix(gpu, dtype, rng):
    whole, targets, _ = drawn(rng, (6, 56), dtype)
    found = device(whole)
    losses = run(crossentropy.rows, found[:, :50], device(targets % 50), None, True)
    wanted, gradient = exact(whole[:, :50], targets % 50, None)
    assert_close(losses, wanted, "f4")
    assert_close(found[:, :50], gradient, dtype)
    assert same_bits(found[:, 50:], cupy.asarray(whole[:, 50:])), "what lies between rows is left alone"


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits(gpu, dtype, scale, rng):
    logits, targets, _ = drawn(rng, (4, 300), dtype, scale)
    logits[1, :] = scale
    logits[2, 5:] = -np.inf
    targets[2] = 3
    found = device(logits)
    losses = run(crossentropy.rows, found, device(targets), None, True)
    wanted, gradient = exact(logits, targets, None)
    assert_close(losses, wanted, "f4")
    assert_close(found, gradient, dtype)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_stays_in_its_row(gpu, dtype, bad, rng):
    logits, targets, _ = drawn(rng, (3, 600), dtype)
    logits[1, 400] = bad
    found = device(logits)
    losses = run(crossentropy.rows, found, device(targets), None, True).get()
    gradient = found.get().astype("f8")
    assert np.isnan(losses[1]) and np.isnan(gradient[1]).all()
    assert np.isfinite(losses[[0, 2]]).all() and np.isfinite(gradient[[0, 2]]).all()


def test_a_target_outside_the_vocabulary_makes_the_loss_nan(gpu, dtype, rng):
    logits, _, _ = drawn(rng, (4, 40), dtype)
    losses = run(crossentropy.rows, device(logits), device(np.array([3, 40, -1, 2**31 - 1], "i4")), None, True).get()
    assert np.isfinite(losses[0]) and np.isnan(losses[1:]).all()


def test_twice_the_same_bits(gpu, dtype, rng):
    logits, targets, mask = drawn(rng, (3, 1001), dtype)
    found = [device(logits) for _ in range(2)]
    losses = [run(crossentropy.rows, one, device(targets), device(mask), True) for one in found]
    assert same_bits(*losses) and same_bits(*found)
