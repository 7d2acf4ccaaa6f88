"""Every variant of flash attention against the reference in float64: both sides of tile borders, all kinds of masks."""

import cupy
import ml_dtypes
import numpy as np
import pytest
from agreement import TOLERANCE, assert_close, device, poisoned, same_bits

from mlm_mpi.backend import registry
from mlm_mpi.backend.cuda.provider import KERNELS
from mlm_mpi.ops import attention, dropout
from mlm_mpi.ops.dropout import Draw
from mlm_mpi.rng import key_of

BF16 = np.dtype(ml_dtypes.bfloat16)
forward, backward = attention.forward.__wrapped__, attention.backward.__wrapped__

# B, H, T, S, D, causal, lengths: one position; ragged; several tiles; a cache; cross; rows of different lengths
CASES = {
    "one": (1, 1, 1, 1, 8, True, None),
    "ragged": (1, 2, 37, 37, 24, True, None),
    "tiles": (2, 1, 200, 200, 64, True, None),
    "wide": (1, 1, 150, 150, 128, True, None),
    "full": (1, 2, 130, 130, 64, False, None),
    "cache": (1, 2, 70, 201, 64, True, None),
    "cross": (1, 1, 140, 75, 128, False, None),
    "many keys": (1, 1, 20, 1100, 64, False, None),  # more than twice round a ring of tiles
    "many queries": (1, 1, 600, 20, 64, False, None),
    "many wide keys": (1, 1, 20, 600, 128, False, None),
    "many wide queries": (1, 1, 600, 20, 128, False, None),
    "lengths": (4, 1, 70, 150, 64, False, [150, 0, 1, 129]),
    "causal lengths": (3, 1, 150, 150, 64, True, [0, 130, 64]),
}


DRAW = Draw(0.3, key_of(1, "probabilities"), 5, 2**31 + 7)


def _drawn(rng, shape, dtype, scale=1.0):
    b, h, t, s, d = shape
    q, k, v = (rng.normal(0, scale, n) for n in ((b, t, h, d), (b, s, h, d), (b, s, h, d)))
    return q.astype(dtype), k.astype(dtype), v.astype(dtype), rng.normal(size=(b, t, h, d)).astype(dtype)


def _fused(q, k, v):
    """The three as strided device views (B, H, rows, D) of one fused buffer (B, rows, 3, H, D)."""
    b, _, h, d = q.shape
    rows = max(q.shape[1], k.shape[1])
    whole = np.full((b, rows, 3, h, d), np.nan, q.dtype)
    for i, part in enumerate((q, k, v)):
        whole[:, : part.shape[1], i] = part
    parts = device(whole).transpose(2, 0, 3, 1, 4)
    return [parts[i][:, :, : part.shape[1]] for i, part in enumerate((q, k, v))]


def _only(variant, monkeypatch):
    """Takes the other variants away."""
    chosen = registry.in_force()
    for name in ("attention.forward", "attention.backward"):
        kept = [pair for pair in chosen.candidates(name) if pair[1].variant == variant]
        if not kept:
            pytest.skip(f"not on {chosen.first.level}")
        monkeypatch.setitem(chosen._candidates, name, kept)


SERVED = [("hopper", BF16), ("mma", BF16), ("plain", np.dtype("f4")), ("plain", BF16)]


@pytest.fixture(params=SERVED, ids=lambda pair: f"{pair[0]}-{pair[1].name}")
def pair(request):
    return request.param


@pytest.fixture
def dtype(pair):
    return pair[1]


@pytest.fixture
def variant(pair, gpu, monkeypatch):
    """The only one that may run."""
    _only(pair[0], monkeypatch)
    return pair[0]


def _run(q, k, v, do, causal, lengths, draw=None, share=0):
    """o, lse, dq, dk, dv by the kernels, from and into strided views."""
    dq, dk, dv = _fused(*(np.full_like(x, np.nan) for x in (q, k, v)))
    q, k, v = _fused(q, k, v)
    lengths = None if lengths is None else device(np.array(lengths, "i4"))
    with poisoned():
        o, lse = attention.forward(q, k, v, causal, draw, lengths, share)
        attention.backward(device(do), q, k, v, o, lse, dq, dk, dv, causal, draw, lengths, share)
    assert not registry.fallbacks()
    return o, lse, dq, dk, dv


