"""The references in bfloat16: arithmetic in float32, results rounded once; on arrays of either module."""

import cupy
import ml_dtypes
import numpy as np
import pytest
from agreement import device

from mlm_mpi.ops import (
    crossentropy,
    dropout,
    embedding,
    gelu,
    gru,
    layernorm,
    linear,
    lstm,
    relu2,
    rmsnorm,
    rotary,
    swiglu,
)
from mlm_mpi.rng import key_of

BF16 = np.dtype(ml_dtypes.bfloat16)
DRAW = dropout.Draw(0.3, key_of(5, "test"), 7, 3)


def cases(rng):
    """name -> (function, arguments, positions of those written)"""
    x, dy, add = rng.normal(size=(3, 9, 40))
    gain, bias = rng.normal(size=(2, 40))
    statistics = np.stack([x.mean(axis=1), 1 / x.std(axis=1)]).astype("f4")
    sums = [np.ones(40, "f4") for _ in range(2)]
    targets, mask = rng.integers(0, 40, 9), rng.random(9) < 0.5
    inverse, x5, dy5 = (1 / np.sqrt((x**2).mean(axis=1))).astype("f4"), *rng.normal(size=(2, 2, 5, 2, 3, 8))
    turns, weight, dweight = rotary.tables(np.arange(5), 6, 10.0), rng.normal(size=(2, 8)), np.ones((2, 8), "f4")
    inverse5 = (1 / np.sqrt((x5**2).mean(axis=4))).astype("f4")
    gates, u, kept = rng.normal(size=(3, 4, 4, 6)), rng.normal(size=(6, 4, 6)), rng.normal(size=(3, 3, 4, 6))
    three, u3, starts = gates[:, :, :3].copy(), u[:, :3].copy(), np.array([[0, 0, 2, 2], [0] * 4, [0, 1, 1, 1]], "i4")
    return {
        "lstm.forward": (lstm.forward, [gates, u, starts, kept[0, :, 0], kept[1, :, 0]], (0,)),
        "lstm.backward": (lstm.backward, [kept[0], np.tanh(gates), kept[1], u, starts, 2], (1,)),
        "gru.forward": (gru.forward, [three, u3, kept[0, 0, 0], starts, kept[1, :, 0]], (0,)),
        "gru.backward": (gru.backward, [kept[0], np.tanh(three), kept[1], kept[2], u3, starts, 2], (1, 3)),
        "relu2.forward": (relu2.forward, [x], ()),
        "relu2.backward": (relu2.backward, [dy, x], ()),
        "swiglu.forward": (swiglu.forward, [x.reshape(9, 2, 20)], ()),
        "swiglu.backward": (swiglu.backward, [dy[:, :20], x.reshape(9, 2, 20)], ()),
        "rmsnorm.forward": (rmsnorm.forward, [x, gain, 1e-5], ()),
        "rmsnorm.backward": (rmsnorm.backward, [dy, x, gain, inverse, sums[0], True, add, 3], (4,)),
        "rotary.forward": (rotary.forward, [x5, *turns, weight, 1e-5], ()),
        "rotary.backward": (rotary.backward, [dy5, x5, *turns, weight, inverse5, dweight, True, 5, 2], (6,)),
        "crossentropy.capped": (crossentropy.capped, [x, 2.0], ()),
        "crossentropy.rows, capped": (crossentropy.rows, [x, targets, mask, True, 1, 2.0], (0,)),
        "gelu.forward": (gelu.forward, [x], ()),
        "gelu.backward": (gelu.backward, [dy, x], ()),
        "gelu.backward in place": (gelu.backward, [dy, x, np.zeros_like(x)], (2,)),
        "layernorm.forward": (layernorm.forward, [x, gain, bias, 1e-5], ()),
        "layernorm.backward": (layernorm.backward, [dy, x, gain, statistics, *sums, True, add], (4, 5)),
        "linear.bias_gradient": (linear.bias_gradient, [dy, sums[0], False], (1,)),
        "dropout.forward": (dropout.forward, [x, DRAW, add], ()),
        "embedding.backward": (embedding.backward, [dy, targets % 5, np.ones((5, 40), "f4")], (2,)),
        "crossentropy.rows": (crossentropy.rows, [x, targets, mask, True], (0,)),
    }


def call(case, convert):
    function, arguments, written = case
    arguments = [convert(a) if isinstance(a, np.ndarray) else a for a in arguments]
    result = function.__wrapped__(*arguments)
    results = result if isinstance(result, tuple) else () if result is None else (result,)
    return [*results, *(arguments[i] for i in written)]


def narrow(a):
    return a.astype(BF16) if a.dtype == np.float64 else a.copy()


def widened(a):
    return narrow(a).astype("f4") if a.dtype == np.float64 else a.copy()


NAMES = list(cases(np.random.default_rng(0)))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_float32_rounded_once(name, rng):
    case = cases(rng)[name]
    for found, exact in zip(call(case, narrow), call(case, widened), strict=True):
        # what was float32 in is float32 out, what was bfloat16 is bfloat16, losses are float64
        assert found.dtype == (exact.dtype if found.dtype != BF16 else BF16)
        assert np.array_equal(found, exact.astype(found.dtype))
    assert any(a.dtype == BF16 for a in call(case, narrow)) == (
        name not in ("linear.bias_gradient", "embedding.backward")
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "embedding.backward"])
def test_on_the_device_as_on_the_host(gpu, name, rng):
    case = cases(rng)[name]
    for found, exact in zip(call(case, lambda a: device(narrow(a))), call(case, narrow), strict=True):
        assert isinstance(found, cupy.ndarray) and found.dtype == exact.dtype
        assert np.allclose(found.get().astype("f8"), exact.astype("f8"), rtol=1e-2, atol=1e-6)
