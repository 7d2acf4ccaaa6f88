"""Every hand-written kernel against its reference in float64, over the registry: an entry without a case fails.

A case draws arguments of a ragged size; `outputs` are the arrays a call returns or changes. The seed is fixed, so
that a submission is not refused by a draw; MLM_MPI_TEST_SEED=fresh (`make test-all`) draws anew.
"""

import ctypes
import itertools
import math
import os
import platform
import secrets
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numerics import in_a_tree, same_bits, strided

from mlm_mpi.backend import choice, registry, sums
from mlm_mpi.backend.arrays import BFLOAT16
from mlm_mpi.backend.cpu import elementwise, library
from mlm_mpi.backend.cpu import matmul as products
from mlm_mpi.backend.cpu.provider import KERNELS
from mlm_mpi.comm import tree
from mlm_mpi.errors import ConfigError
from mlm_mpi.ops import (
    attention,
    cast,
    crossentropy,
    dropout,
    embedding,
    gelu,
    gru,
    layernorm,
    linear,
    lstm,
    matmul,
    polar,
    relu2,
    rmsnorm,
    rotary,
    swiglu,
)
from mlm_mpi.ops.dropout import Draw
from mlm_mpi.optim import adamw
from mlm_mpi.params import clip
from mlm_mpi.rng import key_of, words

MODULES = (
    matmul, linear, gelu, relu2, swiglu, layernorm, rmsnorm, rotary, dropout, attention, lstm, gru, embedding,
    crossentropy, cast, sums, adamw, clip, polar,
)  # fmt: skip
WISH = os.environ.get("MLM_MPI_TEST_SEED", "20261123")
SEED = secrets.randbits(32) if WISH == "fresh" else int(WISH)
RANDOM = np.random.default_rng(SEED)  # begun anew for each test: what it draws depends on no other
NAN = np.nan

AVAILABLE = [
    level for level in library.LEVELS if choice.select().first.library and library.runs(level)
]  # fmt: skip
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=f"no kernels: {registry.in_force().first.lacks}")


@pytest.fixture(autouse=True)
def _draws_of_its_own(request: pytest.FixtureRequest) -> None:
    seeds = [SEED, zlib.crc32(request.node.name.encode())]
    RANDOM.bit_generator.state = np.random.default_rng(seeds).bit_generator.state


Case = tuple[tuple[Any, ...], tuple[int, ...]]  # arguments, positions of those that are written


def _f(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * RANDOM.standard_normal(shape)).astype("f4")


def _nan(*shape: int) -> np.ndarray:
    return np.full(shape, NAN, "f4")


def _draw(rate: float = 0.3) -> Draw:
    return Draw(rate, key_of(SEED, "test"), 7, 3)


def _cut_draw(shape: tuple[int, ...]) -> Draw:
    """The draw of the middle of a greater array, cut along every dim."""
    return _draw().cut(tuple(3 * n for n in shape), shape)


def _few(n: int) -> int:
    """Pieces into which n rows fall: the least number above 1."""
    return next((pieces for pieces in range(2, n) if n % pieces == 0), n)


def _matmul(
    accumulate: bool, left: bool, right: bool, depth: int, shares: int = 1, segments: int = 1
) -> Callable[[tuple[int, int]], Case]:
    """`left`, `right`: that operand is the transpose of what lies in memory."""

    def make(size: tuple[int, int]) -> Case:
        n, c = size
        a, b = _f(depth, n).T if left else _f(n, depth), _f(c, depth).T if right else _f(depth, c)
        return (a, b, _f(n, c) if accumulate else _nan(n, c), accumulate, shares, segments), (2,)

    return make


def _linear(residual: bool, depth: int = 9, shares: int = 1, bias: bool = True) -> Callable[[tuple[int, int]], Case]:
    def make(size: tuple[int, int]) -> Case:
        n, c = size
        return (_f(n, depth), _f(depth, c), _f(c) if bias else None, _f(n, c) if residual else None, shares), ()

    return make


def _layernorm_backward(
    accumulate: bool, add: bool, cut: Callable[[int], int] = lambda n: 1
) -> Callable[[tuple[int, int]], Case]:
    def make(size: tuple[int, int]) -> Case:
        n, c = size
        x = _f(n, c) + 2
        statistics = np.stack([x.mean(axis=1), 1 / np.sqrt(x.var(axis=1) + 0.1)]).astype("f4")
        fill = _f if accumulate else _nan
        dx = (_f(n, c), x, _f(c), statistics, fill(c), fill(c), accumulate, _f(n, c) if add else None, cut(n))
        return dx, (4, 5)

    return make


def _rmsnorm_backward(
    accumulate: bool, add: bool, cut: Callable[[int], int] = lambda n: 1
) -> Callable[[tuple[int, int]], Case]:
    def make(size: tuple[int, int]) -> Case:
        n, c = size
        x, dgain = _f(n, c) + 2, _f(c) if accumulate else _nan(c)
        inverse = (1 / np.sqrt((x**2).mean(axis=1) + 0.1)).astype("f4")
        return (_f(n, c), x, _f(c), inverse, dgain, accumulate, _f(n, c) if add else None, cut(n)), (4,)

    return make


