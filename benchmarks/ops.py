"""Time of each op at the reference size: kernel, NumPy reference and PyTorch in turns, on one thread.

    OPENBLAS_NUM_THREADS=1 python benchmarks/ops.py --pairs 7 [--peer torch]

Seconds are CPU time of the thread, so that other work of the machine enters by the caches only. GB/s counts what an op
must read and write once; GFLOP/s of attention counts the half that causality leaves. "Of roof": GFLOP/s over
sgemm's, GB/s over a large copy's (bytes read and written) in the same run; what stays in cache may exceed it.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
from harness import SIZES, Report

from mlm_mpi.backend import choice, registry, sums
from mlm_mpi.ops import (
    attention,
    crossentropy,
    dropout,
    embedding,
    gelu,
    layernorm,
    linear,
    matmul,
    relu2,
    rmsnorm,
    rotary,
    swiglu,
)
from mlm_mpi.ops.dropout import Draw
from mlm_mpi.optim import adamw
from mlm_mpi.params import clip

# name, function, arguments, bytes moved, flops
Row = tuple[str, Callable[..., Any], tuple[Any, ...], float, float]


def rows() -> tuple[list[Row], dict[str, np.ndarray]]:
    """(one call of each op as a step of the reference model makes it, the arrays that PyTorch is given too)."""
    size, r = SIZES["reference"], np.random.default_rng(0)
    b, t, c, h, v = size["rows"], size["context"], size["width"], size["heads"], size["vocabulary"]
    n, f, d = b * t, 4 * c, c // h

    def f4(*shape: int) -> np.ndarray:
        return r.standard_normal(shape, dtype="f4")

    up, down = f4(c, f), f4(f, c)
    x, dy, wide, dwide, gain, bias = f4(n, c), f4(n, c), f4(n, f), f4(n, f), f4(c), f4(c)
    q, k, w = f4(b, t, 3, h, d).transpose(2, 0, 3, 1, 4)
    do, dqkv = f4(b, t, h, d), f4(b, t, 3, h, d).transpose(2, 0, 3, 1, 4)
    o, lse = attention.forward(q, k, w)
    _, statistics_ = layernorm.forward(x, gain, bias, 1e-5)
    _, inverse = rmsnorm.forward(x, gain, 1e-5)
    pre, heads, dheads = f4(n, 2, f), f4(b, t, h // 2, 4, d)[:, :, :, :3], f4(b, t, h // 2, 4, d)[:, :, :, :3]
    turns, weights = rotary.tables(np.arange(t), d, 10_000.0), f4(2, d)
    _, of_heads = rotary.forward(heads, *turns, weights, 1e-5)
    ids, targets = r.integers(0, v, n).astype("i4"), r.integers(0, v, 512).astype("i4")
    logits, table, draw = f4(512, v), f4(v, c), Draw(0.1, (1, 2), 3, 4)
    p, g, m, s = f4(1 << 22), f4(1 << 22), f4(1 << 22), np.abs(f4(1 << 22))
    numbers = (1.0, 0.9, 0.95, 1.0, 1e-8, 1e-5, 1.0)
    flops = 4.0 * b * h * t * t * d / 2
    shared = {
        "x": x, "dy": dy, "wide": wide, "dwide": dwide, "up": up, "down": down, "gain": gain, "bias": bias, "q": q,
        "k": k, "w": w, "do": do, "logits": logits, "table": table, "ids": ids, "targets": targets, "p": p, "g": g,
    }  # fmt: skip
    calls: list[Row] = [
        ("linear.forward, up", linear.forward, (x, up, f4(f)), 0, 2.0 * n * c * f),
        ("linear.forward, down, residual", linear.forward, (wide, down, bias, x), 0, 2.0 * n * c * f),
        ("matmul.add dy Wᵀ, up", matmul.add, (dwide, up.T, f4(n, c), False), 0, 2.0 * n * c * f),
        ("matmul.add dy Wᵀ, down", matmul.add, (dy, down.T, f4(n, f), False), 0, 2.0 * n * c * f),
        ("matmul.add xᵀdy, up", matmul.add, (x.T, dwide, f4(c, f), False), 0, 2.0 * n * c * f),
        ("matmul.add xᵀdy, up, accumulated", matmul.add, (x.T, dwide, f4(c, f), True), 0, 2.0 * n * c * f),
        ("matmul.add xᵀdy, down", matmul.add, (wide.T, dy, f4(f, c), False), 0, 2.0 * n * c * f),
        ("matmul.add, logits", matmul.add, (x[:512], table.T, logits, False), 0, 2.0 * logits.size * c),
        ("matmul.add, logits' dx", matmul.add, (logits, table, f4(512, c), False), 0, 2.0 * logits.size * c),
        ("matmul.add, logits' dW", matmul.add, (logits.T, x[:512], f4(v, c), False), 0, 2.0 * logits.size * c),
        ("linear.bias_gradient", linear.bias_gradient, (dwide, f4(f), False), 4 * n * f, 0),
        ("gelu.forward", gelu.forward, (wide,), 8 * n * f, 0),
        ("gelu.backward", gelu.backward, (dwide, wide), 12 * n * f, 0),
        ("layernorm.forward", layernorm.forward, (x, gain, bias, 1e-5), 8 * n * c, 0),
        ("layernorm.backward", layernorm.backward, (dy, x, gain, statistics_, f4(c), f4(c), False, dy), 16 * n * c, 0),
        ("rmsnorm.forward", rmsnorm.forward, (x, gain, 1e-5), 8 * n * c, 0),
        ("rmsnorm.backward", rmsnorm.backward, (dy, x, gain, inverse, f4(c), False, dy), 16 * n * c, 0),
        ("relu2.forward", relu2.forward, (wide,), 8 * n * f, 0),
        ("relu2.backward", relu2.backward, (dwide, wide), 12 * n * f, 0),
        ("swiglu.forward", swiglu.forward, (pre,), 12 * n * f, 0),
        ("swiglu.backward", swiglu.backward, (dwide, pre), 20 * n * f, 0),
        ("rotary.forward", rotary.forward, (heads, *turns), 8 * heads.size, 0),
        ("rotary.forward, QK-norm", rotary.forward, (heads, *turns, weights, 1e-5), 8 * heads.size, 0),
        ("rotary.backward", rotary.backward, (dheads, None, *turns), 8 * heads.size, 0),
        (
            "rotary.backward, QK-norm",
            rotary.backward,
            (dheads, heads, *turns, weights, of_heads, f4(2, d), False, b),
            12 * heads.size,
            0,
        ),
        ("attention.forward", attention.forward, (q, k, w), 16 * n * c, flops),
        ("attention.backward", attention.backward, (do, q, k, w, o, lse, *dqkv), 32 * n * c, 2.5 * flops),
        ("attention.forward, dropout", attention.forward, (q, k, w, True, draw), 16 * n * c, flops),
        ("crossentropy.rows, 512 rows", crossentropy.rows, (logits, targets, None, True), 8 * logits.size, 0),
        ("crossentropy.rows, capped", crossentropy.rows, (logits, targets, None, True, 1, 30.0), 8 * logits.size, 0),
        ("embedding.forward", embedding.forward, (ids, table), 8 * n * c, 0),
        ("embedding.backward", embedding.backward, (dy, ids, table), 12 * n * c, 0),
        ("dropout.forward with residual", dropout.forward, (x, draw, dy), 12 * n * c, 0),
        ("sums.tree, 4 leaves of 1 MiB", sums.tree, (list(f4(4, 1 << 18)), (0, 1, 0, 2), f4(1 << 18)), 5 << 20, 0),
        ("adamw.update, 4 Mi elements", adamw.update, (p, g, m, s, *numbers), 28 * p.size, 0),
        ("clip.squares, 4 Mi elements", clip.squares, (p, 65536), 4 * p.size, 0),
    ]
    return calls, shared


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 256 MiB, the best of 5."""
    source, target = np.ones(1 << 26, "f4"), np.empty(1 << 26, "f4")
    best = float("inf")
    for _ in range(5):
        start = time.thread_time()
        np.copyto(target, source)
        best = min(best, time.thread_time() - start)
    return 2 * source.nbytes / best


