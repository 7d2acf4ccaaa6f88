"""Optimisers against their formulas, schedules at their corners, the norm and what it names."""

import math

import numpy as np
import pytest

from mlm_mpi.backend import choice
from mlm_mpi.backend.arrays import cpu
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.ops import polar
from mlm_mpi.optim import Shared, adamw, lion, muon, sgd
from mlm_mpi.params.average import Average
from mlm_mpi.params.clip import BLOCK_ELEMENTS, clip_factor, norm
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import FlatStore, Parameter, equal
from mlm_mpi.rates import constant, cosine, learning_rate, linear, one_minus_root

KINDS = [adamw, lion, muon, sgd]


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


def test_lion_is_its_formula():
    store = store_of()
    optimizer = lion.build(lion.Settings(weight_decay=0.5), store, Mesh())
    p = {n: v.copy() for n, v in store.named(store.data).items()}
    m = {n: np.zeros_like(v) for n, v in p.items()}
    for number in (1, 2, 3):
        flat = gradient_of(store, number)
        optimizer.step(flat, 0.01, 0.5, number)
        for name, g in store.named(flat).items():
            sign = np.sign(0.9 * m[name] + 0.1 * 0.5 * g)
            p[name] = p[name] * (1 - 0.01 * 0.5 * (name == "weight")) - 0.01 * sign
            m[name] = 0.99 * m[name] + 0.01 * 0.5 * g
    for name, value in store.named(store.data).items():
        np.testing.assert_allclose(value, p[name], rtol=1e-12, atol=1e-14)


# ---- muon

SHAPES = [(48, 48), (40, 130), (130, 40), (97, 193), (2, 7), (7, 2)]  # 97: two blocks, none of them a single row


def orthogonal(u, iteration="polar-express", dtype="f4"):
    """As one of three in a stack."""
    stack = np.stack([u[::-1], u, -u]).astype(dtype)
    muon.orthogonalise(stack, *muon.coefficients(iteration))
    return stack[1]


def by_svd(u, iteration):
    """The polynomials on the singular values that numpy.linalg.svd finds, in float64."""
    left, s, right = np.linalg.svd(u.astype("f8"), full_matrices=False)
    largest, polynomials = muon.coefficients(iteration)
    s = s * largest / np.sqrt((s**2).sum())
    for a, b, c in polynomials:
        s = a * s + b * s**3 + c * s**5
    return left * s @ right, s


@pytest.mark.parametrize("iteration", ["polar-express", "newton-schulz"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_iteration_changes_singular_values_and_no_vectors(shape, iteration):
    u = np.random.default_rng(3).standard_normal(shape)
    expected, values = by_svd(u, iteration)
    assert 0.85 < values.max() < 1.21
    if shape[0] != shape[1]:  # a square one has singular values near zero
        assert values.min() > 0.65
    np.testing.assert_allclose(orthogonal(u, iteration, "f8"), expected, atol=1e-9)
    choice.select()
    found = orthogonal(u.astype("f4"), iteration)
    assert np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)
    assert np.array_equal(orthogonal(u.astype("f4") * np.float32(2**-40), iteration), found), (
        "only the direction counts"
    )


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)], ids=str)
def test_a_row_or_column_becomes_one_of_length_one(shape):
    u = np.random.default_rng(3).standard_normal(shape).astype("f4")
    np.testing.assert_allclose(orthogonal(u), u / np.linalg.norm(u), rtol=1e-6)


@pytest.mark.parametrize("shape", [(5, 9), (1, 9)], ids=str)
def test_what_has_no_direction_does_not_move(shape):
    assert (orthogonal(np.zeros(shape, "f4")) == 0).all()


def test_muons_products_ask_no_library():
    """Bits of NumPy's BLAS would differ between CPUs: every product of a step, whatever its shape, is a kernel's."""
    chosen = choice.select()
    for shape in (*SHAPES, (1, 9), (193, 97), (289, 300)):
        orthogonal(np.random.default_rng(1).standard_normal(shape))
    assert chosen.fallen == {}


def hidden_store(dtype="f8"):
    qkv = Parameter("qkv", Layout((6, 3, 4)), 1.0, decay=True, matrices=(equal(1, 3),))
    up = Parameter("up", Layout((6, 20)), 1.0, decay=True, matrices=())
    table = Parameter("table", Layout((11, 6)), 1.0, decay=True)
    gain = Parameter("gain", Layout((6,)), "ones")
    store = FlatStore([[table], [qkv, gain, up]], Mesh(), dtype)
    store.initialise(5)
    return store


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_its_formula(nesterov):
    settings = muon.Settings(
        learning_rate=0.04, weight_decay=0.2, momentum=0.9, momentum_start=0.5, momentum_steps=2, nesterov=nesterov,
        adam_learning_rate=0.03, adam_weight_decay=0.1,
    )  # fmt: skip
    store, other = hidden_store(), hidden_store()
    optimizer = muon.build(settings, store, Mesh())
    adam = adamw.build(adamw.Settings(weight_decay=0.1), other, Mesh())
    p = {n: v.copy() for n, v in store.named(store.data).items()}
    m = {n: np.zeros_like(v) for n, v in p.items()}
    for number, mu in ((1, 0.5), (2, 0.7), (3, 0.9), (4, 0.9)):
        flat = gradient_of(store, number)
        rate = 0.02  # half of the largest
        before = {kind: flat.copy() for kind, flat in (*optimizer.state().items(), ("weights", store.data))}
        optimizer.prepare(flat, rate, 0.5, number)
        for kind, flat_now in (*optimizer.state().items(), ("weights", store.data)):
            assert np.array_equal(flat_now, before[kind]), "a rank that dies now leaves no half of an update"
        optimizer.step(flat, rate, 0.5, number)
        adam.step(flat, 0.015, 0.5, number)
        for name in ("qkv", "up"):
            g = 0.5 * store.named(flat)[name]
            m[name] = mu * m[name] + (1 - mu) * g
            u = mu * m[name] + (1 - mu) * g if nesterov else m[name]
            p[name] = p[name] * (1 - rate * 0.2)
            for k in range(3 if name == "qkv" else 1):
                at = (slice(None), k) if name == "qkv" else ...
                rows, columns = u[at].shape
                p[name][at] -= rate * math.sqrt(max(1, columns / rows)) * by_svd(u[at], settings.iteration)[0]
    for name, value in store.named(store.data).items():
        expected = p[name] if name in p and name in ("qkv", "up") else other.named(other.data)[name]
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-9)
    assert all((store.named(optimizer.moment2)[name] == 0).all() for name in ("qkv", "up")), "unused there"