def _wanted(q, k, v, do, causal, lengths, draw=None, share=0):
    """The same in float64, in which it does not matter how positions are shared."""
    lengths = None if lengths is None else np.array(lengths, "i4")
    q, k, v, do = (x.astype("f8") for x in (q, k, v, do))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    exact, lse = forward(q, k, v, causal, draw, lengths)
    gradients = [np.full_like(x, np.nan) for x in (q, k, v)]
    backward(do, q, k, v, exact, lse, *gradients, causal, draw, lengths)
    return exact, lse, *gradients


def _gradient_close(found, wanted, do):
    """To rounding of differences of numbers of the size of do: the gradient of a lone key is exactly zero."""
    host, dtype = cupy.asnumpy(found).astype("f8"), found.dtype.name
    assert host.shape == wanted.shape
    scale = max(np.linalg.norm(wanted), np.linalg.norm(do.astype("f8")))
    assert np.linalg.norm(host - wanted) <= 2 * TOLERANCE[dtype] * scale


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float64(variant, dtype, name, rng):
    *shape, causal, lengths = CASES[name]
    _agrees(_drawn(rng, shape, dtype), dtype, causal, lengths)


@pytest.mark.parametrize("name", ["ragged", "wide", "cross", "causal lengths"])
def test_dropout(variant, dtype, name, rng):
    """The mask is that of the reference: a function of the element's index, wherever the element is computed."""
    if variant == "hopper":
        pytest.skip("handed on to the next variant")
    *shape, causal, lengths = CASES[name]
    _agrees(_drawn(rng, shape, dtype), dtype, causal, lengths, DRAW)


def test_heads_in_groups(variant, dtype, monkeypatch, rng):
    """Five heads by twos: the last group is smaller."""
    monkeypatch.setattr("mlm_mpi.backend.cuda.attention.L2_BYTES", 2 * 2 * 140 * 64 * dtype.itemsize)
    _agrees(_drawn(rng, (1, 5, 140, 140, 64), dtype), dtype, True, None)


@pytest.mark.parametrize("width", [1, 5, 100])
@pytest.mark.parametrize("dtype", [np.dtype("f4"), BF16], ids=str)
def test_any_width(gpu, dtype, width, monkeypatch, rng):
    _only("plain", monkeypatch)
    _agrees(_drawn(rng, (2, 3, 9, 11, width), dtype), dtype, True, None)


def _agrees(inputs, dtype, *how):
    found, wanted = _run(*inputs, *how), _wanted(*inputs, *how)
    seen = np.isfinite(wanted[1])
    lse = cupy.asnumpy(found[1])
    assert found[0].dtype == dtype and lse.dtype == np.float32
    assert np.allclose(lse[seen], wanted[1][seen], rtol=1e-5, atol=1e-5) and (lse[~seen] == -np.inf).all()
    assert_close(found[0], wanted[0], dtype)
    for got, exact in zip(found[2:], wanted[2:], strict=True):
        _gradient_close(got, exact, inputs[3])


def _groups(rng, b, groups, each, t, s, d, dtype):
    """do (B, T, H, D); q (B, G, g, T, D), k, v (B, G, S, D), seen in one array (B, S, G, g + 2, D)."""
    fused = rng.normal(size=(b, s, groups, each + 2, d)).astype(dtype)
    return rng.normal(size=(b, t, groups * each, d)).astype(dtype), fused


def _seen_in(fused, t):
    each, parts = fused.shape[3] - 2, fused.transpose(0, 2, 3, 1, 4)
    return parts[:, :, :each, fused.shape[1] - t :], parts[:, :, each], parts[:, :, each + 1]