def in_turns(variants: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """CPU seconds of every variant in each of `turns` turns, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(turns + 1):
        for name, run in variants.items():
            start = time.thread_time()
            run()
            seconds[name].append(time.thread_time() - start)
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--peer", choices=("torch",), help="PyTorch too, which this Python must have")
    args = parser.parse_args()
    choice.keep_freed_memory()
    choice.select()
    calls, shared = rows()
    torch_calls: dict[str, Callable[[], Any]] = {}
    if args.peer:
        from ops_torch import peers

        torch_calls = peers(shared)
    flops_roof, bytes_roof = harness.peak_flops(), copy_bandwidth()
    report = Report("ops", "Time of each op", args)
    report.say(f"kernels: {registry.summary()}; sgemm {flops_roof / 1e9:.1f} GFLOP/s, copy {bytes_roof / 1e9:.1f} GB/s")
    report.say()
    report.head("op", "NumPy ms", "PyTorch ms", "kernel ms", "GB/s", "GFLOP/s", "of roof", "× NumPy", "× PyTorch")
    for name, function, arguments, moved, flops in calls:
        variants = {
            "ours": lambda f=function, a=arguments: f(*a),
            "numpy": lambda f=function, a=arguments: f.__wrapped__(*a),
        }
        if name in torch_calls:
            variants["torch"] = torch_calls[name]
        seconds = in_turns(variants, args.pairs)
        ours, numpy = statistics.median(seconds["ours"]), statistics.median(seconds["numpy"])
        torch_ms = torch_ratio = ""
        if name in torch_calls:
            torch_ms = f"{1e3 * statistics.median(seconds['torch']):.2f}"
            torch_ratio = f"{harness.pair_ratio(seconds['ours'], seconds['torch']):.2f}"
        share = flops / ours / flops_roof if flops else moved / ours / bytes_roof
        report.row(
            name, f"{1e3 * numpy:.2f}", torch_ms, f"{1e3 * ours:.2f}", f"{moved / ours / 1e9:.1f}" if moved else "",
            f"{flops / ours / 1e9:.1f}" if flops else "", f"{share:.0%}",
            f"{harness.pair_ratio(seconds['ours'], seconds['numpy']):.2f}", torch_ratio,
        )  # fmt: skip
    report.save()


if __name__ == "__main__":
    main()
