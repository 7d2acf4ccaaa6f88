"""What `gpu_check.py` measures: every function that has a CUDA kernel, at the shapes of a GPT-2 124M step and beyond.

A case is a function of the registry and its arguments on the device. Floating-point operations and bytes are the least
that the function needs: each input read once, each result written once.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from mlm_mpi.ops import attention, layernorm, rmsnorm, rotary
from mlm_mpi.ops.dropout import Draw

ADAMW = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 10}
EPSILON = 1e-5
MERGES = [0, 1, 0, 2, 0, 1, 0, 3]  # the balanced tree over eight leaves


@dataclass(frozen=True)
class Sizes:
    """`rows` of a step, `head_rows` of chunks of logits; `squares`: M = N = K; `attention`: (B, H, T, D)."""

    rows: int
    width: int
    hidden: int
    vocabulary: int
    head_rows: tuple[int, ...]
    dropout_rows: int
    squares: tuple[int, ...]
    attention: tuple[tuple[int, int, int, int], ...]
    flat: int
    block: int  # of clip.squares; `flat` is a multiple


FULL = Sizes(
    rows=32 * 1024, width=768, hidden=3072, vocabulary=50304, head_rows=(512, 8192), dropout_rows=8192,
    squares=(4096, 8192),
    attention=((32, 12, 1024, 64), (32, 6, 1024, 128), (1, 12, 16384, 64)),
    flat=1900 * 65536, block=65536,
)  # fmt: skip
# for the emulator and under compute-sanitizer: more than one tile of everything, ragged where kernels take it
SMALL = Sizes(
    rows=136, width=72, hidden=160, vocabulary=328, head_rows=(40,), dropout_rows=24, squares=(136,),
    attention=((1, 2, 136, 64), (1, 1, 72, 128)), flat=3 * 1024, block=1024,
)  # fmt: skip


class Bank:
    """Random arrays on the device, cut out of a few million numbers drawn once; the same seed gives the same arrays."""

    _drawn: dict[Any, Any] = {}  # (dtype, scale) -> numbers

    def __init__(self, xp: Any, seed: int, elements: int = 1 << 22) -> None:
        self.xp, self._random, self._elements = xp, np.random.default_rng(seed), elements

    def _numbers(self, dtype: np.dtype, scale: float) -> Any:
        if (dtype, scale) not in self._drawn:
            host = scale * np.random.default_rng(0).standard_normal(self._elements, np.float32)
            self._drawn[dtype, scale] = self.xp.asarray(host.astype(dtype))
        return self._drawn[dtype, scale]

    def normal(self, *shape: int, dtype: Any = np.float32, scale: float = 1.0) -> Any:
        """Normal numbers of that deviation."""
        numbers, size = self._numbers(np.dtype(dtype), scale), math.prod(shape)
        out = self.xp.empty(size, dtype)
        filled, start = 0, int(self._random.integers(numbers.size))
        while filled < size:
            count = min(size - filled, numbers.size - start)
            out[filled : filled + count] = numbers[start : start + count]
            filled, start = filled + count, 0
        return out.reshape(shape)

    def integers(self, stop: int, *shape: int) -> Any:
        """int32 below `stop`."""
        return self.xp.asarray(self._random.integers(0, stop, shape).astype(np.int32))


@dataclass(frozen=True)
class Case:
    """A function of the registry at one size.

    `make(bank)`: arguments. `results(arguments, returned)`: what the function computed, for comparison.
    """

    name: str
    function: str
    make: Callable[[Bank], tuple[Any, ...]]
    results: Callable[[tuple[Any, ...], Any], list[Any]]
    flops: float = 0.0
    bytes: float = 0.0
    shape: tuple[int, ...] = ()  # M, N, K of a product


def _returned(arguments: tuple[Any, ...], returned: Any) -> list[Any]:
    return list(returned) if isinstance(returned, tuple) else [returned]


def _argument(*places: int) -> Callable[..., list[Any]]:
    return lambda arguments, returned: [arguments[place] for place in places]


def cases(sizes: Sizes, dtype: np.dtype) -> list[Case]:
    """All cases in one element type, what a training step spends most on first."""
    parts = (_products, _attention, _rows, _flat) if dtype.itemsize == 2 else (_flat, _rows, _attention, _products)
    return [case for part in parts for case in part(sizes, dtype)]


def _products(s: Sizes, dtype: np.dtype) -> Iterator[Case]:
    n, c, f, v, item = s.rows, s.width, s.hidden, s.vocabulary, dtype.itemsize

    def case(name: str, function: str, mnk: tuple[int, int, int], make: Any, results: Any, written: float) -> Case:
        m, n, k = mnk
        moved = item * (m * k + k * n) + written * m * n
        return Case(f"{name} {m}x{n}x{k}", function, make, results, 2.0 * m * n * k, moved, mnk)

    def weight(bank: Bank, rows: int, columns: int) -> Any:
        return bank.normal(rows, columns, dtype=dtype, scale=0.02)

    def forward(name: str, k: int, m: int, residual: bool) -> Case:
        def make(bank: Bank) -> tuple[Any, ...]:
            arguments = bank.normal(n, k, dtype=dtype), weight(bank, k, m), bank.normal(m, dtype=dtype)
            return (*arguments, bank.normal(n, m, dtype=dtype)) if residual else arguments

        return case(name, "linear.forward", (n, m, k), make, _returned, item * (1 + residual))

    def backward(name: str, k: int, m: int, pre: bool) -> Case:
        def make(bank: Bank) -> tuple[Any, ...]:
            arguments = bank.normal(n, k, dtype=dtype), weight(bank, m, k)
            return (*arguments, bank.normal(n, m, dtype=dtype)) if pre else arguments

        return case(name, "linear.backward_input", (n, m, k), make, _returned, item * (1 + pre))

    def gradient(name: str, rows: int, m: int, k: int) -> Case:
        def make(bank: Bank) -> tuple[Any, ...]:
            x, dy = bank.normal(rows, m, dtype=dtype), bank.normal(rows, k, dtype=dtype)
            return x.T, dy, bank.normal(m, k), True

        return case(name, "matmul.add", (m, k, rows), make, _argument(2), 8)

    def plain(name: str, mnk: tuple[int, int, int], operands: Callable[[Bank], tuple[Any, Any]]) -> Case:
        def make(bank: Bank) -> tuple[Any, ...]:
            return *operands(bank), bank.xp.empty(mnk[:2], dtype), False

        return case(name, "matmul.add", mnk, make, _argument(2), item)

    for size in s.squares:
        yield plain(
            "square", (size, size, size),
            lambda bank, size=size: (bank.normal(size, size, dtype=dtype), bank.normal(size, size, dtype=dtype)),
        )  # fmt: skip
    yield forward("qkv + bias", c, 3 * c, False)
    yield forward("project + bias + residual", c, c, True)
    yield case(
        "up + bias, GELU", "linear.forward_gelu", (n, f, c),
        lambda bank: (bank.normal(n, c, dtype=dtype), weight(bank, c, f), bank.normal(f, dtype=dtype)), _returned,
        2 * item,
    )  # fmt: skip
    yield case(
        "up, squared ReLU", "linear.forward_relu2", (n, f, c),
        lambda bank: (bank.normal(n, c, dtype=dtype), weight(bank, c, f)), _returned, 2 * item,
    )  # fmt: skip
    yield forward("down + bias + residual", f, c, True)
    yield backward("dgrad qkv", 3 * c, c, False)
    yield backward("dgrad up", f, c, False)
    yield backward("dgrad down · GELU'", c, f, True)
    yield gradient("wgrad project, added", n, c, c)
    yield gradient("wgrad qkv, added", n, c, 3 * c)
    yield gradient("wgrad up, added", n, c, f)
    yield gradient("wgrad down, added", n, f, c)
    for r in s.head_rows:
        yield plain("logits", (r, v, c), lambda bank, r=r: (bank.normal(r, c, dtype=dtype), weight(bank, v, c).T))
        yield plain("dgrad head", (r, c, v), lambda bank, r=r: (bank.normal(r, v, dtype=dtype), weight(bank, v, c)))
        yield gradient("wgrad head, added", r, v, c)


def _attention(s: Sizes, dtype: np.dtype) -> Iterator[Case]:
    for b, h, t, d in s.attention:

        def inputs(bank: Bank, b: int = b, h: int = h, t: int = t, d: int = d) -> Any:
            # q, k, v as views (B, H, T, D) of one fused buffer, as the layer has them
            return bank.normal(b, t, 3, h, d, dtype=dtype).transpose(2, 0, 3, 1, 4)

        def make(bank: Bank, inputs: Any = inputs) -> tuple[Any, ...]:
            qkv = inputs(bank)
            return qkv[0], qkv[1], qkv[2], True

        def make_backward(bank: Bank, inputs: Any = inputs, shape: tuple[int, ...] = (b, t, h, d)) -> tuple[Any, ...]:
            qkv, do = inputs(bank), bank.normal(*shape, dtype=dtype)
            o, lse = attention.forward(qkv[0], qkv[1], qkv[2], True)
            out = inputs(bank)
            return do, qkv[0], qkv[1], qkv[2], o, lse, out[0], out[1], out[2], True

        flops, moved, name = 4.0 * b * h * t * t * d / 2, b * h * t * d * dtype.itemsize, f"B{b} H{h} T{t} D{d} causal"
        yield Case(f"forward {name}", "attention.forward", make, _returned, flops, 4 * moved)
        yield Case(
            f"backward {name}", "attention.backward", make_backward, _argument(6, 7, 8), 2.5 * flops, 8 * moved
        )  # fmt: skip


def _rows(s: Sizes, dtype: np.dtype) -> Iterator[Case]:
    n, c, f, v, item = s.rows, s.width, s.hidden, s.vocabulary, dtype.itemsize

    def normal(*shape: int) -> Callable[[Bank], Any]:
        return lambda bank: bank.normal(*shape, dtype=dtype)

    def make(*parts: Any) -> Callable[[Bank], tuple[Any, ...]]:
        return lambda bank: tuple(part(bank) if callable(part) else part for part in parts)

    def wide(*shape: int) -> Callable[[Bank], Any]:
        return lambda bank: bank.normal(*shape)

    def ids(stop: int, *shape: int) -> Callable[[Bank], Any]:
        return lambda bank: bank.integers(stop, *shape)

    yield Case(f"{n}x{f}", "gelu.forward", make(normal(n, f)), _returned, 0, 2 * item * n * f)
    yield Case(f"{n}x{f}", "gelu.backward", make(normal(n, f), normal(n, f)), _returned, 0, 3 * item * n * f)
    yield Case(f"{n}x{f}", "relu2.forward", make(normal(n, f)), _returned, 0, 2 * item * n * f)
    yield Case(f"{n}x{f}", "relu2.backward", make(normal(n, f), normal(n, f)), _returned, 0, 3 * item * n * f)
    yield Case(f"{n}x2x{f}", "swiglu.forward", make(normal(n, 2, f)), _returned, 0, 3 * item * n * f)
    yield Case(f"{n}x2x{f}", "swiglu.backward", make(normal(n, f), normal(n, 2, f)), _returned, 0, 5 * item * n * f)
    norm = normal(n, c), normal(c), normal(c), EPSILON
    yield Case(f"{n}x{c}", "layernorm.forward", make(*norm), _y_and_statistics, 0, 2 * item * n * c)

    def norm_backward(bank: Bank) -> tuple[Any, ...]:
        x, gain, bias = (part(bank) for part in norm[:3])
        _, statistics = layernorm.forward(x, gain, bias, EPSILON)
        rest = statistics, bank.normal(c), bank.normal(c), False, bank.normal(n, c, dtype=dtype)
        return bank.normal(n, c, dtype=dtype), x, gain, *rest

    yield Case(f"{n}x{c} + residual", "layernorm.backward", norm_backward, _dx_and(4, 5), 0, 4 * item * n * c)
    yield Case(f"{n}x{c}", "rmsnorm.forward", make(*norm[:2], EPSILON), _returned, 0, 2 * item * n * c)

    def rms_backward(bank: Bank) -> tuple[Any, ...]:
        x, gain = (part(bank) for part in norm[:2])
        rest = rmsnorm.forward(x, gain, EPSILON)[1], bank.normal(c), False, bank.normal(n, c, dtype=dtype)
        return bank.normal(n, c, dtype=dtype), x, gain, *rest

    yield Case(f"{n}x{c} + residual", "rmsnorm.backward", rms_backward, _dx_and(4), 0, 4 * item * n * c)
    yield from _heads(s, dtype)
    yield Case(f"{n}x{f}", "linear.bias_gradient", make(normal(n, f), wide(f), False), _argument(1), 0, item * n * f)
    for r in s.head_rows:
        yield Case(
            f"{r}x{v} with gradient", "crossentropy.rows", make(normal(r, v), ids(v, r), None, True),
            lambda arguments, returned: [returned, arguments[0]], 0, 2 * item * r * v,
        )  # fmt: skip
    yield Case(
        f"{n} of {v}x{c}", "embedding.forward", make(ids(v, n // 8, 8), normal(v, c)), _returned, 0, 2 * item * n * c
    )
    yield Case(
        f"{n} into {v}x{c}", "embedding.backward", make(normal(n, c), ids(v, n), wide(v, c)), _argument(2), 0,
        (item + 8) * n * c,
    )  # fmt: skip
    rows, draw = s.dropout_rows, Draw(0.1, (1, 2), 3, 4)
    yield Case(
        f"{rows}x{c}", "dropout.mask", lambda bank: (draw, (rows, c), 0, dtype, bank.xp), _returned, 0, item * rows * c
    )
    yield Case(
        f"{rows}x{c} + residual", "dropout.forward", make(normal(rows, c), draw, normal(rows, c)), _returned, 0,
        3 * item * rows * c,
    )  # fmt: skip


def _heads(s: Sizes, dtype: np.dtype) -> Iterator[Case]:
    # groups of three queries and a key, of 64
    length, width, item = s.rows // 8, 64, dtype.itemsize
    groups = max(1, s.width // (3 * width))
    elements = s.rows * groups * 4 * width

    def heads(bank: Bank) -> Any:
        return bank.normal(8, length, groups, 5, width, dtype=dtype)[:, :, :, :4]  # beside values

    def turned(bank: Bank, normal: bool) -> tuple[Any, ...]:
        tables = (bank.xp.asarray(table) for table in rotary.tables(np.arange(length), width, 10_000.0))
        return heads(bank), *tables, *((bank.normal(2, width, dtype=dtype), EPSILON) if normal else ())

    def backward(bank: Bank) -> tuple[Any, ...]:
        x, *rest, epsilon = turned(bank, True)
        inverse = rotary.forward(x, *rest, epsilon)[1]
        return heads(bank), x, *rest, inverse, bank.normal(2, width), False, 8

    def first(arguments: tuple[Any, ...], returned: Any) -> list[Any]:
        return [returned[0]]

    name, moved = f"8x{length}x{groups}x4x{width}", 2 * item * elements
    yield Case(name, "rotary.forward", lambda bank: turned(bank, False), first, 0, moved)
    yield Case(f"{name}, QK-norm", "rotary.forward", lambda bank: turned(bank, True), _returned, 0, moved)
    yield Case(f"{name}, QK-norm", "rotary.backward", backward, _dx_and(6), 0, 1.5 * moved)


def _y_and_statistics(arguments: tuple[Any, ...], returned: Any) -> list[Any]:
    return [returned[0], returned[1][0], returned[1][1]]


def _dx_and(*places: int) -> Callable[..., list[Any]]:
    return lambda arguments, returned: [returned, *(arguments[place] for place in places)]


def _flat(s: Sizes, dtype: np.dtype) -> Iterator[Case]:
    n, other = s.flat, np.dtype(np.float32 if dtype.itemsize == 2 else ml_dtypes.bfloat16)
    yield Case(
        f"{n}", "cast.to", lambda bank: (bank.normal(n, dtype=dtype), bank.xp.empty(n, other)), _argument(1), 0, 6 * n
    )
    if dtype.itemsize == 2:
        return  # what follows has float32 only
    a = ADAMW
    numbers = (
        1.0, a["beta1"], a["beta2"], (1 - a["beta2"] ** a["step"]) ** -0.5, a["eps"],
        a["lr"] / (1 - a["beta1"] ** a["step"]), 1 - a["lr"] * a["weight_decay"],
    )  # fmt: skip

    def adamw(bank: Bank) -> tuple[Any, ...]:
        v = bank.normal(n)
        v *= v
        return bank.normal(n), bank.normal(n), bank.normal(n), v, *numbers

    yield Case(f"{n}", "adamw.update", adamw, _argument(0, 2, 3), 0, 28 * n)
    yield Case(
        f"{n} + bf16 copy", "adamw.update", lambda bank: (*adamw(bank), bank.xp.empty(n, other)),
        _argument(0, 2, 3, 11), 0, 30 * n,
    )  # fmt: skip
    yield Case(f"{n}", "clip.squares", lambda bank: (bank.normal(n), s.block), _returned, 0, 4 * n)
    part = n // 8
    yield Case(
        f"8 of {part}", "sums.tree",
        lambda bank: ([bank.normal(part) for _ in range(8)], MERGES, bank.xp.empty(part, np.float32)), _argument(2), 0,
        36 * part,
    )  # fmt: skip