# B, G, g, T, S, D, causal, lengths, first keys of a query at position p; tiles and parts of tiles that nobody sees
FIRST = {
    "groups": (1, 2, 2, 40, 40, 64, True, None, None),
    "window": (1, 1, 2, 150, 150, 64, True, None, lambda p: max(0, p - 20)),
    "documents": (2, 1, 2, 100, 170, 128, True, [170, 100], lambda p: max(p // 90 * 90, p - 70)),
    "blind": (1, 1, 1, 200, 200, 16, True, None, lambda p: p // 90 * 90 + 5),
    "both ways": (1, 1, 1, 40, 200, 64, False, None, lambda p: p - 100),
}


@pytest.mark.parametrize(("name", "draw"), [(name, DRAW if name == "documents" else None) for name in FIRST])
def test_groups_and_first_keys(variant, dtype, name, draw, rng):
    if variant == "hopper":
        pytest.skip("handed on to the next variant")
    _agrees_in_groups(rng, dtype, name, draw)


@pytest.mark.parametrize(
    ("name", "draw", "share"), [("window", DRAW, 72), ("documents", None, 24), ("blind", None, 80)]
)
def test_groups_and_first_keys_in_shares(gpu, name, draw, share, monkeypatch, rng):
    _only("plain", monkeypatch)
    _agrees_in_groups(rng, np.dtype("f4"), name, draw, share)


def _agrees_in_groups(rng, dtype, name, draw, share=0):
    *sizes, causal, lengths, first = FIRST[name]
    batch, *_, queries, keys, _ = sizes
    do, fused = _groups(rng, *sizes, dtype)
    lengths = None if lengths is None else np.array(lengths, "i4")
    starts = first and np.array([[first(p) for p in range(keys - queries, keys)]], "i4")
    if starts is not None and batch > 1:
        starts = np.concatenate([starts, *[np.minimum(starts, 3)] * (batch - 1)])
    results = []
    kernels = attention.forward, attention.backward
    for run, move, kind in ((kernels, device, dtype), ((forward, backward), np.asarray, np.dtype("f8"))):
        parts = _seen_in(move(fused.astype(kind)), queries)
        gradients = _seen_in(move(np.full(fused.shape, np.nan, kind)), queries)
        length, start = (x if x is None else move(x) for x in (lengths, starts))
        rest = (causal, draw, length, share, None, start)
        with poisoned():
            o, lse = run[0](*parts, *rest)
            run[1](move(do.astype(kind)), *parts, o, lse, *gradients, *rest)
        assert results or not registry.fallbacks()
        results.append((o, lse, *gradients))
    found, wanted = results
    seen, lse = np.isfinite(wanted[1]), cupy.asnumpy(found[1])
    assert np.allclose(lse[seen], wanted[1][seen], rtol=1e-5, atol=1e-5) and (lse[~seen] == -np.inf).all()
    assert_close(found[0], wanted[0], dtype)
    for got, exact in zip(found[2:], wanted[2:], strict=True):
        _gradient_close(got, exact, do)


def test_which_variants_know_groups_and_first_keys(gpu):
    contracts = {name: KERNELS.entries()[f"attention.forward/{name}"].contract for name in ("hopper", "mma", "plain")}
    q, k = (device(np.ones((2, heads, 96, 64), BF16)) for heads in (6, 2))
    grouped, first = device(np.ones((2, 2, 3, 96, 64), BF16)), device(np.zeros((2, 96), "i4"))

    def refused(*arguments, **named):
        return [contract(*arguments, **named) for contract in contracts.values()]

    assert refused(q, k, k) == refused(grouped, k, k) == ["queries in groups", "", ""]
    assert refused(q, q, q, starts=first) == refused(q, q, q, starts=first[:1]) == ["first visible keys", "", ""]
    assert refused(q, k[:, :1], k) == ["shapes differ"] * 3
    assert refused(q[:, :5], k, k) == refused(grouped[:, :1], k, k) == ["heads do not fall into groups"] * 3
    assert refused(q, q, q, starts=device(np.zeros((2, 90), "i4"))) == ["starts: shapes differ"] * 3
    assert refused(q, q, q, starts=first.astype("i8")) == ["starts: int64"] * 3


def _heads(x):
    return device(x).swapaxes(1, 2)


# case, positions in a share (more and fewer than a tile has), dropout
SHARED = [
    ("ragged", 24, DRAW), ("wide", 72, None), ("full", 24, None), ("full", 72, DRAW), ("cache", 72, None),
    ("causal lengths", 24, DRAW), ("causal lengths", 72, None),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.dtype("f4"), BF16], ids=str)
@pytest.mark.parametrize(("name", "share", "draw"), SHARED, ids=[f"{name} {share}" for name, share, _ in SHARED])
def test_positions_in_shares(gpu, dtype, name, share, draw, monkeypatch, rng):
    _only("plain", monkeypatch)
    *shape, causal, lengths = CASES[name]
    _agrees(_drawn(rng, shape, dtype), dtype, causal, lengths, draw, share)


def test_one_share_is_all(gpu, monkeypatch, rng):
    _only("plain", monkeypatch)
    inputs = _drawn(rng, (1, 2, 70, 70, 16), np.dtype("f4"))
    whole, found = (_run(*inputs, True, None, None, share) for share in (0, 70))
    assert all(same_bits(a, b) for a, b in zip(whole, found, strict=True))


def test_a_ring_has_the_sums_of_shares(gpu, monkeypatch, rng):
    """dq, dk, dv are those of pairs of shares, each pair by itself, added in ascending order of positions."""
    _only("plain", monkeypatch)
    share, shares = 72, 3
    length = share * shares
    q, k, v, do = _drawn(rng, (1, 1, length, length, 16), np.dtype("f4"))  # scaled by 1/4, which rounds nothing
    o, lse, dq, dk, dv = _run(q, k, v, do, True, None, None, share)
    parts = [slice(number * share, (number + 1) * share) for number in range(shares)]
    sums = [[np.zeros((share, 16), "f4") for _ in parts] for _ in "qkv"]
    for query, rows in enumerate(parts):
        for key in range(query + 1):
            keys = parts[key]
            arrays = [_heads(x[:, at]) for x, at in ((q, rows), (k, keys), (v, keys))]
            got = [device(np.full((1, 1, share, 16), np.nan, "f4")) for _ in "qkv"]
            attention.backward(
                device(do[:, rows]),
                *arrays,
                device(o.get()[:, rows]),
                device(lse.get()[:, :, rows]),
                *got,
                key == query,
            )
            for to, at, part in zip(sums, (query, key, key), got, strict=True):
                to[at] += part.get()[0, 0]
    for found, of in zip((dq, dk, dv), sums, strict=True):
        assert np.array_equal(found.get()[0, 0], np.concatenate(of))
    first = attention.forward(*(_heads(x[:, :share]) for x in (q, k, v)))
    assert np.array_equal(first[0].get(), o.get()[:, :share]) and np.array_equal(
        first[1].get(), lse.get()[:, :, :share]
    )
    assert not registry.fallbacks()


def test_a_share_of_keys_is_weighed_by_itself(gpu, monkeypatch):
    """256 weights of 2^-26 are lost one by one beside a weight of 1, and seen as the sum of a share."""
    _only("plain", monkeypatch)
    q, k, v = np.zeros((1, 1, 1, 16), "f4"), np.zeros((1, 512, 1, 16), "f4"), np.ones((1, 512, 1, 16), "f4")
    q[..., 0], k[0, 1:256, 0, 0], k[0, 256:, 0, 0] = 4.0, -1e4, -26 * np.log(2)
    whole, shared = (
        attention.forward(*map(_heads, (q, k, v)), False, None, None, share)[0].get() for share in (0, 256)
    )
    assert np.abs(shared - 1).max() < 2e-7 and whole.max() < 1 - 2e-6
    assert not registry.fallbacks()


def test_tensor_cores_have_no_shares_and_nobody_another_ring(gpu):
    contracts = {name: KERNELS.entries()[f"attention.forward/{name}"].contract for name in ("hopper", "mma", "plain")}
    q = device(np.ones((1, 1, 96, 64), BF16))
    refused = {name: contract(q, q, q, share=48) for name, contract in contracts.items()}
    assert refused == {"hopper": "positions in shares", "mma": "positions in shares", "plain": ""}
    for contract in contracts.values():
        assert contract(q, q, q, share=96) == contract(q, q, q, share=0, positions=(0, 0)) == ""
        assert "ring" in contract(q, q, q, share=96, positions=(96, 0))


@pytest.mark.parametrize("name", ["ragged", "wide"])
def test_dropout_of_a_cut(variant, dtype, name, rng):
    """Heads 1 and 2 of four, queries and keys of a cut batch: the mask of the whole where they lie."""
    if variant == "hopper":
        pytest.skip("handed on to the next variant")
    *_, queries, keys, width, causal, _ = CASES[name]
    strides = (4 * 200 * 256, 200 * 256, 256, 1)
    cut = DRAW._replace(start=strides[1] + 3 * 256 + 16, strides=strides)
    inputs = _drawn(rng, (2, 2, queries, keys, width), dtype)
    found = _run(*inputs, causal, None, cut)
    places = cut.start + sum(
        np.arange(n).reshape(-1, *[1] * (3 - i)) * strides[i] for i, n in enumerate((2, 2, queries, keys))
    )
    whole = dropout.mask.__wrapped__(DRAW, (int(places.max()) + 1,), 0, "f8")[places]
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        patched.setattr(attention, "_factors", lambda draw, shape, b, start, stop, *_: whole[b, :, start:stop])
        wanted = _wanted(*inputs, causal, None, DRAW)
    assert_close(found[0], wanted[0], dtype)
    for got, exact in zip(found[2:], wanted[2:], strict=True):
        _gradient_close(got, exact, inputs[3])


def test_extreme_scores(variant, dtype, rng):
    """Scores of ±100 and more: one key takes all, nothing overflows."""
    q, k, v, do = _drawn(rng, (1, 2, 70, 70, 64), dtype, scale=6.0)
    found, wanted = _run(q, k, v, do, False, None), _wanted(q, k, v, do, False, None)
    assert np.abs(wanted[1]).max() > 100
    # a score of 100 is known to 100 ulp, which is the relative error of its exponential
    factor = 16 if dtype.name == "float32" else 2
    assert_close(found[0], wanted[0], dtype, factor)
    assert np.allclose(cupy.asnumpy(found[1]), wanted[1], rtol=1e-5)
    for got, exact in zip(found[2:], wanted[2:], strict=True):
        assert_close(got, exact, dtype, factor)


def test_twice_gives_equal_bits(variant, dtype, rng):
    inputs = _drawn(rng, (2, 1, 150, 150, 64), dtype)
    runs = [[cupy.asnumpy(x).tobytes() for x in _run(*inputs, True, None)] for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_shows_what_is_not_finite_in_its_row_only(variant, dtype, bad, rng):
    q, k, v, do = _drawn(rng, (1, 1, 70, 70, 64), dtype)
    q[0, 33, 0, 5] = bad
    o, lse, dq, *_ = map(cupy.asnumpy, _run(q, k, v, do, True, None))
    for rows in (o[0, :, 0], dq[0, 0]):
        finite = np.isfinite(rows.astype("f4")).all(axis=1)
        assert not finite[33] and finite[:33].all() and finite[34:].all()
    assert not np.isfinite(lse[0, 0, 33]) and np.isfinite(np.delete(lse, 33)).all()


def test_hidden_keys_do_not_count(variant, dtype, rng):
    q, k, v, do = _drawn(rng, (2, 1, 70, 150, 64), dtype)
    lengths = [130, 20]
    before = [cupy.asnumpy(x).tobytes() for x in _run(q, k, v, do, False, lengths)]
    for b, length in enumerate(lengths):
        k[b, length:], v[b, length:] = 1000.0, -1000.0
    after = [cupy.asnumpy(x).tobytes() for x in _run(q, k, v, do, False, lengths)]
    assert before == after


PIECES = "rows are not in whole pieces of 16 bytes"


def test_what_does_not_fit_is_refused(gpu):
    from mlm_mpi.backend.cuda.attention import _fit, _fit_hopper, _fit_mma

    q = cupy.zeros((1, 2, 5, 16), np.float32)
    assert _fit(q, q, q) == ""
    assert _fit(q.get(), q, q) == "not in the GPU's memory"
    assert _fit(q[:, :, :, ::2], q[:, :, :, ::2], q[:, :, :, ::2]) == "not contiguous"
    assert _fit(q, q[:, :, :4], q[:, :, :4]) == "more queries than keys"
    assert _fit(q, q[..., :8], q[..., :8]) == "shapes differ"
    assert _fit(q, q, q, lengths=cupy.zeros(1, np.int64)) == "lengths: int64"
    assert _fit(q, q, q, lengths=cupy.zeros(2, np.int32)) == "lengths: shapes differ"
    assert _fit(*[cupy.zeros((1, 1, 2, 130), np.float32)] * 3) == "head width above 128"
    assert _fit(q.astype(np.float64), q, q) == "float64"
    assert _fit_mma(q, q, q) == "float32"
    tensor_cores = [cupy.zeros((1, 2, 5, 16), BF16)] * 3
    assert _fit_hopper(*tensor_cores) == "" and _fit_hopper(*tensor_cores, draw=DRAW) == "dropout"
    short = cupy.zeros((1, 2, 5, 24), BF16)
    assert _fit_mma(*[short[..., :12]] * 3) == PIECES
    assert _fit_mma(*[short[..., 4:12]] * 3) == PIECES


@pytest.mark.parametrize(
    ("capability", "names"),
    [((9, 0), ["hopper", "mma", "plain"]), ((10, 0), ["mma", "plain"]), ((7, 5), [])],
)
def test_variants_by_capability(gpu, monkeypatch, capability, names):
    monkeypatch.setattr(gpu, "capability", capability)
    candidates = registry.in_force().candidates("attention.forward")
    assert [kernel.variant for provider, kernel in candidates if provider.name == "CUDA"] == names
