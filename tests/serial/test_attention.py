"""Tiled attention against a naive softmax in float64, at the borders of its tiles; the layer and its cache."""

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from numerics import directional, poisoned, same_bits, strided

from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.layers.attention import KeyValueCache, SelfAttention
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.dropout import Dropout
from mlm_mpi.layers.linear import ResidualLinear
from mlm_mpi.ops import attention, dropout
from mlm_mpi.ops.dropout import Draw
from mlm_mpi.params.store import FlatStore
from mlm_mpi.rng import key_of

# (B, H, T, S, D): one position, ragged, both sides of a tile's border, several tiles, a cache
SIZES = [
    (1, 1, 1, 1, 1), (2, 3, 5, 5, 4), (1, 2, 127, 127, 3), (1, 1, 128, 128, 8), (1, 2, 129, 129, 3),
    (1, 1, 300, 300, 5), (2, 2, 1, 9, 4), (1, 2, 7, 150, 4), (1, 1, 140, 270, 3),
]  # fmt: skip


def _draw(b: int, h: int, t: int, s: int, d: int) -> tuple[np.ndarray, ...]:
    r = np.random.default_rng(b + h + t + s + d)
    return tuple(r.standard_normal(n) for n in [(b, h, t, d), (b, h, s, d), (b, h, s, d), (b, t, h, d)])


