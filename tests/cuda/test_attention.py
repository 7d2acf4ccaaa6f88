"""Every variant of flash attention against the reference in float64: both sides of tile borders, all kinds of masks."""

import cupy
import numpy as np
import pytest
from agreement import TOLERANCE, assert_close, device, poisoned

from mlm_mpi.backend import kernels
from mlm_mpi.ops import attention

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
    "lengths": (4, 1, 70, 150, 64, False, [150, 0, 1, 129]),
    "causal lengths": (3, 1, 150, 150, 64, True, [0, 130, 64]),
}


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
    """Takes the variants before this one away."""
    chosen = kernels.selection()
    for name in ("attention.forward", "attention.backward"):
        known = chosen.candidates(name)
        kept = [entry for entry in known if entry.variant == variant] or known
        monkeypatch.setitem(chosen._candidates, name, kept)


VARIANTS = ["mma", "plain"]


@pytest.fixture(params=VARIANTS)
def variant(request, gpu, dtype, monkeypatch):
    if request.param != "plain" and dtype.name != "bfloat16":
        pytest.skip("for bfloat16")
    _only(request.param, monkeypatch)
    return request.param


def _run(q, k, v, do, causal, lengths):
    """o, lse, dq, dk, dv by the kernels, from and into strided views."""
    dq, dk, dv = _fused(*(np.full_like(x, np.nan) for x in (q, k, v)))
    q, k, v = _fused(q, k, v)
    lengths = None if lengths is None else device(np.array(lengths, "i4"))
    with poisoned():
        o, lse = attention.forward(q, k, v, causal, lengths=lengths)
        attention.backward(device(do), q, k, v, o, lse, dq, dk, dv, causal, lengths=lengths)
    assert not kernels.fallbacks()
    return o, lse, dq, dk, dv


def _wanted(q, k, v, do, causal, lengths, o=None):
    """The same in float64; gradients with the o that the kernels rounded."""
    lengths = None if lengths is None else np.array(lengths, "i4")
    q, k, v, do = (x.astype("f8") for x in (q, k, v, do))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    exact, lse = forward(q, k, v, causal, lengths=lengths)
    gradients = [np.full_like(x, np.nan) for x in (q, k, v)]
    backward(do, q, k, v, exact, lse, *gradients, causal, lengths=lengths)
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
    inputs = _drawn(rng, shape, dtype)
    found, wanted = _run(*inputs, causal, lengths), _wanted(*inputs, causal, lengths)
    seen = np.isfinite(wanted[1])
    lse = cupy.asnumpy(found[1])
    assert found[0].dtype == dtype and lse.dtype == np.float32
    assert np.allclose(lse[seen], wanted[1][seen], rtol=1e-5, atol=1e-5) and (lse[~seen] == -np.inf).all()
    assert_close(found[0], wanted[0], dtype)
    for got, exact in zip(found[2:], wanted[2:], strict=True):
        _gradient_close(got, exact, inputs[3])
