"""Optimisers against their formulas, schedules at their corners, the norm and what it names."""

import math

import numpy as np
import pytest

from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.optim import adamw, sgd
from mlm_mpi.params.clip import BLOCK_ELEMENTS, clip_factor, norm
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import FlatStore, Parameter
from mlm_mpi.rates import constant, cosine, learning_rate, linear


def store_of(dtype="f8", rows=700):
    decaying = Parameter("weight", Layout((rows, 101)), 1.0, decay=True)
    plain = Parameter("bias", Layout((37,)), 1.0)
    store = FlatStore([[decaying], [plain]], Mesh(), dtype)
    store.initialise(5)
    return store


def gradient_of(store, seed):
    flat = store.new_buffer()
    for view in store.views(flat):
        view[...] = np.random.default_rng(seed).standard_normal(view.shape)
    return flat


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adamw_is_its_formula(decay):
    optim = adamw.Settings(weight_decay=decay)
    store = store_of()
    optimizer = adamw.build(optim, store, Mesh())
    p = {n: v.copy() for n, v in store.named(store.data).items()}
    m = {n: np.zeros_like(v) for n, v in p.items()}
    v = {n: np.zeros_like(w) for n, w in p.items()}
    for number in (1, 2, 3):
        flat = gradient_of(store, number)
        optimizer.step(flat, 0.01, 0.5, number)
        for name, g in store.named(flat).items():
            g = 0.5 * g
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            shrink = 1 - 0.01 * decay * (name == "weight")
            step = (m[name] / (1 - 0.9**number)) / (np.sqrt(v[name] / (1 - 0.95**number)) + 1e-8)
            p[name] = p[name] * shrink - 0.01 * step
    for name, value in store.named(store.data).items():
        np.testing.assert_allclose(value, p[name], rtol=1e-12, atol=1e-14)


def test_sgd_is_its_formula():
    store = store_of()
    optimizer = sgd.build(sgd.Settings(momentum=0.8, weight_decay=0.1), store, Mesh())
    before = {n: w.copy() for n, w in store.named(store.data).items()}
    flats = [gradient_of(store, number) for number in (1, 2)]
    for number, flat in enumerate(flats, 1):
        optimizer.step(flat, 0.01, 2.0, number)
    for name, value in store.named(store.data).items():
        g1, g2 = (2.0 * store.named(flat)[name] for flat in flats)
        shrink = 1 - 0.01 * 0.1 * (name == "weight")
        expected = (before[name] * shrink - 0.01 * g1) * shrink - 0.01 * (0.8 * g1 + g2)
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [adamw, sgd])
def test_moments_are_counted_as_they_are_held(kind):
    """The lower bound of a rank's memory rests on it; a kind that says nothing counts as holding none."""
    assert len(kind.build(kind.Settings(), store_of(), Mesh()).state()) == kind.MOMENTS


@pytest.mark.parametrize("kind", [adamw, sgd])
def test_gaps_between_parameters_stay_zero(kind):
    store = store_of()
    optimizer = kind.build(kind.Settings(), store, Mesh())
    optimizer.step(gradient_of(store, 1), 0.1, 1.0, 1)
    used = np.zeros(store.size, bool)
    for span in store.spans:
        used[span.start : span.stop] = True
    assert not used.all() and (store.data[~used] == 0).all()


def test_schedules_at_their_corners():
    def at(step, kind=cosine, warmup=10):
        return learning_rate(1.0, warmup, 0.1, kind.rate, 110, step)

    assert at(0) == 0.1
    assert at(9) == 1.0
    assert at(10) == 1.0
    assert at(60) == pytest.approx(0.55)
    assert at(110) == pytest.approx(0.1)
    assert at(85, linear) == pytest.approx(0.1 + 0.9 * 0.25)
    assert at(100, constant) == 1.0
    assert at(0, warmup=0) == 1.0


def test_norm_is_exact_in_float64_and_names_what_is_not_finite():
    store = store_of("f4", rows=1000)  # more than one block
    assert store.spans[0].stop > BLOCK_ELEMENTS
    flat = gradient_of(store, 1)
    value, broken = norm(store, flat)
    assert broken is None
    assert value == pytest.approx(math.sqrt((flat.astype("f8") ** 2).sum()), rel=1e-14)
    flat[store.spans[0].stop - 1] = np.nan
    assert norm(store, flat)[1] == "weight"
    flat[store.spans[1].start] = np.inf
    assert norm(store, flat)[1] == "bias"  # the first by name


def test_clipping():
    assert clip_factor(1.0, 4.0) == 0.25
    assert clip_factor(1.0, 0.5) == 1.0
    assert clip_factor(0.0, 1e9) == 1.0