def _heads(size: tuple[int, int], part: int, groups: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries and keys beside values in one array, cos and sin of a rotation of 1/part of a head."""
    t, d = min(size[0], 33), 2 * min(size[1], 70)
    half = max(1, d // part // 2)
    cos, sin = rotary.tables(np.arange(t), 2 * half, 100.0)
    return _f(2, t, groups, 4, d)[:, :, :, :3], cos, sin


def _rotary(normal: bool, part: int) -> Callable[[tuple[int, int]], Case]:
    def make(size: tuple[int, int]) -> Case:
        x, cos, sin = _heads(size, part)
        return (x, cos, sin, *((_f(2, x.shape[4]), 0.1) if normal else ())), ()

    return make


def _rotary_backward(
    accumulate: bool, part: int, cut: Callable[[int], int] = lambda n: 1, shares: int = 1, fresh: bool = True
) -> Callable[[tuple[int, int]], Case]:
    def make(size: tuple[int, int]) -> Case:
        dy, cos, sin = _heads(size, part, 4)
        x, gain = _f(*dy.shape), _f(2, dy.shape[4])
        inverse = (1 / np.sqrt((x**2).mean(axis=4) + 0.1)).astype("f4")
        dgain, out = (_f if accumulate else _nan)(*gain.shape), None if fresh else _nan(*dy.shape)
        pieces = cut(2 * x.shape[1])
        return (dy, x, cos, sin, gain, inverse, dgain, accumulate, pieces, shares, out), (6,) if fresh else (6, 10)

    return make


def _turned_back(size: tuple[int, int]) -> Case:
    dy, cos, sin = _heads(size, 1)
    return (dy, None, cos, sin), ()


def _bias_gradient(accumulate: bool, cut: Callable[[int], int]) -> Callable[[tuple[int, int]], Case]:
    def make(size: tuple[int, int]) -> Case:
        return (_f(*size), _f(size[1]) if accumulate else _nan(size[1]), accumulate, cut(size[0])), (1,)

    return make


def _dropout(residual: bool, cut: bool) -> Callable[[tuple[int, int]], Case]:
    def make(size: tuple[int, int]) -> Case:
        shape = (2, *size) if cut else size
        return (_f(*shape), _cut_draw(shape) if cut else _draw(), _f(*shape) if residual else None), ()

    return make


Share = Callable[[int], int]  # number of positions -> those of a share


def _whole(t: int) -> int:
    return 0


def _third(t: int) -> int:
    return -(-t // 3)


def _attention(
    causal: bool, draw: Draw | None, past: int, share: Share = _whole, positions: tuple[int, int] | None = None
) -> Callable[[tuple[int, int]], Case]:
    def make(size: tuple[int, int]) -> Case:
        (t, d), heads = size, 3
        qkv = _f(2, t + past, 3, heads, d).transpose(2, 0, 3, 1, 4)
        return (qkv[0][:, :, past:], qkv[1], qkv[2], causal, draw, None, share(t), positions), ()

    return make


def _attention_backward(
    causal: bool, draw: Draw | None, share: Share = _whole, positions: tuple[int, int] | None = None
) -> Callable[[tuple[int, int]], Case]:
    def make(size: tuple[int, int]) -> Case:
        (t, d), heads = size, 2
        rest = (causal, draw, None, share(t), positions)
        q, k, v = _f(2, t, 3, heads, d).transpose(2, 0, 3, 1, 4)
        o, lse = (a.astype("f4") for a in attention.forward.__wrapped__(*(x.astype("f8") for x in (q, k, v)), *rest))
        out = _nan(2, t, 3, heads, d).transpose(2, 0, 3, 1, 4)
        return (_f(2, t, heads, d), q, k, v, o, lse, *out, *rest), (6, 7, 8)

    return make


def _grouped(t: int, s: int, d: int, groups: int = 2, each: int = 3) -> tuple[np.ndarray, ...]:
    """do (B, T, H, D); q (B, G, g, T, D), k and v (B, G, S, D), seen in one array (B, S, G, g + 2, D)."""
    fused = _f(2, s, groups, each + 2, d).transpose(0, 2, 3, 1, 4)
    return _f(2, t, groups * each, d), fused[:, :, :each, s - t :], fused[:, :, each], fused[:, :, each + 1]


def _windows(positions: range, share: int) -> np.ndarray:
    """First keys of a window, the same for every row of the batch."""
    return np.array([[max(0, p - share) for p in positions]], "i4")


def _documents(positions: range, share: int) -> np.ndarray:
    """First keys of a window and of documents of random lengths, about one in a share."""
    begins = np.where(RANDOM.random((2, len(positions))) < 1 / share, np.array(positions), 0)
    return np.maximum(np.maximum.accumulate(begins, axis=1), _windows(positions, 2 * share)).astype("i4")


First = Callable[[range, int], np.ndarray]  # positions of queries, those of a share -> first keys


def _attention_of_groups(
    causal: bool, draw: Draw | None, past: int, first: First, share: Share = _whole,
    positions: tuple[int, int] | None = None,
) -> Callable[[tuple[int, int]], Case]:  # fmt: skip
    def make(size: tuple[int, int]) -> Case:
        t, d = size
        _, q, k, v = _grouped(t, t + past, d)
        query = past if positions is None else positions[0]
        return (q, k, v, causal, draw, None, share(t), positions, first(range(query, query + t), _third(t))), ()

    return make


def _attention_backward_of_groups(
    causal: bool, draw: Draw | None, first: First, share: Share = _whole, each: int = 3
) -> Callable[[tuple[int, int]], Case]:
    def make(size: tuple[int, int]) -> Case:
        t, d = size
        rest = (causal, draw, None, share(t), None, first(range(t), _third(t)))
        do, q, k, v = _grouped(t, t, d, each=each)
        o, lse = (a.astype("f4") for a in attention.forward.__wrapped__(*(x.astype("f8") for x in (q, k, v)), *rest))
        _, *out = (np.full_like(x, NAN) for x in _grouped(t, t, d, each=each))
        return (do, q, k, v, o, lse, *out, *rest), (6, 7, 8)

    return make


def _partial(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """What `attention.partial` returns; the first query has seen no key."""
    (t, d), heads = size, 2
    o, statistics = _f(2, t, heads, d), np.stack([_f(2, heads, t), 1 + np.abs(_f(2, heads, t))])
    o[:, 0], statistics[0, :, :, 0], statistics[1, :, :, 0] = 0, -np.inf, 0
    return o, statistics


def _polar(polynomials: int) -> Callable[[tuple[int, int]], Case]:
    def make(size: tuple[int, int]) -> Case:
        x = _f(2, *size)
        x /= 1.1 * np.linalg.norm(x, axis=(1, 2), keepdims=True)
        return (x, [(1.5, -0.6, 0.1), (2.0, -1.5, 0.5), (1.25, -0.5, 0.25)][:polynomials]), (0,)

    return make


def _finish(size: tuple[int, int]) -> Case:
    o, statistics = _partial(size)
    statistics[0, :, :, 0], statistics[1, :, :, 0] = 0, 2  # the test wants finite results
    return (o, statistics), (0,)


def _merge(size: tuple[int, int]) -> Case:
    (o, statistics), (other, others) = _partial(size), _partial(size)
    others[0, :, :, 0], others[1, :, :, 0] = 1, 3
    return (o, statistics, other, others), (0, 1)


def _rows(
    masked: bool, gradient: bool, scale: float, shares: int = 1, cap: float = 0.0
) -> Callable[[tuple[int, int]], Case]:
    def make(size: tuple[int, int]) -> Case:
        n, c = size[0], shares * size[1]
        mask = RANDOM.random(n) < 0.7 if masked else None
        targets = RANDOM.integers(0, c, n).astype("i4")
        return (_f(n, c, scale=scale), targets, mask, gradient, shares, cap), (0,) if gradient else ()

    return make


def _exponentials(shares: int) -> Callable[[tuple[int, int]], Case]:
    def make(size: tuple[int, int]) -> Case:
        logits = _f(size[0], shares * size[1])
        return (logits, logits.max(axis=1) + 0.5, shares), (0,)

    return make


def _losses(size: tuple[int, int]) -> Case:
    n = size[0] * size[1]
    return (1 + np.abs(_f(n)), _f(n), _f(n)), ()


def _softmax_gradient(size: tuple[int, int]) -> Case:
    n, c = size
    targets = RANDOM.integers(-1, c, n).astype("i4")
    return (np.abs(_f(n, c)), 1 + np.abs(_f(n)), targets), (0,)


def _capped(scale: float) -> Callable[[tuple[int, int]], Case]:
    return lambda size: ((_f(*size, scale=scale), 3.0), ())


def _capped_gradient(size: tuple[int, int]) -> Case:
    (exponentials, totals, targets), written = _softmax_gradient(size)
    return (exponentials, totals, targets, 3 * np.tanh(_f(*size)), 3.0), written


def _sums(*merges: int) -> Callable[[tuple[int, int]], Case]:
    def make(size: tuple[int, int]) -> Case:
        n = size[0] * size[1]
        return (_f(len(merges), n), merges, _nan(n)), (2,)

    return make


def _adamw(size: tuple[int, int]) -> Case:
    n = size[0] * size[1]
    numbers = (0.7, 0.9, 0.95, 1.3, 1e-8, 1e-3, 0.999)
    return (_f(n), _f(n), _f(n, scale=0.1), np.abs(_f(n)), *numbers), (0, 2, 3)


def _adamw_with_copy(size: tuple[int, int]) -> Case:
    arguments, written = _adamw(size)
    return (*arguments, _nan(arguments[0].size).astype(BFLOAT16)), (*written, 11)


def _through_time(size: tuple[int, int]) -> tuple[int, int, int]:
    """(B, T, C): more rows than a tile has, few positions."""
    return min(size[0], 14), 1 + size[0] % 5 + (size[0] == 1), min(size[1], 104)


def _begun(batch: int, length: int) -> np.ndarray:
    """First positions of documents of random lengths."""
    begins = np.where(RANDOM.random((batch, length)) < 0.3, np.arange(length), 0)
    return np.maximum.accumulate(begins, axis=1).astype("i4")


def _recurrent(gates: int, starts: bool, state: bool) -> Callable[[tuple[int, int]], Case]:
    """LSTM (4 gates) or GRU (3)."""

    def make(size: tuple[int, int]) -> Case:
        batch, length, c = _through_time(size)
        given = _f(batch, length, gates, c), _f(c, gates, c, scale=c**-0.5), *([] if gates == 4 else [_f(c)])
        first = [_f(batch, c) if state else None for _ in range(gates - 2)]
        return (*given, _begun(batch, length) if starts else None, *first), (0,)

    return make


def _recurrent_backward(gates: int, starts: bool, shares: int = 1) -> Callable[[tuple[int, int]], Case]:
    def make(size: tuple[int, int]) -> Case:
        batch, length, c = _through_time(size)
        c = c if c % shares == 0 else 8 * -(-c // 8)
        opened = np.tanh(_f(batch, length, gates, c))
        opened[:, :, [0, 1] if gates == 3 else [0, 1, 3]] *= 0.4
        opened[:, :, [0, 1] if gates == 3 else [0, 1, 3]] += 0.5
        kept = [_f(batch, length, c) for _ in range(5 - gates)]
        rest = _f(c, gates, c, scale=c**-0.5), _begun(batch, length) if starts else None, shares
        return (_f(batch, length, c), opened, *kept, *rest), (1,) if gates == 4 else (1, 3)

    return make


def _opened(rows: int, gates: int, width: int) -> np.ndarray:
    """Gates behind their functions: between 0 and 1, or -1 and 1."""
    opened = np.tanh(_f(rows, gates, width))
    opened[:, [0, 1] if gates == 3 else [0, 1, 3]] *= 0.4
    opened[:, [0, 1] if gates == 3 else [0, 1, 3]] += 0.5
    return opened


def _lstm_step_backward(size: tuple[int, int]) -> Case:
    return (_f(*size), _f(*size), _f(*size), _f(*size), _opened(size[0], 4, size[1]), _f(*size)), (4, 5)


def _gru_step_backward(size: tuple[int, int]) -> Case:
    return (_f(*size), _f(*size), _opened(size[0], 3, size[1]), _f(*size), _f(*size)), (2, 3, 4)


# name -> makers of arguments; relative tolerance of the case in units of float32's epsilon, of the largest element
CASES: dict[str, tuple[list[Callable[[tuple[int, int]], Case]], float]] = {
    "matmul.add": (
        [_matmul(*three, 7) for three in itertools.product((False, True), repeat=3)]
        + [_matmul(True, False, False, 1), _matmul(False, True, True, 401)]
        + [_matmul(False, False, True, 42, 2, 3), _matmul(True, False, False, 400, 4)],
        32,  # of sums of 400 terms that may cancel; the bits themselves have tests of their own
    ),
    "linear.forward": (
        [_linear(False), _linear(True), _linear(True, bias=False), _linear(True, 24, 8, False)]
        + [_linear(True, 392, 8)],
        4,
    ),
    "linear.bias_gradient": (
        [_bias_gradient(a, cut) for a in (False, True) for cut in (lambda n: 1, _few, lambda n: n)],
        16,
    ),
    "gelu.forward": ([lambda s: ((_f(*s, scale=3),), ())], 4),
    "gelu.backward": ([lambda s: ((_f(*s), _f(*s, scale=3)), ()), lambda s: ((_f(*s), _f(*s), _nan(*s)), (2,))], 20),
    "relu2.forward": ([lambda s: ((_f(*s),), ())], 2),
    "relu2.backward": ([lambda s: ((_f(*s), _f(*s)), ()), lambda s: ((_f(*s), _f(*s), _nan(*s)), (2,))], 2),
    "swiglu.forward": ([lambda s: ((_f(s[0], 2, s[1], scale=3),), ())], 4),
    "swiglu.backward": (
        [
            lambda s: ((_f(*s), _f(s[0], 2, s[1], scale=3)), ()),
            lambda s: ((_f(*s), _f(s[0], 2, s[1]), _nan(s[0], 2, s[1])), (2,)),
        ],
        8,
    ),
    "rmsnorm.forward": ([lambda s: ((_f(*s) + 3, _f(s[1]), 1e-5), ())], 8),
    "rmsnorm.backward": (
        [_rmsnorm_backward(a, b) for a in (False, True) for b in (False, True)]
        + [_rmsnorm_backward(True, False, _few), _rmsnorm_backward(False, True, lambda n: n)],
        64,
    ),
    "rotary.forward": ([_rotary(normal, part) for normal in (False, True) for part in (1, 3)], 8),
    "rotary.backward": (
        [_turned_back, _rotary_backward(False, 1), _rotary_backward(True, 3, _few, 4, False)]
        + [_rotary_backward(True, 1, lambda n: n, 2)],
        64,
    ),
    "layernorm.forward": ([lambda s: ((_f(*s) + 3, _f(s[1]), _f(s[1]), 1e-5), ())], 32),
    "layernorm.backward": (
        [_layernorm_backward(a, b) for a in (False, True) for b in (False, True)]
        + [_layernorm_backward(True, False, _few), _layernorm_backward(False, True, lambda n: n)],
        64,
    ),
    "dropout.mask": (
        [lambda s: ((_draw(), s, 13, "f4"), ()), lambda s: ((_draw(), s, 2**34 - 5, "f4"), ())]
        + [lambda s: ((_cut_draw((2, *s)), (2, *s), 5, "f4"), ())],
        1,
    ),
    "dropout.forward": ([_dropout(r, cut) for r in (False, True) for cut in (False, True)], 2),
    "attention.forward": (
        [_attention(c, d, p) for c in (True, False) for d in (None, _draw()) for p in (0, 5)]
        + [_attention(c, d, p, _third) for c in (True, False) for d, p in ((None, 0), (_draw(), 5))]
        + [_attention(True, _draw()._replace(start=7, strides=(9999, 3333, 500, 1)), 2, lambda t: 6, (9, 4))]
        + [_attention_of_groups(True, _draw(), 5, _documents, _third), _attention_of_groups(False, None, 0, _windows)]
        + [_attention_of_groups(True, None, 2, _documents, lambda t: 6, (5, 4))],
        64,
    ),
    "attention.partial": (
        [_attention(c, d, 5, _third, (6, 4)) for c in (True, False) for d in (None, _draw())]
        + [_attention_of_groups(True, _draw(), 5, _windows, _third, (6, 4))],
        64,
    ),
    "attention.merge": ([_merge], 8),
    "attention.finish": ([_finish], 4),
    "attention.backward": (
        [_attention_backward(c, d) for c in (True, False) for d in (None, _draw())]
        + [_attention_backward(c, d, _third) for c in (True, False) for d in (None, _draw())]
        + [_attention_backward(True, None, lambda t: 6, (2, 4))]
        + [_attention_backward_of_groups(True, _draw(), _documents, _third)]
        + [_attention_backward_of_groups(False, None, _documents, each=1)]
        + [_attention_backward_of_groups(True, None, _windows, lambda t: 6)],
        64,
    ),
    "lstm.forward": ([_recurrent(4, *two) for two in itertools.product((False, True), repeat=2)], 16),
    "lstm.backward": ([_recurrent_backward(4, False), _recurrent_backward(4, True, 8)], 16),
    "gru.forward": ([_recurrent(3, *two) for two in itertools.product((False, True), repeat=2)], 16),
    "gru.backward": ([_recurrent_backward(3, False), _recurrent_backward(3, True, 8)], 16),
    "lstm.step": ([lambda s: ((_f(s[0], 4, s[1]), _f(s[0], 4, s[1]), _f(*s)), (0,))], 16),
    "lstm.step_backward": ([_lstm_step_backward], 16),
    "gru.step": ([lambda s: ((_f(s[0], 3, s[1]), _f(s[0], 3, s[1]), _f(s[1]), _f(*s)), (0,))], 16),
    "gru.step_backward": ([_gru_step_backward], 16),
    "embedding.forward": ([lambda s: ((RANDOM.integers(0, 9, s[0]).astype("i4"), _f(9, s[1])), ())], 0),
    "embedding.backward": (
        [lambda s: ((_f(*s), RANDOM.integers(0, 9, s[0]).astype("i4"), _f(9, s[1])), (2,))],
        64,
    ),
    "crossentropy.rows": (
        [_rows(m, g, scale) for m in (False, True) for g in (False, True) for scale in (1.0, 1e4)]
        + [_rows(True, True, 1.0, 8)]
        + [_rows(True, False, 4.0, 1, 5.0), _rows(True, True, 4.0, 8, 5.0), _rows(False, True, 1e4, 1, 5.0)],
        16,
    ),
    "crossentropy.capped": ([_capped(scale) for scale in (0.1, 3.0, 1e4)], 4),
    "crossentropy.exponentials": ([_exponentials(1), _exponentials(8)], 16),
    "crossentropy.losses": ([_losses], 4),
    "crossentropy.gradient": ([_softmax_gradient, _capped_gradient], 4),
    "cast.to": ([lambda s: ((_f(*s), _nan(*s).astype(BFLOAT16)), (1,))], 0),
    "sums.tree": ([_sums(0), _sums(0, 1), _sums(0, 1, 0, 2, 0, 1, 0, 3, 0, 1, 2)], 4),
    "adamw.update": ([_adamw], 4),
    "clip.squares": (
        [
            lambda s: ((_f(s[0] * s[1]), 100), ()), lambda s: ((_f(s[0] * s[1]), 1 << 20), ()),
            lambda s: ((_f(s[0], 3, s[1])[:, 1], 100), ()),  # a share: rows that are not neighbours
        ],
        0,
    ),
    "polar.iterate": ([_polar(1), _polar(2), _polar(3)], 64),
}  # fmt: skip

# name -> positions of the arguments whose elements may be bf16 instead
ELEMENTS = {
    "matmul.add": (0, 1),
    "linear.forward": (0, 1, 2, 3),
    "linear.bias_gradient": (0,),
    "gelu.forward": (0,),
    "gelu.backward": (0, 1, 2),
    "relu2.forward": (0,),
    "relu2.backward": (0, 1, 2),
    "swiglu.forward": (0,),
    "swiglu.backward": (0, 1, 2),
    "layernorm.forward": (0, 1, 2),
    "layernorm.backward": (0, 1, 2, 7),
    "rmsnorm.forward": (0, 1),
    "rmsnorm.backward": (0, 1, 2, 6),
    "rotary.forward": (0, 3),
    "rotary.backward": (0, 1, 4, 10),
    "dropout.mask": (3,),
    "dropout.forward": (0, 2),
    "attention.forward": (0, 1, 2),
    "attention.partial": (0, 1, 2),
    "attention.backward": (0, 1, 2, 3, 4, 6, 7, 8),
    "lstm.forward": (0, 1, 3, 4),
    "lstm.backward": (0, 1, 2, 3),
    "gru.forward": (0, 1, 2, 4),
    "gru.backward": (0, 1, 2, 3, 4),
    "embedding.forward": (1,),
    "embedding.backward": (0,),
    "crossentropy.rows": (0,),
    "crossentropy.capped": (0,),
}


def _as_bf16(x: Any, seen: dict[int, np.ndarray]) -> Any:
    """Rounded, in memory that lies as it did; views of one array stay views of one (`seen`: its id -> its numbers)."""
    if not isinstance(x, np.ndarray):
        return BFLOAT16 if isinstance(x, str) else x
    root = x
    while isinstance(root.base, np.ndarray):
        root = root.base
    memory = seen.setdefault(id(root), root.ravel("K").astype(BFLOAT16).view("u2"))
    offset = (x.ctypes.data - root.ctypes.data) // 2
    return np.ndarray(x.shape, BFLOAT16, memory, offset, [stride // 2 for stride in x.strides])


def _in_bf16(
    make: Callable[[tuple[int, int]], Case], positions: tuple[int, ...]
) -> Callable[[tuple[int, int]], Case]:  # fmt: skip
    def rounded(size: tuple[int, int]) -> Case:
        arguments, written = make(size)
        seen: dict[int, np.ndarray] = {}
        return tuple(_as_bf16(x, seen) if i in positions else x for i, x in enumerate(arguments)), written

    return rounded


OF_BF16 = " of bf16"
CASES |= {
    name + OF_BF16: ([_in_bf16(make, positions) for make in CASES[name][0]], CASES[name][1])
    for name, positions in ELEMENTS.items()
}
CASES["matmul.add" + OF_BF16][0].extend(_in_bf16(make, (0, 1, 2)) for make in CASES["matmul.add"][0])
CASES["adamw.update" + OF_BF16] = ([_adamw_with_copy], 4)

# tails of every vector width, more than a tile of queries and of keys, more than a block of rows
SIZES = [(1, 1), (2, 3), (5, 8), (7, 17), (49, 33), (130, 64), (303, 5), (66, 384)]


def sizes_of(name: str) -> list[tuple[int, int]]:
    """The same text is compiled for bf16: half of the sizes show what its loads and stores do."""
    return SIZES[1::2] if name.endswith(OF_BF16) else SIZES


NAMES = sorted(CASES)
EPSILON = float(np.finfo("f4").eps)
ROUNDED = 2.0**-8  # what rounding to bf16 changes at most, relative to the number


# plain C is 4 to 10 times as slow as what this CPU has beside it: `make test-sanitize` and test-all run it
@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.slow) if name == "base" and len(AVAILABLE) > 1 else name
        for name in AVAILABLE
    ]
)
def level(request: pytest.FixtureRequest) -> Any:
    """Each dispatch level this CPU runs."""
    yield choice.select(request.param)
    choice.select()


def _copy(x: Any, shift: int | None = None) -> Any:
    """A copy in the same memory order and as contiguous; with `shift`, that many elements behind a 64-byte line."""
    if not isinstance(x, np.ndarray):
        return x
    if x.ndim and x.strides[-1] > x.itemsize and shift is None and x.base is not None and not x.T.flags.c_contiguous:
        return strided(x)
    order = sorted(range(x.ndim), key=lambda dim: -x.strides[dim])
    dense = x.transpose(order).copy("C")
    if shift is not None:
        raw = np.full(dense.nbytes + 256, 0xFF, np.uint8)
        start = -raw.ctypes.data % 64 + shift * x.itemsize
        moved = raw[start : start + dense.nbytes].view(dense.dtype).reshape(dense.shape)
        moved[...] = dense
        dense = moved
    return dense.transpose(np.argsort(order))


def _call(function: Callable[..., Any], case: Case, shift: int | None = None) -> list[np.ndarray]:
    arguments = [_copy(x, shift) for x in case[0]]
    result = function(*arguments)
    returned = result if isinstance(result, tuple) else (result,)
    return [*(x for x in returned if x is not None), *(arguments[i] for i in case[1])]


def _function(name: str) -> Any:
    op, direction = name.removesuffix(OF_BF16).split(".")
    module = next(m for m in MODULES if m.__name__.endswith(f".{op}"))
    return getattr(module, direction)


def _wide(case: Case) -> Case:
    def wide(x: Any) -> Any:
        if isinstance(x, np.ndarray):
            return x.astype("f8") if x.dtype in ("f4", BFLOAT16) else x
        return "f8" if isinstance(x, str | np.dtype) else x

    return tuple(map(wide, case[0])), case[1]


def test_every_entry_has_a_case_and_every_case_an_entry() -> None:
    assert {name.removesuffix(OF_BF16) for name in NAMES} == set(KERNELS)
    assert all(hasattr(_function(name), "__wrapped__") for name in NAMES), "the op is not decorated with @served"


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in NAMES for size in sizes_of(name)])
def test_against_the_reference_in_float64(name: str, size: tuple[int, int], level: registry.Choice) -> None:
    makers, units = CASES[name]
    for make in makers:
        case = make(size)
        level.fallen.clear()
        got = _call(_function(name), case)
        allowed = {(name.removesuffix(OF_BF16), products.ONE_ROW)} if size[0] == 1 else set()
        assert set(level.fallen) <= allowed, "the kernel did not run"
        expected = _call(_function(name).__wrapped__, _wide(case))
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape and np.isfinite(a).all(), "an element was not written"
            wrong = np.abs(a.astype("f8") - b) - (ROUNDED * np.abs(b) if a.dtype == BFLOAT16 else 0)
            error = wrong.max() / max(1.0, np.abs(b).max())
            assert error <= (units + 1e-3) * EPSILON, f"seed {SEED}: {error / EPSILON:.1f} epsilon"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(7, 17), (130, 33), (303, 5)])
def test_the_same_bits_twice_and_wherever_the_buffers_lie(name, size, level) -> None:  # type: ignore[no-untyped-def]
    for make in CASES[name][0]:
        case = make(size)
        level.fallen.clear()  # making a case runs references
        first = _call(_function(name), case, 0)
        for shift in (0, 1, 3, 7, 8, 13):
            again = _call(_function(name), case, shift)
            assert all(same_bits(a, b) for a, b in zip(first, again, strict=True)), f"shift {shift}"
    assert not level.fallen


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_contiguous_or_not_float32_falls_back_and_is_counted(name: str) -> None:
    chosen = choice.select()
    for change in (strided, lambda x: x.astype("f8")):
        for make in CASES[name][0]:
            case = make((7, 17))
            floats = ("f4", BFLOAT16)
            arguments = tuple(change(x) if isinstance(x, np.ndarray) and x.dtype in floats else x for x in case[0])
            if _function(name) is dropout.mask:
                arguments = (*case[0][:3], "f8")
            before = sum(chosen.fallen.values())
            got = _call(_function(name), (arguments, case[1]))
            assert sum(chosen.fallen.values()) > before, "ran a kernel"
            expected = _call(_function(name).__wrapped__, (arguments, case[1]))
            assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
    assert any(text.startswith(name.removesuffix(OF_BF16)) for text in registry.fallbacks())
    choice.select()


# ops whose every output row depends on its input row alone: (name, argument made bad, output looked at)
ROWS = [("gelu.forward", 0, 0), ("gelu.backward", 0, 0), ("gelu.backward", 1, 0), ("layernorm.forward", 0, 0),
        ("layernorm.backward", 0, 0), ("layernorm.backward", 1, 0), ("crossentropy.rows", 0, 0),
        ("dropout.forward", 0, 0), ("linear.forward", 0, 0), ("linear.forward", 3, 0),
        ("rmsnorm.forward", 0, 0), ("rmsnorm.backward", 0, 0), ("rmsnorm.backward", 1, 0), ("relu2.forward", 0, 0),
        ("relu2.backward", 0, 0), ("matmul.add", 0, 0)]  # fmt: skip


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c rounded once to float32: float64 rounded to odd (Boldo, Melquiond, 2008) is rounded again."""
    product = a.astype("f8") * b  # exact
    with np.errstate(invalid="ignore"):
        total = product + c
        back = total - product
        rest = (product - (total - back)) + (c - back)
    even = (total.view("i8") & 1) == 0
    odd = np.where(even & (rest != 0), np.nextafter(total, np.copysign(np.inf, rest)), total)
    return odd.astype("f4")


@pytest.mark.parametrize("size", [(7, 17), (96, 97), (97, 96), (289, 200), (200, 400)], ids=str)
def test_an_iteration_adds_in_the_order_of_its_products(size, level) -> None:  # type: ignore[no-untyped-def]
    """The kernel in one launch, and the reference, whose products are kernels too, give the same bits."""
    case = _polar(3)(size)
    level.fallen.clear()
    kernel, reference = _call(polar.iterate, case), _call(polar.iterate.__wrapped__, case)
    assert not level.fallen and same_bits(*kernel, *reference)


def test_matrices_are_shared_out_among_threads_and_keep_their_bits() -> None:
    case = (np.concatenate([_polar(2)((65, 40))[0][0] for _ in range(3)]), _polar(2)((1, 1))[0][1]), (0,)
    alone = _call(polar.iterate, case)
    for threads in (2, 3, 8):
        choice.select(threads=threads)
        assert same_bits(*_call(polar.iterate, case), *alone)
    choice.select()


Chain = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _chain(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    total = np.zeros((len(a), b.shape[1]), "f4")
    for x, y in zip(a.T, b, strict=True):
        total = _fused(x[:, None], y, total)
    return total


def _chain_at_base(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    total = np.zeros((len(a), b.shape[1]), "f4")
    for x, y in zip(a.T, b, strict=True):
        total = x[:, None] * y + total
    return total


def _chain_at(level: registry.Choice) -> Chain:
    return _chain if level.first.level != "base" or platform.machine() != "x86_64" else _chain_at_base


def _in_order(a: np.ndarray, b: np.ndarray, start: np.ndarray, chain: Chain) -> np.ndarray:
    """The product of one share in the order that kernels/cpu/product.h states."""
    for first in range(0, a.shape[1], 384):
        start = start + chain(a[:, first : first + 384], b[first : first + 384])
    return start


def _in_pairs(sums: list[Any]) -> Any:
    while len(sums) > 1:
        sums = [x + y for x, y in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


def _cut(a: np.ndarray, b: np.ndarray, parts: int, segments: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The operands that each of so many ranks holds, in arrays of its own."""
    k = np.arange(a.shape[1]).reshape(segments, parts, -1)
    return [(a[:, k[:, part].ravel()].copy(), b[k[:, part].ravel()].copy()) for part in range(parts)]


def _in_shares(a: np.ndarray, b: np.ndarray, shares: int, segments: int, chain: Chain) -> np.ndarray:
    """The product of several shares in the order that kernels/cpu/product.h states."""
    zero = np.zeros((len(a), b.shape[1]), "f4")
    return _in_pairs([_in_order(x, y, zero, chain) for x, y in _cut(a, b, shares, segments)])


# (M, N, K): few rows, one column, one step; rows and columns off every tile; more than a band, a strip, a depth
SHAPES = [(2, 1, 1), (2, 70, 400), (70, 1, 5), (6, 16, 384), (13, 33, 2), (101, 35, 385), (5, 2051, 3), (200, 18, 770)]
SHAPES += [(1, 1, 1), (1, 70, 400), (1, 2051, 3), (1, 151, 770)]


LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.T.copy().T,
    "gaps": strided,
    "reversed": lambda x: x[::-1].copy()[::-1],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS)
def test_products_have_the_bits_of_the_order_they_state(shape, lay, level) -> None:  # type: ignore[no-untyped-def]
    m, n, k = shape
    a, b, bias, base, chain = _f(m, k), _f(k, n), _f(n), _f(m, n), _chain_at(level)
    c, whole = base.copy(), _in_order(a, b, np.zeros((m, n), "f4"), chain)
    matmul.add(lay(a), lay(b), c, accumulate=True)
    assert same_bits(c, base + whole), "complete before it is added"
    assert same_bits(matmul.product(lay(a), lay(b)), whole)
    assert same_bits(linear.forward(lay(a), lay(b), bias), _in_order(a, b, 0 + np.tile(bias, (m, 1)), chain))
    assert same_bits(linear.forward(lay(a), lay(b), bias, base), _in_order(a, b, bias + base, chain))
    assert same_bits(linear.forward(lay(a), lay(b)), whole), "without a bias"
    assert same_bits(linear.forward(lay(a), lay(b), None, base), _in_order(a, b, base, chain))
    assert not level.fallen


# (M, N, steps of a share in a segment, shares, segments, layout): shares of one step, of an odd number, several in a
# depth, just more than half of one, a whole one, one and a half, three; waiting sums of every height
SHARED = [
    (7, 5, 1, 8, 1, "rows"), (2, 33, 3, 2, 3, "gaps"), (13, 17, 48, 8, 1, "columns"), (6, 16, 96, 4, 1, "rows"),
    (101, 35, 65, 2, 3, "rows"), (5, 16, 192, 8, 1, "reversed"), (6, 40, 193, 8, 1, "columns"),
    (3, 2, 32, 4, 3, "columns"), (14, 3, 128, 2, 3, "gaps"), (8, 9, 384, 4, 1, "columns"), (2, 70, 192, 4, 3, "rows"),
    (19, 31, 385, 8, 1, "rows"), (5, 2, 1024, 4, 1, "gaps"), (3, 1, 1, 64, 1, "rows"), (2, 1, 400, 16, 1, "rows"),
    (5, 2051, 200, 4, 1, "rows"), (7, 33, 401, 1, 3, "columns"),
    (1, 151, 193, 8, 1, "rows"), (1, 40, 401, 2, 3, "columns"), (1, 77, 65, 4, 3, "rows"), (1, 19, 48, 64, 1, "gaps"),
]  # fmt: skip


@pytest.mark.parametrize("case", SHARED)
def test_shares_have_the_bits_of_the_order_they_state(case, level) -> None:  # type: ignore[no-untyped-def]
    m, n, length, shares, segments, layout = case
    lay, k = LAYOUTS[layout], length * shares * segments
    a, b, bias, base = _f(m, k), _f(k, n), _f(n), _f(m, n)
    whole, c = _in_shares(a, b, shares, segments, _chain_at(level)), base.copy()
    assert same_bits(matmul.product(lay(a), lay(b), shares, segments), whole)
    matmul.add(lay(a), lay(b), c, True, shares, segments)
    assert same_bits(c, base + whole)
    assert same_bits(linear.backward_input(lay(a), lay(b.T), None, shares, segments), whole)
    if segments == 1 < shares:
        assert same_bits(linear.forward(lay(a), lay(b), bias, None, shares), bias + whole)
        assert same_bits(linear.forward(lay(a), lay(b), bias, base, shares), (bias + base) + whole)
    assert not level.fallen


def _ranks_give_the_bits_of_one(length: int, segments: int, ranks: int, dtype: Any = "f4") -> None:
    k = 8 * length * segments
    a, b, bias, base = (x.astype(dtype) for x in (_f(101, k), _f(k, 35), _f(35), _f(101, 35)))
    parts = [_nan(101, 35) for _ in range(ranks)]  # a rank's share of a sum is float32 whatever its operands are
    for part, (x, y) in zip(parts, _cut(a, b, ranks, segments), strict=True):
        matmul.add(x, y, part, False, 8 // ranks, segments)
    whole = _in_pairs(parts)
    assert same_bits(whole.astype(dtype), matmul.product(a, b, 8, segments))
    if segments == 1:
        start = bias.astype("f4") + base.astype("f4")
        assert same_bits((start + whole).astype(dtype), linear.forward(a, b, bias, base, 8))


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(("length", "segments"), [(5, 1), (48, 1), (193, 1), (400, 1), (7, 3), (64, 3), (192, 3)])
def test_ranks_with_cut_operands_give_the_bits_of_the_whole(length, segments, ranks, level) -> None:  # type: ignore[no-untyped-def]
    _ranks_give_the_bits_of_one(length, segments, ranks)
    assert not level.fallen


def test_rows_whose_sums_wait_do_so_in_herds_and_change_no_bit(level: registry.Choice) -> None:
    a, b, base = _f(975, 4 * 200), _f(4 * 200, 2090), _f(975, 2090)  # 960 rows of 2,048 columns wait at a time
    c, whole = base.copy(), matmul.product(a, b, 4)
    matmul.add(a, b, c, True, 4)
    assert same_bits(c, base + whole)
    for rows in (slice(0, 7), slice(950, 975)):
        assert same_bits(whole[rows], matmul.product(a[rows], b, 4))
    assert not level.fallen


def test_threads_share_a_product_and_change_no_bit() -> None:
    a, b, bias, base, got = _f(401, 800), _f(800, 70), _f(70), _f(401, 70), []
    long, high, start = _f(800, 3001), _f(3001), _f(1, 3001)  # of one row the columns are shared out
    try:
        for threads in (1, 2, 3, 8):
            chosen = choice.select(threads=threads)
            c = base.copy()
            matmul.add(a[::-1], b, c, True, 4)
            got.append([linear.forward(a, b, bias, base), linear.forward(a[::-1], b, bias)[::-1].copy(), c])
            got[-1] += [linear.forward(a, b, bias, base, 4), matmul.product(a[:97], b), matmul.product(a, b)]
            got[-1] += [linear.forward(a[:1], long, high, start, 4), matmul.product(a[:1], long.copy("F"))]
            assert not chosen.fallen
    finally:
        choice.select()
    assert all(same_bits(x, y) for each in got for x, y in zip(each, got[0], strict=True))
    assert same_bits(got[0][5][:97].copy(), got[0][4])


def _h(*shape: int, scale: float = 1.0) -> np.ndarray:
    return _f(*shape, scale=scale).astype(BFLOAT16)


def _chain_of_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """With pairs of k as VDPBF16PS adds them: the odd one first; what is subnormal is a zero, operand or result."""

    def flushed(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)

    def add(k: int, total: np.ndarray) -> np.ndarray:
        return flushed(_fused(a[:, k, None], b[k], total))

    a, b, total = flushed(a.astype("f4")), flushed(b.astype("f4")), np.zeros((len(a), b.shape[1]), "f4")
    for k in range(0, len(b), 2):
        if k + 1 < len(b):
            total = add(k + 1, total)
        total = add(k, total)
    return total


@pytest.fixture
def bf16(level: registry.Choice, monkeypatch: pytest.MonkeyPatch) -> registry.Choice:
    """bf16 products in the plain C of each dispatch level; the fixture `level` puts float32 back."""
    monkeypatch.setenv(library.BF16_VARIABLE, "portable")
    return choice.select(level.first.level, products="bf16")


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > 1])
@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("scale", [1.0, 2e-19])
def test_bf16_products_have_the_bits_of_the_instruction(shape, lay, scale, bf16) -> None:  # type: ignore[no-untyped-def]
    """`scale` 2e-19: products and sums about float32's smallest normal number."""
    m, n, k = shape
    a, b, bias, base = _h(m, k, scale=scale), _h(k, n, scale=scale / 4), _h(n, scale=scale**2), _h(m, n, scale=scale**2)
    start, zero = bias.astype("f4") + base.astype("f4"), np.zeros((m, n), "f4")
    got, whole = linear.forward(lay(a), lay(b), bias, base), _nan(m, n)
    assert same_bits(got, _in_order(a, b, start, _chain_of_pairs).astype(BFLOAT16))
    matmul.add(lay(a), lay(b), whole, False)
    assert same_bits(whole, _in_order(a, b, zero, _chain_of_pairs)), "a sum of float32 is not rounded"
    sum_of_base = (base.astype("f4") + whole).astype(BFLOAT16)
    matmul.add(lay(a), lay(b), base, True)
    assert same_bits(base, sum_of_base), "complete before it is added, and rounded once"
    if scale == 1:  # where nothing is flushed to zero
        exact = a.astype("f8") @ b.astype("f8")
        assert np.abs(whole - exact).max() <= 16 * EPSILON * np.abs(exact).max()
    assert not bf16.fallen and "bf16 products in plain C" in registry.summary()


def test_a_product_of_float32_is_not_rounded_to_bf16(level, bf16) -> None:  # type: ignore[no-untyped-def]
    a, b, out = _f(50, 70), _f(70, 30), _nan(50, 30)
    matmul.add(a, b, out, False)
    assert same_bits(out, _in_order(a, b, np.zeros_like(out), _chain_at(level)))


@pytest.mark.parametrize(
    "case", [case for case in SHARED if case[0] > 1 and case[1] < 2000 and case[2] * case[3] < 4000]
)
def test_shares_of_bf16_products_have_the_bits_of_their_order(case, bf16) -> None:  # type: ignore[no-untyped-def]
    m, n, length, shares, segments, layout = case
    lay, k = LAYOUTS[layout], length * shares * segments
    a, b, base, narrow = _h(m, k), _h(k, n), _f(m, n), _h(m, n)
    whole, sums = _in_shares(a, b, shares, segments, _chain_of_pairs), _nan(m, n)
    matmul.add(lay(a), lay(b), sums, False, shares, segments)
    assert same_bits(sums, whole)
    assert same_bits(matmul.product(lay(a), lay(b), shares, segments), whole.astype(BFLOAT16))
    for c in (base, narrow):
        expected = (c.astype("f4") + whole).astype(c.dtype)
        matmul.add(lay(a), lay(b), c, True, shares, segments)
        assert same_bits(c, expected)
    if segments == 1 < shares:
        got = linear.forward(lay(a), lay(b), None, narrow, shares)
        assert same_bits(got, (narrow.astype("f4") + whole).astype(BFLOAT16))
    assert not bf16.fallen


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(("length", "segments"), [(5, 1), (193, 1), (7, 3), (64, 3)])
def test_ranks_with_cut_bf16_operands_give_the_bits_of_the_whole(length, segments, ranks, bf16) -> None:  # type: ignore[no-untyped-def]
    _ranks_give_the_bits_of_one(length, segments, ranks, BFLOAT16)
    assert not bf16.fallen


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("width", [1, 5, 16, 131])
def test_sums_of_exp_over_cut_vocabularies_give_the_bits_of_the_whole(ranks, width, level) -> None:  # type: ignore[no-untyped-def]
    """A loss of the largest logit is the logarithm of the sum; every share has that logit, so that all shift alike."""
    logits = np.minimum(_f(37, 8, width), np.float32(3))
    logits[:, :, 0] = 3

    def total(part: np.ndarray, shares: int) -> np.ndarray:
        losses = crossentropy.rows(part.reshape(37, -1).copy(), np.zeros(37, "i4"), None, False, shares)
        return np.exp(losses).astype("f4")

    parts = [total(part, 8 // ranks) for part in np.split(logits, ranks, axis=1)]
    assert same_bits(_in_pairs(parts), total(logits, 8))
    assert not level.fallen


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("cap", [0.0, 4.0])
def test_what_ranks_do_that_hold_some_columns_has_the_bits_of_whole_rows(ranks, cap, level) -> None:  # type: ignore[no-untyped-def]
    logits, targets = _f(37, 8 * 21, scale=3), RANDOM.integers(0, 8 * 21, 37).astype("i4")
    parts = [crossentropy.capped(part.copy(), cap) for part in np.split(logits, ranks, axis=1)]
    width, capped = 8 * 21 // ranks, [part.copy() for part in parts]
    losses = crossentropy.rows(logits, targets, None, True, 8, cap)
    top = np.stack([part.max(axis=1) for part in parts]).max(axis=0)
    wanted = np.hstack(parts)[np.arange(37), targets]
    totals = _in_pairs([crossentropy.exponentials(part, top, 8 // ranks) for part in parts])
    assert same_bits(crossentropy.losses(totals, top, wanted), losses)
    for rank, part in enumerate(parts):
        local = targets - rank * width
        here = np.where((local >= 0) & (local < width), local, -1).astype("i4")
        crossentropy.gradient(part, totals, here, capped[rank], cap)
    assert same_bits(np.hstack(parts), logits) and not level.fallen


def test_tanh_of_the_cap_is_accurate_relative_to_each_element(level: registry.Choice) -> None:
    x = np.concatenate([np.linspace(-10, 10, 400_001), [0, 1e-30, 0.625, -0.625, 1e4, -1e4]]).astype("f4")
    exact, got = np.tanh(x.astype("f8")), crossentropy.capped(x, 1.0)
    assert (np.abs(got - exact) <= 2e-7 * np.abs(exact)).all() and np.abs(got).max() == 1


def test_a_head_in_chunks_is_complete_before_it_is_added(level: registry.Choice) -> None:
    rows, (v, c) = 2 * crossentropy.CHUNK_ROWS + 100, (48, 21)
    x, w, targets, before = _f(rows, c), _f(v, c), RANDOM.integers(0, v, rows).astype("i4"), _f(v, c)
    dw, added = _nan(v, c), before.copy()
    total, dx = crossentropy.loss_and_grad(x, w, targets, None, dw, False, 8, 4)
    again, _ = crossentropy.loss_and_grad(x, w, targets, None, added, True, 8, 4)
    logits = matmul.product(x, w.T)
    losses = crossentropy.rows(logits, targets, None, True, 8)
    chunks = [slice(at, at + crossentropy.CHUNK_ROWS) for at in range(0, rows, crossentropy.CHUNK_ROWS)]
    whole = np.zeros_like(dw)
    for chunk in chunks:
        whole += matmul.product(logits[chunk].T, x[chunk])
    assert same_bits(dw, whole) and same_bits(added, before + whole) and same_bits(dx, matmul.product(logits, w, 8))
    expected = _in_pairs([math.fsum(piece) for piece in np.split(losses, 4)])  # 281 rows: no chunk ends with one
    assert total == again == crossentropy.loss(x, w, targets, None, 8, 4) == expected
    assert not level.fallen


def test_floats_are_rounded_to_nearest_even_and_nan_stays_nan(level: registry.Choice) -> None:
    ends = np.array([0, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F7F7FFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF], "u4")
    ties = (RANDOM.integers(0, 0xFF80, 1000) << 16 | 0x8000).astype("u4")
    drawn = RANDOM.integers(0, 1 << 32, 100_003, "u4")
    x = np.concatenate([ends, ends | 0x80000000, ties, ties + 1, ties - 1, drawn]).view("f4")
    got = np.empty(x.shape, BFLOAT16)
    cast.to(x, got)
    with np.errstate(invalid="ignore"):
        expected = x.astype(BFLOAT16)
    known = ~np.isnan(x)
    assert same_bits(got[known], expected[known]) and np.isnan(got[~known]).all() and not level.fallen


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row_of_a_bf16_product(bad: float, bf16: registry.Choice) -> None:
    a, b = np.ones((9, 5), BFLOAT16), np.ones((5, 21), BFLOAT16)
    a[4, 3] = bad
    finite = np.isfinite(matmul.product(a, b))
    assert finite[:4].all() and finite[5:].all() and not finite[4].any()


@pytest.mark.skipif(not library.runs(library.BF16_LEVEL), reason="this CPU has no AVX512-BF16")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 2e-19])
def test_the_bf16_instruction_gives_the_bits_of_the_plain_c(shape, scale, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    m, n, k = shape
    a, b, got = _h(m, k, scale=scale), _h(k, n, scale=scale), []
    try:
        choice.select(products="bf16")
        got.append(matmul.product(a, b))
        monkeypatch.setenv(library.BF16_VARIABLE, "portable")
        choice.select(products="bf16")
        got.append(matmul.product(a, b))
    finally:
        choice.select()
    assert same_bits(*got)


@pytest.mark.skipif(library.runs(library.BF16_LEVEL), reason="this CPU has AVX512-BF16")
def test_bf16_without_the_instruction_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.BF16_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=r'numerics.products = "bf16" needs a CPU with AVX512-BF16 .* set'):
        choice.select(products="bf16")
    assert registry.summary() == f"C kernel ({AVAILABLE[-1]})", "the selection before stands"


def test_a_product_with_nothing_in_it_is_the_references(level: registry.Choice) -> None:
    out = _f(3, 4)
    expected = out.copy()
    matmul.add(_f(3, 0), _f(0, 4), out, accumulate=True)
    assert same_bits(out, expected) and matmul.product(_f(0, 3), _f(3, 4)).shape == (0, 4)
    assert not matmul.product(_f(3, 0), _f(0, 4)).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "position", "output"), ROWS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row_as_in_the_reference(name, position, output, bad, level) -> None:  # type: ignore[no-untyped-def]
    case = CASES[name][0][-1 if name == "linear.forward" else 0]((9, 21))
    if name == "gelu.backward":
        case[0][1][4, 3] = 0.5  # far out one of them has a slope of 0 where the other has 1e-23
    case[0][position][4, 3] = bad
    got = _call(_function(name), case)[output]
    expected = _call(_function(name).__wrapped__, case)[output]
    finite = np.isfinite(expected)
    assert np.array_equal(np.isfinite(got), finite)
    assert np.array_equal(got[~finite], expected[~finite].astype(got.dtype), equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_attention_shows_what_is_not_finite(bad: float, level: registry.Choice) -> None:
    make = _attention_backward(True, None)
    for position in range(3):
        case = make((70, 16))
        (do, *qkv), (o, lse) = case[0][:4], case[0][4:6]
        qkv[position][0, 1, 50, 3] = bad
        o, lse = attention.forward(*qkv)
        assert not np.isfinite(o[0, 50:, 1]).all() and np.isfinite(o[1]).all() and np.isfinite(o[0, :, 0]).all()
        assert np.isfinite(o[0, :42, 1]).all(), "earlier register tiles do not see it"
        gradients = case[0][6:9]
        attention.backward(do, *qkv, o, lse, *gradients)
        assert not all(np.isfinite(g[0, 1]).all() for g in gradients)
        assert all(np.isfinite(g[1]).all() and np.isfinite(g[0, 0]).all() for g in gradients)
    assert not level.fallen


def test_extreme_scores_pick_one_key(level: registry.Choice) -> None:
    q, k = np.full((1, 1, 2, 4), 200, "f4"), np.full((1, 1, 300, 4), -200, "f4")
    k[0, 0, 270] = 200
    v = _f(1, 1, 300, 4)
    o, lse = attention.forward(q, k, v, causal=False)
    assert np.array_equal(o[0, :, 0], np.stack([v[0, 0, 270]] * 2)) and np.allclose(lse, 80000)
    gradients = [_nan(*x.shape) for x in (q, k, v)]
    attention.backward(np.ones_like(o), q, k, v, o, lse, *gradients, causal=False)
    assert all(np.isfinite(g).all() for g in gradients)


def test_gelu_is_accurate_relative_to_each_element(level: registry.Choice) -> None:
    x = np.concatenate([np.linspace(-5, 30, 400_001), [-1e4, -60, 0, 1e-30, 1e4]]).astype("f4")
    exact, got = gelu.forward.__wrapped__(x.astype("f8")[None])[0], gelu.forward(x[None])[0]
    assert (np.abs(got - exact) <= 3e-6 * np.abs(exact) + 1e-30)[np.abs(x) < 4].all()
    assert np.allclose(got, exact, rtol=2e-6, atol=1e-9)


def test_exp_is_within_two_units_in_the_last_place(level: registry.Choice) -> None:
    """exp(x − 0) through the softmax: rows (x, 0 wanted) whose maximum is 0."""
    x = np.concatenate([np.linspace(-104, 0, 500_001), [-1e30, -np.inf]]).astype("f4")
    logits = np.stack([np.zeros_like(x), x], axis=1)
    crossentropy.rows(logits, np.zeros(len(x), "i4"), None, gradient=True)
    exact = np.exp(x.astype("f8")) / (1 + np.exp(x.astype("f8")))
    unit = np.spacing(np.maximum(exact, 1e-300).astype("f4")).astype("f8")
    assert (np.abs(logits[:, 1] - exact) / unit).max() < 4  # exp, the sum and the division


def test_masks_are_those_of_rng(level: registry.Choice) -> None:
    draw = _draw(0.25)
    for start in (0, 1, 2, 3, 1001, 2**33 + 2):
        drawn = words(draw.key, start, 777, draw.step, draw.micro_batch)
        expected = np.where((drawn >> 8).astype("f4") * np.float32(2**-24) >= np.float32(0.25), 1 / 0.75, 0).astype(
            "f4"
        )
        assert same_bits(dropout.mask(draw, (777,), start, "f4"), expected)
    assert not level.fallen


def test_a_tree_of_sums_has_the_references_bits_and_may_end_in_a_leaf(level: registry.Choice) -> None:
    merges = (0, 1, 0, 2, 0, 1, 2)
    leaves = _f(len(merges), 100_003)
    expected = np.empty(leaves.shape[1], "f4")
    sums.tree.__wrapped__(leaves, merges, expected)  # type: ignore[attr-defined]
    a, b, c, d, e, f, g = leaves
    assert same_bits(expected, (((a + b) + (c + d)) + ((e + f) + g)))
    for at in (0, 3, 6):
        own = leaves.copy()
        sums.tree(own, merges, own[at])
        assert same_bits(own[at], expected)
    assert not level.fallen
    for wrong in ((0, 1, 0), (1, 0, 0, 0, 0, 0, 0), (0, 2, 0, 2, 0, 1, 1), (0,) * 7, (*[0] * 39, 39)):
        assert elementwise._fit_sums([expected] * len(wrong), wrong, expected).startswith("no tree")


# ---- sums over rows in pieces


def _eight_rows(dy: np.ndarray) -> np.ndarray:
    """Column sums as kernels/cpu/linear.c states them."""
    total = np.zeros(dy.shape[1], "f4")
    for first in range(0, len(dy), 8):
        x = np.zeros((8, dy.shape[1]), "f4")
        x[: len(dy[first : first + 8])] = dy[first : first + 8]
        total = total + (((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])))
    return total


PIECES = [(1, 67), (2, 8), (3, 5), (4, 1), (5, 16), (7, 3), (8, 12), (13, 9), (64, 2), (100, 1)]  # pieces, rows in each


@pytest.mark.parametrize(("pieces", "group"), PIECES)
@pytest.mark.parametrize("width", [5, 33, 1030])
def test_bias_gradients_have_the_bits_of_the_order_they_state(pieces, group, width, level) -> None:  # type: ignore[no-untyped-def]
    dy, lane, got = _f(pieces * group, width), _f(width), _nan(width)
    linear.bias_gradient(dy, got, False, pieces)
    expected = in_a_tree([_eight_rows(piece) for piece in dy.reshape(pieces, group, width)])
    assert same_bits(got, expected)
    complete = lane.copy()
    linear.bias_gradient(dy, complete, True, pieces)
    assert same_bits(complete, lane + expected) and not level.fallen


@pytest.mark.parametrize(("pieces", "group"), PIECES)
@pytest.mark.parametrize("width", [5, 33])
def test_norm_gradients_have_the_bits_of_the_order_they_state(pieces, group, width, level) -> None:  # type: ignore[no-untyped-def]
    fused = level.first.level != "base" or platform.machine() != "x86_64"
    n = pieces * group
    dy, x, gain, lanes = _f(n, width), _f(n, width), _f(width), _f(2, width)
    statistics = np.stack([x.mean(axis=1), 1 / x.std(axis=1)]).astype("f4")
    normal = (x - statistics[0, :, None]) * statistics[1, :, None]
    sums = []
    for first in range(0, n, group):
        total = np.zeros((2, width), "f4")
        for row in range(first, first + group):
            d = dy[row]
            total[0] = _fused(d, normal[row], total[0]) if fused else d * normal[row] + total[0]
            total[1] += d
        sums.append(total)
    got, complete = _nan(2, width), lanes.copy()
    dx = layernorm.backward(dy, x, gain, statistics, *got, False, None, pieces)
    assert same_bits(got, in_a_tree(sums))
    layernorm.backward(dy, x, gain, statistics, *complete, True, None, pieces)
    assert same_bits(complete, lanes + in_a_tree(sums))
    assert same_bits(dx, layernorm.backward(dy, x, gain, statistics, *got, False)), "rows do not depend on pieces"
    assert not level.fallen


@pytest.mark.parametrize("pieces", [4, 5, 8, 13])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_who_has_some_of_the_pieces_computes_the_subtrees(pieces: int, ranks: int, level: registry.Choice) -> None:
    width, group = 21, 11
    dy, x, gain = _f(pieces * group, width), _f(pieces * group, width), _f(width)
    statistics = np.stack([x.mean(axis=1), 1 / x.std(axis=1)]).astype("f4")
    whole, nodes, parts = _nan(3, width), [], []
    layernorm.backward(dy, x, gain, statistics, *whole[:2], False, None, pieces)
    linear.bias_gradient(dy, whole[2], False, pieces)
    borders = [pieces * rank // ranks for rank in range(ranks + 1)]
    for first, stop in itertools.pairwise(borders):
        for node in tree.maximal_nodes((0, pieces), first, stop):
            rows, part = slice(node[0] * group, node[1] * group), _nan(3, width)
            own = dy[rows], x[rows], gain, statistics[:, rows].copy()
            layernorm.backward(*own, *part[:2], False, None, node[1] - node[0])
            linear.bias_gradient(dy[rows], part[2], False, node[1] - node[0])
            nodes.append(node)
            parts.append(part)
    joined = _nan(3, width)
    sums.tree(parts, tree.merges_of((0, pieces), nodes), joined)
    assert same_bits(joined, whole) and not level.fallen


def test_rows_that_do_not_fall_into_pieces_are_refused(level: registry.Choice) -> None:
    dy, statistics = _f(10, 4), np.ones((2, 10), "f4")
    for pieces in (3, 20):
        with pytest.raises(ValueError):
            linear.bias_gradient(dy, _nan(4), False, pieces)
        with pytest.raises(ValueError):
            layernorm.backward(dy, dy, _f(4), statistics, _nan(4), _nan(4), False, None, pieces)


# ---- cuts of dropout


def _cuts(shape: tuple[int, ...], count: int) -> list[tuple[slice, ...]]:
    """That many random parts of an array, and those that lack one dim's first or last index."""
    cuts = []
    for _ in range(count):
        ends = [sorted(RANDOM.integers(0, n + 1, 2)) for n in shape]
        cuts.append(
            tuple(slice(min(int(a), n - 1), max(int(b), int(a) + 1)) for (a, b), n in zip(ends, shape, strict=True))
        )
    for dim, n in enumerate(shape):
        for part in (slice(1, n), slice(0, n - 1)):
            cuts.append(tuple(part if other == dim and n > 1 else slice(0, m) for other, m in enumerate(shape)))
    return cuts


@pytest.mark.parametrize("shape", [(3, 12, 20), (2, 4, 6, 9), (1, 40, 7), (20, 33), (2, 3, 2, 3, 5)])
@pytest.mark.parametrize("start", [0, 2**33 + 3])
def test_the_mask_of_a_cut_is_the_cut_of_the_mask(shape: tuple[int, ...], start: int, level: registry.Choice) -> None:
    draw = _draw()._replace(start=start)
    whole = dropout.mask(draw, shape, 0, "f4")
    x, residual = _f(*shape), _f(*shape)
    y = dropout.forward(x, draw, residual)
    for cut in _cuts(shape, 12):
        part, local = np.ascontiguousarray(whole[cut]), draw.cut(shape, tuple(each.start for each in cut))
        assert same_bits(dropout.mask(local, part.shape, 0, "f4"), part), cut
        assert same_bits(dropout.mask.__wrapped__(local, part.shape, 0, "f4"), part), cut
        pieces = (np.ascontiguousarray(a[cut]) for a in (x, residual, y))
        assert same_bits(dropout.forward(next(pieces), local, next(pieces)), next(pieces)), cut
    again = draw.cut(shape, (0,) * len(shape)).cut((1,) * len(shape), (0,) * len(shape))
    assert dropout.mask(again, shape, 0, "f4").tobytes() == whole.tobytes(), "a cut of a cut"
    assert set(level.fallen) <= {("dropout.mask", CUT), ("dropout.forward", CUT)}
    assert not level.fallen or len(shape) > 4


CUT = "rows in more than three dims"


def test_strides_that_do_not_fit_are_refused(level: registry.Choice) -> None:
    for strides in ((5, 1, 1), (1, 5)):
        with pytest.raises(ValueError, match="a draw with strides"):
            dropout.forward(_f(3, 5), _draw()._replace(strides=strides))


# ---- attention in shares of positions


class _Ring:
    """Attention computed for every pair of shares by itself and merged in the declared order."""

    def __init__(
        self, arrays: tuple[np.ndarray, ...], past: int, share: int, causal: bool, draw: Draw | None,
        starts: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.do, self.q, self.k, self.v = arrays
        self.past, self.share, self.causal, self.draw, self.starts = past, share, causal, draw, starts
        total = self.k.shape[2]
        borders = [*range(0, total, share), total]
        self.keys = list(itertools.pairwise(borders))
        self.queries = [(max(a, past) - past, b - past) for a, b in self.keys if b > past]  # rows, of positions past …

    def _pair(self, queries: tuple[int, int], keys: tuple[int, int]) -> tuple[Any, ...]:
        """What the call for a pair is told: draw, positions, first keys."""
        (i, stop), (j, _) = queries, keys
        shape = (self.do.shape[0], self.do.shape[2], self.do.shape[1], self.k.shape[2])
        starts = None if self.starts is None else np.ascontiguousarray(self.starts[:, i:stop])
        return self.draw and self.draw.cut(shape, (0, 0, i, j)), (self.past + i, j), starts

    def _sees(self, queries: tuple[int, int], keys: tuple[int, int]) -> bool:
        before = self.starts is not None and self.starts[:, queries[0]].min() >= keys[1]
        return not before and (not self.causal or keys[0] < self.past + queries[1])

    def forward(self) -> tuple[np.ndarray, np.ndarray]:
        outs = []
        for queries in self.queries:
            state: Any = None
            for keys in self.keys:
                if self._sees(queries, keys):
                    draw, *where = self._pair(queries, keys)
                    q, k, v = self.q[..., slice(*queries), :], self.k[:, :, slice(*keys)], self.v[:, :, slice(*keys)]
                    part = attention.partial(q, k, v, self.causal, draw, None, self.share, *where)
                    if state is None:
                        state = part
                    else:
                        attention.merge(*state, *part)
            outs.append(attention.finish(*state))
        return np.concatenate([o for o, _ in outs], axis=1), np.concatenate([lse for _, lse in outs], axis=2)

    def backward(self, o: np.ndarray, lse: np.ndarray) -> tuple[np.ndarray, ...]:
        sums = [_nan(*self.q.shape), _nan(*self.k.shape), _nan(*self.v.shape)]
        begun = set()
        for queries in self.queries:
            rows = slice(*queries)
            for keys in self.keys:
                if not self._sees(queries, keys):
                    continue
                draw, *where = self._pair(queries, keys)
                q, k, v = self.q[..., rows, :], self.k[:, :, slice(*keys)], self.v[:, :, slice(*keys)]
                parts = [_nan(*x.shape) for x in (q, k, v)]
                attention.backward(
                    self.do[:, rows], q, k, v, o[:, rows], np.ascontiguousarray(lse[:, :, rows]), *parts,
                    self.causal, draw, None, 0, *where,
                )  # fmt: skip
                for name, to, part in zip("qkv", sums, parts, strict=True):
                    span = queries if name == "q" else keys
                    to = to[..., slice(*span), :]
                    to[...] = to + part if (name, span) in begun else part
                    begun.add((name, span))
        return tuple(sums)


# queries, keys, width, share: equal shares, a short one at the end, shares shorter than a tile, longer than a tile of
# keys, queries that begin inside a share
RINGS = [(8, 8, 4, 2), (96, 96, 16, 32), (37, 37, 33, 9), (600, 600, 16, 300), (130, 520, 5, 100), (3, 40, 8, 7)]


def _arrays(t: int, s: int, d: int) -> tuple[np.ndarray, ...]:
    """do (B, T, H, D), and q, k, v seen in one array as the layer holds them."""
    qkv = _f(2, s, 3, 2, d).transpose(2, 0, 3, 1, 4)
    return _f(2, t, 2, d), qkv[0][:, :, s - t :], qkv[1], qkv[2]


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_ring_over_shares_of_positions_has_the_bits_of_the_whole(ring, causal, dropped, level) -> None:  # type: ignore[no-untyped-def]
    t, s, d, share = ring
    draw = _draw() if dropped else None
    do, q, k, v = _arrays(t, s, d)
    o, lse = attention.forward(q, k, v, causal, draw, None, share)
    gradients = [_nan(*x.shape) for x in (q, k, v)]
    attention.backward(do, q, k, v, o, lse, *gradients, causal, draw, None, share)
    pairs = _Ring((do, q, k, v), s - t, share, causal, draw)
    assert all(same_bits(a, b) for a, b in zip(pairs.forward(), (o, lse), strict=True))
    assert all(same_bits(a, b) for a, b in zip(pairs.backward(o, lse), gradients, strict=True))
    assert not level.fallen


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("first", [_windows, _documents])
def test_a_ring_of_groups_that_see_some_keys_has_the_bits_of_the_whole(ring, first, level) -> None:  # type: ignore[no-untyped-def]
    t, s, d, share = ring
    arrays, draw = _grouped(t, s, d), _draw()
    do, q, k, v = arrays
    starts = first(range(s - t, s), share)
    rest = (True, draw, None, share, None, starts)
    o, lse = attention.forward(q, k, v, *rest)
    gradients = [_nan(*x.shape) for x in (q, k, v)]
    attention.backward(do, q, k, v, o, lse, *gradients, *rest)
    pairs = _Ring(arrays, s - t, share, True, draw, starts)
    assert all(same_bits(a, b) for a, b in zip(pairs.forward(), (o, lse), strict=True))
    found = pairs.backward(o, lse)
    seen = np.isfinite(found[1])  # keys that nobody sees are no pair's
    assert np.isfinite(found[0]).all() and not gradients[1][~seen].any() and not gradients[2][~seen].any()
    assert same_bits(found[0], gradients[0])
    assert all(same_bits(a[seen], b[seen]) for a, b in zip(found[1:], gradients[1:], strict=True))
    assert not level.fallen


@pytest.mark.parametrize("share", [0, 100])
def test_heads_of_a_group_have_the_bits_of_heads_with_keys_of_their_own(share: int, level: registry.Choice) -> None:
    do, q, k, v = _grouped(300, 300, 24)
    alone = q.reshape(2, 6, 300, 24)  # in memory of its own, and four dims
    many = [np.repeat(x, 3, axis=1) for x in (k, v)]
    starts, outs = _documents(range(300), 70), []
    for inputs in ((q, k, v), (alone, k, v), (alone, *many)):
        o, lse = attention.forward(*inputs, True, None, None, share, None, starts)
        gradients = [_nan(*x.shape) for x in inputs]
        attention.backward(do, *inputs, o, lse, *gradients, True, None, None, share, None, starts)
        outs.append((o, lse, gradients[0].reshape(2, 6, 300, 24), *gradients[1:]))
    assert all(same_bits(a, b) for a, b in zip(outs[0], outs[1], strict=True))
    assert all(same_bits(a, b) for a, b in zip(outs[0][:3], outs[2][:3], strict=True))
    for one, each in zip(outs[0][3:], outs[2][3:], strict=True):
        assert np.allclose(one, each.reshape(2, 2, 3, 300, 24).sum(axis=2), rtol=1e-4, atol=1e-5)
    assert not level.fallen


def test_the_bits_of_a_query_depend_on_what_it_sees_alone(level: registry.Choice) -> None:
    """Whatever other queries see, and whatever lies before: other numbers there change nothing."""
    do, q, k, v = _grouped(600, 600, 16)
    first = np.where(np.arange(600) < 290, 0, 290).astype("i4")[None]
    for share in (0, 150):
        results = []
        for change in (False, True):
            if change:
                k[:, :, :290] *= 2
            o, lse = attention.forward(q, k, v, True, None, None, share, None, first)
            gradients = [_nan(*x.shape) for x in (q, k, v)]
            attention.backward(do, q, k, v, o, lse, *gradients, True, None, None, share, None, first)
            results.append([o[:, 290:], lse[..., 290:], *(x[..., 290:, :] for x in gradients)])
        assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
        alone = attention.forward(q[..., 290:, :], k, v, True, None, None, share, (290, 0), first[:, 290:].copy())
        assert share or all(np.array_equal(a, b) for a, b in zip(alone, results[0][:2], strict=True))
    assert not level.fallen


def test_queries_before_their_first_key_give_zeros(level: registry.Choice) -> None:
    do, q, k, v = _grouped(200, 200, 16)
    first = np.minimum(np.arange(200) // 40 * 40 + 7, 199).astype("i4")[None]
    blind = first[0] > np.arange(200)
    for share in (0, 50):
        rest = (True, None, None, share, None, first)
        o, lse = attention.forward(q, k, v, *rest)
        dq, dk, dv = (_nan(*x.shape) for x in (q, k, v))
        attention.backward(do, q, k, v, o, lse, dq, dk, dv, *rest)
        assert (o[:, blind] == 0).all() and (lse[:, :, blind] == -np.inf).all() and not dq[..., blind, :].any()
        assert all(np.isfinite(x).all() for x in (o, dq, dk, dv))
        assert not dk[:, :, :7].any() and not dv[:, :, :7].any() and dv[:, :, 7].all()
    for starts, reason in ((first[:, ::-1].copy(), "descend"), (first[0], "shapes"), (first.astype("i8"), "int64")):
        assert reason in KERNELS.entries()["attention.forward"].contract(q, k, v, starts=starts)
    assert not level.fallen


@pytest.mark.parametrize("causal", [True, False])
def test_queries_and_heads_may_be_cut_where_all_keys_are_gathered(causal: bool, level: registry.Choice) -> None:
    t, share, draw = 90, 30, _draw()
    do, q, k, v = _arrays(t, t, 12)
    shape = (*q.shape[:3], t)
    o, lse = attention.forward(q, k, v, causal, draw, None, share)
    dq, dk, dv = (_nan(*x.shape) for x in (q, k, v))
    attention.backward(do, q, k, v, o, lse, dq, dk, dv, causal, draw, None, share)
    for start, stop in ((0, 30), (30, 90), (60, 90)):
        rest = (causal, draw.cut(shape, (0, 0, start, 0)), None, share, (start, 0))
        part = q[:, :, start:stop]
        got = attention.forward(part, k, v, *rest)
        own = np.ascontiguousarray(o[:, start:stop]), np.ascontiguousarray(lse[:, :, start:stop])
        assert all(same_bits(a, b) for a, b in zip(got, own, strict=True))
        outs = [_nan(*x.shape) for x in (part, k, v)]
        attention.backward(do[:, start:stop], part, k, v, *own, *outs, *rest)
        assert same_bits(outs[0], np.ascontiguousarray(dq[:, :, start:stop]))
    for head in (0, 1):
        heads = slice(head, head + 1)
        rest = (causal, draw.cut(shape, (0, head, 0, 0)), None, share)
        part = [x[:, heads] for x in (q, k, v)]
        got = attention.forward(*part, *rest)
        own = np.ascontiguousarray(o[:, :, heads]), np.ascontiguousarray(lse[:, heads])
        assert all(same_bits(a, b) for a, b in zip(got, own, strict=True))
        outs = [_nan(*x.shape) for x in part]
        attention.backward(do[:, :, heads], *part, *own, *outs, *rest)
        assert all(same_bits(a, np.ascontiguousarray(b[:, heads])) for a, b in zip(outs, (dq, dk, dv), strict=True))
    assert not level.fallen


@pytest.mark.parametrize("causal", [True, False])
def test_a_share_of_everything_is_no_share(causal: bool, level: registry.Choice) -> None:
    do, q, k, v = _arrays(300, 300, 12)
    results = []
    for share in (0, 300, 512):
        o, lse = attention.forward(q, k, v, causal, None, None, share)
        gradients = [_nan(*x.shape) for x in (q, k, v)]
        attention.backward(do, q, k, v, o, lse, *gradients, causal, None, None, share)
        results.append((o, lse, *gradients))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    o, _ = attention.forward(q, k, v, causal, None, None, 100)
    assert not same_bits(o, results[0][0]), "the order of additions is another one"


def test_what_sees_no_key_gives_zeros(level: registry.Choice) -> None:
    do, q, k, v = _arrays(12, 12, 4)
    for share in (0, 4):
        o, lse = attention.forward(q, k, v, True, None, None, share, (3, 8))  # queries 3 … 14, keys 8 … 19
        assert (o[:, :5] == 0).all() and (lse[:, :, :5] == -np.inf).all() and np.isfinite(lse[:, :, 5:]).all()
        dq, dk, dv = (_nan(*x.shape) for x in (q, k, v))
        attention.backward(do, q, k, v, o, lse, dq, dk, dv, True, None, None, share, (3, 8))
        assert not dq[:, :, :5].any() and not dk[:, :, 7:].any() and not dv[:, :, 7:].any()
        assert np.isfinite(dq).all() and dk[:, :, :7].all() and dv[:, :, :7].all()
    state, nothing = attention.partial(q, k, v), attention.partial(q, k, v, True, None, None, 0, (0, 12))
    before = [x.copy() for x in state]
    attention.merge(*state, *nothing)
    assert all(np.array_equal(a, b) for a, b in zip(state, before, strict=True))
    attention.merge(*nothing, *state)
    assert all(np.array_equal(a, b) for a, b in zip(nothing, before, strict=True)) and not level.fallen


@pytest.mark.skipif("avx512" not in AVAILABLE, reason="this CPU has no AVX-512")
@pytest.mark.parametrize("name", NAMES)
def test_avx2_and_avx512_give_the_same_bits(name: str) -> None:
    for make in CASES[name][0]:
        for size in sizes_of(name):
            case, got = make(size), []
            for wanted in ("avx2", "avx512"):
                choice.select(wanted)
                got.append(_call(_function(name), case))
            assert all(same_bits(a, b) for a, b in zip(*got, strict=True))
    choice.select()


def test_ids_out_of_bounds_never_reach_a_kernel() -> None:
    with pytest.raises(IndexError):
        embedding.forward(np.array([0, 9], "i4"), _f(9, 4))
    with pytest.raises(IndexError):
        crossentropy.rows(_f(2, 5), np.array([1, 5], "i4"), None, True)


def test_selection_by_level_and_op() -> None:
    x = _f(3, 5)
    try:
        assert choice.select("off").first.library is None and set(registry.serving().values()) != set()
        assert all("reference" in by for by in registry.serving().values())
        assert same_bits(gelu.forward(x), gelu.forward.__wrapped__(x))
        choice.select("auto", "gelu, attention")
        assert "asks for it" in registry.serving()["gelu"] and "C kernel" in registry.serving()["layernorm"]
        assert same_bits(gelu.forward(x), gelu.forward.__wrapped__(x)) and not registry.fallbacks()
        assert all("reference" in by for by in registry.serving("float64").values())
        with pytest.raises(ConfigError, match="names 'gelo'"):
            choice.select("auto", "gelo")
        if "avx512" not in AVAILABLE:
            with pytest.raises(ConfigError, match="avx512"):
                choice.select("avx512")
    finally:
        choice.select()


def test_without_a_library_the_reference_runs_and_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    try:
        assert choice.select().first.level == "off" and "cannot be loaded" in registry.serving()["gelu"]
        x = _f(3, 5)
        assert same_bits(gelu.forward(x), gelu.forward.__wrapped__(x))
    finally:
        monkeypatch.undo()
        choice.select()


def test_keep_freed_memory_is_there() -> None:
    assert isinstance(choice.keep_freed_memory(), bool) and ctypes.sizeof(library.Draw) == 56


def test_the_layers_copy_is_the_parameter_after_the_update(level: registry.Choice) -> None:
    p, g, m, v, *rest, copy = _adamw_with_copy((7, 17))[0]
    alone = p.copy()
    adamw.update(alone, g, m.copy(), v.copy(), *rest)
    adamw.update(p, g, m, v, *rest, copy)
    assert same_bits(p, alone) and same_bits(copy, p.astype(BFLOAT16)) and not level.fallen