def test_matrices_are_shared_out_by_cost():
    assert muon.shared_out([5, 9, 5, 1, 5], 2) == [1, 0, 1, 1, 0]
    assert muon.shared_out([1, 1], 4) == [0, 1]
    assert muon.shared_out([], 3) == []
    assert polar.flops(256, 1024) == polar.flops(1024, 256) > polar.flops(256, 256)


def test_matrices_of_a_parameter_fill_it():
    whole = Parameter("w", Layout((6, 5, 2)), 1.0, matrices=((1, (3, 1, 1)),))
    array = np.arange(60.0).reshape(6, 5, 2)
    pieces = whole.as_matrices(array)
    assert [piece.shape for piece in pieces] == [(6, 3, 2), (6, 1, 2), (6, 1, 2)]
    assert all(np.shares_memory(piece, array) for piece in pieces)
    assert np.array_equal(pieces[1], array[:, 3:4])
    for wrong in ((1, (3, 1)), (2, (1,)), (1, ())):
        with pytest.raises(ValueError, match="do not fill the shape"):
            Parameter("w", Layout((6, 5, 2)), 1.0, matrices=(wrong,))


def test_matrices_may_be_cut_along_several_dims():
    """Queries, keys and values of every head: the last index runs fastest."""
    qkv = Parameter("w", Layout((5, 3, 8)), 1.0, matrices=(equal(1, 3), equal(2, 2, 4)))
    array = np.arange(120.0).reshape(5, 3, 8)
    pieces = qkv.as_matrices(array)
    assert len(pieces) == 6 and np.array_equal(pieces[3], array[:, 1:2, 4:])
    rows = Parameter("w", Layout((6, 2)), 1.0, matrices=(equal(0, 3, 2),))
    assert [piece.tolist() for piece in rows.as_matrices(array[0, :2, :6].T)][1] == array[0, :2, 2:4].T.tolist()
    assert Parameter("w", Layout((6,)), 1.0).as_matrices(array) == []


# ---- what all have


def test_an_average_of_weights_is_its_formula():
    store = store_of()
    average, weights = Average(store, 0.8), []
    for number in (1, 2, 3, 4):
        store.data += gradient_of(store, number)
        weights.append(store.data.copy())
        average.follow(number)
        shares = [0.8 ** (number - k) for k in range(1, number + 1)]
        expected = sum(share * w for share, w in zip(shares, weights, strict=True)) / sum(shares)
        np.testing.assert_allclose(average.flat, expected, rtol=1e-12, atol=1e-14)
    assert list(average.state()) == ["average"]


@pytest.mark.parametrize("compute", ["f4", "f8"])
def test_another_buffer_is_shown_for_a_while(compute):
    """Also where layers see a copy in a narrower type."""
    parameter = Parameter("weight", Layout((3, 5)), 1.0)
    store = FlatStore([[parameter]], Mesh(), "f8", cpu(compute))
    store.initialise(1)
    before, other = parameter.data.copy(), store.data + 1.0
    with pytest.raises(KeyError), store.showing(other):
        assert np.array_equal(parameter.data, store.views(other)[0].astype(compute))
        assert parameter.data.dtype == compute
        raise KeyError
    assert np.array_equal(parameter.data, before) and np.shares_memory(parameter.data, store.working)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_counted_as_they_are_held(kind):
    """The lower bound of a rank's memory rests on it; a kind that says nothing counts as holding none."""
    assert len(kind.build(kind.Settings(), store_of(), Mesh()).state()) == kind.MOMENTS


@pytest.mark.parametrize("kind", KINDS)
def test_gaps_between_parameters_stay_zero(kind):
    store = store_of()
    optimizer = kind.build(kind.Settings(), store, Mesh())
    if isinstance(optimizer, Shared):
        optimizer.prepare(gradient_of(store, 1), 0.1, 1.0, 1)
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


def test_a_curve_may_fall_in_the_last_part_of_a_run_only():
    """Warm-up, stable, decay: 10 steps, 75 and 25."""

    def at(step, kind=linear, fraction=0.25):
        return learning_rate(2.0, 10, 0.2, kind.rate, 110, step, fraction)

    assert [at(step) for step in (9, 10, 50, 85)] == [2.0] * 4
    assert at(86) == pytest.approx(2.0 * (0.2 + 0.8 * 24 / 25))
    assert at(110) == pytest.approx(0.4)
    assert at(95, one_minus_root) == pytest.approx(2.0 * (0.2 + 0.8 * (1 - math.sqrt(0.4))))
    assert [at(step, cosine, 0.0) for step in (10, 109)] == [2.0] * 2, "it never falls"
    every = range(111)
    assert [at(n, cosine, 1.0) for n in every] == [learning_rate(2.0, 10, 0.2, cosine.rate, 110, n) for n in every]


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
