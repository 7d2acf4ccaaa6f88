"""Projection and cross-entropy in chunks against a naive float64 one; masks, extreme logits, NaN."""

import math

import numpy as np
import pytest
from numerics import directional, poisoned, same_bits, strided

from mlm_mpi.backend import registry
from mlm_mpi.backend.arrays import BFLOAT16
from mlm_mpi.ops import crossentropy
from mlm_mpi.ops.crossentropy import CHUNK_ROWS


def _draw(n: int, c: int, v: int) -> tuple[np.ndarray, ...]:
    r = np.random.default_rng(n + c + v)
    return r.standard_normal((n, c)), r.standard_normal((v, c)), r.integers(0, v, n), r.random(n) < 0.7


def _naive(x: np.ndarray, w: np.ndarray, targets: np.ndarray, mask: np.ndarray | None) -> float:
    logits = x.astype("f8") @ w.astype("f8").T
    top = logits.max(axis=1)
    losses = top + np.log(np.exp(logits - top[:, None]).sum(axis=1)) - logits[np.arange(len(x)), targets]
    return float((losses if mask is None else losses[mask]).sum())


@pytest.mark.parametrize("size", [(1, 1, 2), (5, 3, 7), (CHUNK_ROWS, 4, 9), (CHUNK_ROWS + 1, 4, 9), (600, 5, 31)])
@pytest.mark.parametrize("arrange", [np.ascontiguousarray, strided])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradients(size, arrange, masked) -> None:  # type: ignore[no-untyped-def]
    x, w, targets, mask = map(arrange, _draw(*size))
    mask = mask if masked else None
    dw = poisoned(*w.shape)
    total, dx = crossentropy.loss_and_grad(x, w, targets, mask, dw, accumulate=False)
    assert total == pytest.approx(_naive(x, w, targets, mask), rel=1e-12, abs=1e-12)
    assert total == crossentropy.loss(x, w, targets, mask)

    def objective() -> float:
        return crossentropy.loss(x, w, targets, mask)

    for value, gradient in ((x, dx), (w, dw)):
        directional(objective, value, gradient)
    if mask is not None:
        assert not dx[~mask].any()


@pytest.mark.parametrize("arrange", [np.ascontiguousarray, strided])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradients_of_capped_logits(arrange, masked) -> None:  # type: ignore[no-untyped-def]
    x, w, targets, mask = map(arrange, _draw(40, 3, 7))
    mask, dw = mask if masked else None, poisoned(*w.shape)
    total, dx = crossentropy.loss_and_grad(x, w, targets, mask, dw, False, cap=1.5)
    logits = 1.5 * np.tanh(x @ w.T / 1.5)
    assert np.allclose(crossentropy.capped(x @ w.T, 1.5), logits, rtol=1e-13)
    assert total == pytest.approx(_naive(logits, np.eye(7), targets, mask), rel=1e-12)
    assert total == crossentropy.loss(x, w, targets, mask, cap=1.5)
    for value, gradient in ((x, dx), (w, dw)):
        directional(lambda: float(crossentropy.loss(x, w, targets, mask, cap=1.5)), value, gradient)


@pytest.mark.parametrize("size", [(5, 3, 7), (CHUNK_ROWS + 1, 4, 9)])
def test_weights_count_in_the_gradient_alone(size) -> None:  # type: ignore[no-untyped-def]
    x, w, targets, mask = _draw(*size)
    weights, dw = np.random.default_rng(1).standard_normal(size[0]), poisoned(*w.shape)
    total, dx = crossentropy.loss_and_grad(x, w, targets, mask, dw, False, weights=weights)
    each = crossentropy.each(x, w, targets, mask)
    assert total == crossentropy.summed(each, 1) == crossentropy.loss(x, w, targets, mask) and not each[~mask].any()
    for value, gradient in ((x, dx), (w, dw)):
        directional(lambda: float(crossentropy.each(x, w, targets, mask) @ weights), value, gradient)
    stored = np.linspace(-1, 1, 12, dtype="f4").reshape(3, 4).astype(BFLOAT16)
    weighed = stored.copy()
    crossentropy.weigh(weighed, np.array([0.5, -3.0, 0.0], "f4"))
    assert same_bits(weighed, (stored.astype("f4") * np.array([[0.5], [-3.0], [0.0]], "f4")).astype(BFLOAT16))