def _naive(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool,
    drop: np.ndarray | None = None, lengths: np.ndarray | None = None, starts: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    q = q.reshape(q.shape[0], -1, *q.shape[-2:])
    k, v = (x.repeat(q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(q.shape[3])
    t, s = scores.shape[2:]
    if causal:
        scores[:, :, np.arange(s)[None, :] > np.arange(t)[:, None] + s - t] = -np.inf
    if lengths is not None:
        scores[np.arange(s) >= lengths[:, None, None, None] + np.zeros_like(scores)] = -np.inf
    if starts is not None:
        scores[np.arange(s) < starts[:, None, :, None] + np.zeros_like(scores)] = -np.inf
    p = np.exp(scores - np.maximum(scores.max(axis=3, keepdims=True), -1e300))
    p /= np.maximum(p.sum(axis=3, keepdims=True), 1e-300)  # a row of hidden keys: 0
    return np.einsum("bhts,bhsd->bthd", p if drop is None else p * drop, v)


DRAW = Draw(0.4, key_of(1, "dropout", "probabilities"), 3, 2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dropped", [False, True])
def test_values_and_gradients(size, causal, dropped) -> None:  # type: ignore[no-untyped-def]
    b, h, t, s, _ = size
    q, k, v, do = _draw(*size)
    draw = DRAW if dropped else None
    drop = dropout.mask(DRAW, (b, h, t, s), 0, "f8") if dropped else None
    o, lse = attention.forward(q, k, v, causal, draw)
    assert np.allclose(o, _naive(q, k, v, causal, drop), rtol=1e-12, atol=1e-13)
    dq, dk, dv = poisoned(*q.shape), poisoned(*k.shape), poisoned(*v.shape)
    attention.backward(do, q, k, v, o, lse, dq, dk, dv, causal, draw)
    for value, gradient in ((q, dq), (k, dk), (v, dv)):
        directional(lambda: float((_naive(q, k, v, causal, drop) * do).sum()), value, gradient)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("queries", [5, 140, 270])
def test_rows_of_different_lengths(causal: bool, dropped: bool, queries: int) -> None:
    lengths = np.array([270, 0, 1, 128, 133, 200], "i4")
    size = (6, 2, queries, 270, 3)
    q, k, v, do = _draw(*size)
    draw = DRAW if dropped else None
    drop = dropout.mask(DRAW, size[:4], 0, "f8") if dropped else None
    o, lse = attention.forward(q, k, v, causal, draw, lengths)
    assert np.allclose(o, _naive(q, k, v, causal, drop, lengths), rtol=1e-12, atol=1e-13)
    assert (o[1] == 0).all() and (lse[1] == -np.inf).all() and np.isfinite(lse[[0, 2, 3, 4, 5]]).all()
    dq, dk, dv = poisoned(*q.shape), poisoned(*k.shape), poisoned(*v.shape)
    attention.backward(do, q, k, v, o, lse, dq, dk, dv, causal, draw, lengths)
    for value, gradient in ((q, dq), (k, dk), (v, dv)):
        directional(lambda: float((_naive(q, k, v, causal, drop, lengths) * do).sum()), value, gradient)
    for b, length in enumerate(lengths):
        assert not dk[b, :, length:].any() and not dv[b, :, length:].any()
    assert not dq[1].any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys", "share"), [(9, 12, 2), (140, 270, 50), (270, 270, 200)])
def test_shares_of_positions(causal: bool, queries: int, keys: int, share: int) -> None:
    lengths = np.array([keys, 0, keys // 2], "i4")
    size = (3, 2, queries, keys, 3)
    q, k, v, do = _draw(*size)
    drop = dropout.mask(DRAW, size[:4], 0, "f8")
    o, lse = attention.forward(q, k, v, causal, DRAW, lengths, share)
    assert np.allclose(o, _naive(q, k, v, causal, drop, lengths), rtol=1e-12, atol=1e-13)
    gradients = [poisoned(*a.shape) for a in (q, k, v)]
    attention.backward(do, q, k, v, o, lse, *gradients, causal, DRAW, lengths, share)
    for value, gradient in zip((q, k, v), gradients, strict=True):
        directional(lambda: float((_naive(q, k, v, causal, drop, lengths) * do).sum()), value, gradient)


def test_partial_results_of_some_keys_are_merged_and_finished() -> None:
    q, k, v, do = _draw(2, 2, 60, 60, 4)
    o, lse = attention.forward(q, k, v)
    first = attention.partial(q, k[:, :, :25], v[:, :, :25], positions=(0, 0))
    second = attention.partial(q, k[:, :, 25:], v[:, :, 25:], positions=(0, 25))
    assert (second[1][0, :, :, :25] == -np.inf).all() and not second[0][:, :25].any()
    attention.merge(*first, *second)
    got = attention.finish(*first)
    assert all(np.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in zip(got, (o, lse), strict=True))
    whole, left, right = ([poisoned(*a.shape) for a in (q, k, v)] for _ in range(3))
    attention.backward(do, q, k, v, o, lse, *whole)
    lower, upper = slice(0, 25), slice(25, 60)
    for keys, (dq, dk, dv) in ((lower, left), (upper, right)):
        part = k[:, :, keys], v[:, :, keys], o, lse, dq, dk[:, :, keys], dv[:, :, keys]
        attention.backward(do, q, *part, positions=(0, keys.start))
    joined = (
        left[0] + right[0],
        *(np.concatenate([a[:, :, lower], b[:, :, upper]], 2) for a, b in zip(left[1:], right[1:], strict=True)),
    )
    assert all(np.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in zip(joined, whole, strict=True))


def _grouped(b: int, groups: int, each: int, t: int, s: int, d: int) -> list[np.ndarray]:
    """q (B, G, g, T, D), k, v (B, G, S, D), seen in one array (B, S, G, g + 2, D) as a layer holds them; do."""
    r = np.random.default_rng(b + groups + each + t + s + d)
    fused = r.standard_normal((b, s, groups, each + 2, d)).transpose(0, 2, 3, 1, 4)
    q, k, v = fused[:, :, :each, s - t :], fused[:, :, each], fused[:, :, each + 1]
    return [q, k, v, r.standard_normal((b, t, groups * each, d))]


def _starts(kind: str, b: int, t: int, s: int) -> np.ndarray | None:
    """A window, documents of random lengths, both, or documents that begin behind their first queries."""
    window = np.maximum(0, np.arange(s - t, s) - max(1, s // 5) + 1)
    cuts = np.random.default_rng(t + s).random((b, t)) < 6 / t
    documents = np.maximum.accumulate(np.where(cuts, np.arange(s - t, s), 0), axis=1)
    found = {
        "all": None, "window": window[None], "documents": documents, "both": np.maximum(window, documents),
        "blind": np.minimum(documents + 3, s + 1),
    }[kind]  # fmt: skip
    return None if found is None else found.astype("i4")


KINDS = ["all", "window", "documents", "both", "blind"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys", "share"), [(9, 12, 0), (135, 150, 60)])
def test_groups_and_first_keys(kind: str, causal: bool, queries: int, keys: int, share: int) -> None:
    q, k, v, do = _grouped(2, 2, 3, queries, keys, 3)
    starts, lengths = _starts(kind, 2, queries, keys), np.array([keys, keys // 2], "i4")
    drop = dropout.mask(DRAW, (2, 6, queries, keys), 0, "f8")
    rest = (causal, DRAW, lengths, share, None, starts)
    o, lse = attention.forward(q, k, v, *rest)
    assert np.allclose(o, _naive(q, k, v, causal, drop, lengths, starts), rtol=1e-12, atol=1e-13)
    gradients = [poisoned(*a.shape) for a in (q, k, v)]
    attention.backward(do, q, k, v, o, lse, *gradients, *rest)
    for value, gradient in zip((q, k, v), gradients, strict=True):
        directional(lambda: float((_naive(q, k, v, causal, drop, lengths, starts) * do).sum()), value, gradient)


def test_starts_are_positions_and_never_descend() -> None:
    q, k, v, _ = _grouped(2, 2, 2, 30, 30, 4)
    starts = _starts("both", 2, 30, 30)
    assert starts is not None
    whole = attention.forward(q, k, v, starts=starts)
    moved = attention.forward(q, k, v, True, None, None, 0, (100, 100), starts + 100)
    assert all(same_bits(a, b) for a, b in zip(whole, moved, strict=True))
    for wrong in (starts[:, ::-1], starts[:, :-1], starts[0]):
        with pytest.raises(ValueError, match="starts of shape"):
            attention.forward(q, k, v, starts=wrong)


def test_hidden_keys_are_never_read() -> None:
    q, k, v, do = _draw(2, 2, 150, 150, 4)
    lengths = np.array([130, 20], "i4")
    for b, length in enumerate(lengths):
        k[b, :, length:] = v[b, :, length:] = np.nan
    o, lse = attention.forward(q, k, v, False, None, lengths)
    gradients = [poisoned(*a.shape) for a in (q, k, v)]
    attention.backward(do, q, k, v, o, lse, *gradients, False, None, lengths)
    assert all(np.isfinite(a).all() for a in (o, lse, *gradients))


def test_arithmetic_of_bfloat16_is_float32() -> None:
    """Of the reference: kernels have their own tests."""
    short = [a.astype(ml_dtypes.bfloat16) for a in _draw(2, 2, 150, 150, 8)]
    q, k, v, do = short
    long = [a.astype("f4") for a in short]
    o, lse = attention.forward.__wrapped__(q, k, v)
    o4, lse4 = attention.forward.__wrapped__(*long[:3])
    assert o.dtype == q.dtype and lse.dtype == np.float32
    assert same_bits(o, o4.astype(q.dtype)) and same_bits(lse, lse4)
    gradients, wanted = [np.empty_like(a) for a in short[:3]], [np.empty_like(a) for a in long[:3]]
    attention.backward.__wrapped__(do, q, k, v, o, lse, *gradients)
    attention.backward.__wrapped__(long[3], *long[:3], o.astype("f4"), lse, *wanted)
    assert all(same_bits(a, b.astype(q.dtype)) for a, b in zip(gradients, wanted, strict=True))


@pytest.mark.parametrize("causal", [True, False])
def test_strided_inputs_and_outputs_give_the_same(causal: bool) -> None:
    size = (2, 3, 131, 131, 6)
    plain = _draw(*size)
    q, k, v, do = map(strided, plain)
    o, lse = attention.forward(*plain[:3], causal)
    o2, lse2 = attention.forward(q, k, v, causal)
    assert np.allclose(o, o2, rtol=1e-12) and np.allclose(lse, lse2, rtol=1e-12)
    expected = [poisoned(*a.shape) for a in plain[:3]]
    got = [strided(poisoned(*a.shape)) for a in plain[:3]]
    attention.backward(plain[3], *plain[:3], o, lse, *expected, causal)
    attention.backward(do, q, k, v, strided(o), strided(lse), *got, causal)
    for a, b in zip(expected, got, strict=True):
        assert np.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_twice_gives_equal_bits() -> None:
    q, k, v, do = (a.astype("f4") for a in _draw(2, 2, 150, 150, 8))
    runs = []
    for _ in range(2):
        o, lse = attention.forward(q, k, v)
        gradients = [poisoned(*a.shape, dtype="f4") for a in (q, k, v)]
        attention.backward(do, q, k, v, o, lse, *gradients)
        runs.append([o, lse, *gradients])
    assert all(same_bits(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_extreme_scores_pick_one_key(dtype: str) -> None:
    q = np.full((1, 1, 3, 1), 100.0, dtype)
    k = np.array([-100.0, 100.0, 0.0], dtype).reshape(1, 1, 3, 1)
    v = np.array([1.0, 2.0, 3.0], dtype).reshape(1, 1, 3, 1)
    o, lse = attention.forward(q, k, v, causal=False)
    assert np.array_equal(o.reshape(-1), np.full(3, 2.0, dtype)) and np.allclose(lse, 1e4)
    gradients = [poisoned(1, 1, 3, 1, dtype=dtype) for _ in range(3)]
    attention.backward(np.ones((1, 3, 1, 1), dtype), q, k, v, o, lse, *gradients, causal=False)
    assert all(np.isfinite(g).all() for g in gradients)


def test_the_future_is_never_read() -> None:
    q, k, v, _ = _draw(1, 2, 200, 200, 4)
    o, _ = attention.forward(q, k, v)
    k[:, :, 150:], v[:, :, 150:] = 1e3, -1e3
    changed, _ = attention.forward(q, k, v)
    assert np.allclose(changed[:, :150], o[:, :150], rtol=1e-12, atol=1e-12)
    assert not np.allclose(changed[:, 150:], o[:, 150:])


def _layer(rate: float) -> tuple[SelfAttention, FlatStore]:
    project = ResidualLinear("name.project", 12, 12, 0.3, Dropout("drop", rate))
    layer = SelfAttention("name", 3, project, 0.4, Dropout("name.probabilities", rate))
    store = FlatStore([layer.parameters()], Mesh(), "f8")
    store.initialise(0)
    return layer, store


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("queries", [1, 9, 133])
def test_layer(rate: float, queries: int) -> None:
    layer, store = _layer(rate)
    grad = store.by_parameter(poisoned(store.size))
    ctx = Context(training=True, seed=5, step=2, micro_batch=1, gradients=grad)
    r = np.random.default_rng(2)
    x, dy = r.standard_normal((2, queries, 12)), r.standard_normal((2, queries, 12))
    _, saved = layer.forward(x, ctx)
    dx = layer.backward(dy, saved, ctx)
    for value, gradient in [(x, dx)] + [(p.data, grad[p]) for p in layer.parameters()]:
        directional(lambda: float((layer.forward(x, ctx)[0] * dy).sum()), value, gradient)
    before = [grad[p].copy() for p in layer.parameters()]
    layer.backward(dy, saved, replace(ctx, accumulate=True))
    for p, once in zip(layer.parameters(), before, strict=True):
        assert np.allclose(grad[p], 2 * once, rtol=1e-10, atol=1e-12)


def test_dropout_of_a_row_does_not_depend_on_the_tile_that_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = _layer(0.5)
    ctx = Context(training=True, seed=5)
    x = np.random.default_rng(2).standard_normal((2, 50, 12))
    whole, _ = layer.forward(x, ctx)
    monkeypatch.setattr(attention, "TILE", 16)
    tiled, _ = layer.forward(x, ctx)
    assert np.allclose(whole, tiled, rtol=1e-11, atol=1e-12)


def test_dropout_differs_between_rows_heads_and_queries() -> None:
    shape = (2, 3, 40, 40)
    masks = [mask for b in range(2) for mask in attention._factors(DRAW, shape, b, 0, 40, "f8")]  # (40, 40) each
    rows = [row.tobytes() for mask in masks for row in mask]
    assert len(set(rows)) == 2 * 3 * 40


def test_a_cache_gives_what_the_whole_sequence_gives() -> None:
    layer, _ = _layer(0.0)
    x = np.random.default_rng(2).standard_normal((2, 40, 12))
    whole, _ = layer.forward(x, Context())
    cache = KeyValueCache(40)
    parts = []
    for start, stop in [(0, 17), (17, 18), (18, 19), (19, 40)]:
        parts.append(layer.forward(x[:, start:stop], Context(cache=cache))[0])
        cache.advance(stop - start)
    assert np.allclose(np.concatenate(parts, axis=1), whole, rtol=1e-11, atol=1e-12)