def test_no_cap_changes_nothing_and_a_wide_one_little() -> None:
    x, w, targets, mask = _draw(40, 3, 8)
    logits = x @ w.T
    assert crossentropy.capped(logits, 0.0) is logits
    plain, wide = ([*crossentropy.loss_and_grad(x, w, targets, mask, np.empty_like(w), False, cap=c)] for c in (0, 1e6))
    assert wide[0] == pytest.approx(plain[0], rel=1e-9) and np.allclose(*(each[1] for each in (plain, wide)), atol=1e-9)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_no_logit_is_greater_than_the_cap_and_nan_stays_visible(dtype: str) -> None:
    logits = np.array([[1e4, -1e4, np.inf, -np.inf, 0, np.nan, 1e-4]], dtype)
    got = crossentropy.capped(logits, 30.0)[0]
    assert got[:5].tolist() == [30, -30, 30, -30, 0] and np.isnan(got[5]) and got[6] == pytest.approx(1e-4, rel=1e-6)
    assert np.isnan(crossentropy.rows(logits, np.array([0], "i4"), None, False, 1, 30.0))


def test_accumulate_adds_and_repetition_gives_equal_bits() -> None:
    x, w, targets, mask = _draw(700, 6, 20)
    x, w = x.astype("f4"), w.astype("f4")
    first, second, added = poisoned(20, 6, dtype="f4"), poisoned(20, 6, dtype="f4"), np.ones((20, 6), "f4")
    one = crossentropy.loss_and_grad(x, w, targets, mask, first, accumulate=False)
    two = crossentropy.loss_and_grad(x, w, targets, mask, second, accumulate=False)
    assert one[0] == two[0] and same_bits(one[1], two[1]) and same_bits(first, second)
    crossentropy.loss_and_grad(x, w, targets, mask, added, accumulate=True)
    assert same_bits(added, first + 1), "the chunks' sum is complete before it is added"


@pytest.mark.parametrize("pieces", [1, 2, 3, 7])
def test_shares_and_pieces_change_the_order_alone(pieces: int) -> None:
    x, w, targets, mask = _draw(2 * 3 * 7 * 25, 4, 24)
    dw, other = poisoned(24, 4), poisoned(24, 4)
    total, dx = crossentropy.loss_and_grad(x, w, targets, mask, dw, False, 8, pieces)
    assert total == crossentropy.loss(x, w, targets, mask, 8, pieces)
    expected, dx_of_one = crossentropy.loss_and_grad(x, w, targets, mask, other, False)
    assert total == pytest.approx(expected, rel=1e-14)
    assert np.allclose(dx, dx_of_one, rtol=1e-12, atol=1e-14) and np.allclose(dw, other, rtol=1e-12, atol=1e-14)


def test_a_loss_is_rounded_once_a_piece_whatever_chunks_cut() -> None:
    # integers: logits are exact in any order of chunks
    r = np.random.default_rng(5)
    x, w, targets = r.integers(-2, 3, (900, 3)).astype("f8"), r.integers(-2, 3, (7, 3)).astype("f8"), np.zeros(900, int)
    a, b, c = (math.fsum(crossentropy.rows(x[at : at + 300] @ w.T, targets[:300], None, False)) for at in (0, 300, 600))
    assert crossentropy.loss(x, w, targets, None, 1, 3) == (a + b) + c


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_extreme_logits(dtype: str) -> None:
    x = np.array([[1e4], [-1e4], [1e4], [0.0]], dtype)
    w = np.array([[1.0], [-1.0], [0.0]], dtype)
    targets = np.array([0, 0, 1, 2])
    dw = poisoned(3, 1, dtype=dtype)
    total, dx = crossentropy.loss_and_grad(x, w, targets, None, dw, accumulate=False)
    assert total == pytest.approx(0 + 2e4 + 2e4 + np.log(3), rel=1e-6)
    assert np.isfinite(dx).all() and np.isfinite(dw).all()
    assert dx[0, 0] == 0 and dx[1, 0] == -2 and dx[2, 0] == 2


def test_a_mask_that_hides_all_gives_zero() -> None:
    x, w, targets, _ = _draw(9, 3, 5)
    dw = poisoned(5, 3)
    total, dx = crossentropy.loss_and_grad(x, w, targets, np.zeros(9, bool), dw, accumulate=False)
    assert total == 0 and not dx.any() and not dw.any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    x, w, targets, _ = _draw(9, 3, 5)
    x[4, 1] = bad
    dw = poisoned(5, 3)
    total, dx = crossentropy.loss_and_grad(x, w, targets, None, dw, accumulate=False)
    assert not np.isfinite(total) and not np.isfinite(dx[4]).all() and not np.isfinite(dw).all()
    assert np.isfinite(np.delete(dx, 4, axis=0)).all()
    assert not np.isfinite(crossentropy.loss(x, w, targets))


@pytest.mark.parametrize("rows", [CHUNK_ROWS + 1, 2 * CHUNK_ROWS + 1])
def test_no_row_is_left_alone(rows: int) -> None:
    """A product of one row is NumPy's, whose bits are not stated."""
    x, w, targets, _ = _draw(rows, 4, 9)
    before = registry.fallbacks()
    crossentropy.loss_and_grad(
        x.astype("f4"), w.astype("f4"), targets.astype("i4"), None, np.empty((9, 4), "f4"), False
    )
    assert registry.fallbacks() == before
