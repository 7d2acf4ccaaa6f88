"""A worker of `gpu_check.py`: a training step of GPT-2, ours or PyTorch's; a line of JSON answers {"steps": n}.

    echo '{"steps": 2}' | python benchmarks/gpu_step.py '{"side": "ours", "model": {…}, "vocabulary": 64, "rows": 2}'

Both: bfloat16 activations and products, float32 master weights, gradients and moments, forward, backward, clipping and
AdamW, fresh tokens each step. Ours is what `train/engine.py` does on one rank with one micro-batch; with `graphs` it
replays CUDA graphs; PyTorch's goes through torch.compile with `compile`.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed

import numpy as np

OPTIM = SimpleNamespace(
    name="adamw", learning_rate=3e-4, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, clip=1.0
)
BATCHES = 8  # made before anything is timed

# a step -> its mean loss, which the device may not have computed yet; wait for the device; facts afterwards
Side = tuple[Callable[[np.ndarray], Any], Callable[[], None], Callable[[], dict[str, Any]]]


def ours(job: dict[str, Any], model: Any) -> Side:
    """FlatStore, GPT, norm, AdamW as an engine of one rank has them."""
    import cupy

    from mlm_mpi.backend import choice, registry
    from mlm_mpi.backend.arrays import gpu
    from mlm_mpi.comm.mesh import Mesh
    from mlm_mpi.data.batch import Batch
    from mlm_mpi.layers.base import Context, Sizes
    from mlm_mpi.layers.chain import Chain
    from mlm_mpi.layers.head import TokenHead
    from mlm_mpi.models import gpt
    from mlm_mpi.optim import adamw
    from mlm_mpi.params.clip import clip_factor, norm
    from mlm_mpi.params.store import FlatStore
    from mlm_mpi.train.captured import Captured

    place = gpu("float32", job["products"], 0)
    choice.select(reference=job["reference"], device="cuda")
    trunk = gpt.build(model, Sizes(job["vocabulary"]))
    chain = Chain([*trunk.parts, TokenHead(trunk)])
    store = FlatStore(chain.parameter_blocks(), Mesh(), "float32", place)
    random = np.random.default_rng(0)
    for span, view in zip(store.spans, store.views(store.data), strict=True):
        draw = isinstance(span.parameter.init, float)
        host = random.standard_normal(span.shape, np.float32) * span.parameter.init if draw else None
        view[...] = {"ones": 1.0, "zeros": 0.0}[span.parameter.init] if host is None else cupy.asarray(host)
    store.refresh()
    optimizer, gradient = adamw.build(OPTIM, store, Mesh()), store.new_buffer()
    views = store.by_parameter(gradient)
    captured = Captured(chain, place) if job["graphs"] else None
    done = 0

    def step(tokens: np.ndarray) -> Any:
        nonlocal done
        ids, targets = (np.ascontiguousarray(part) for part in (tokens[:, :-1], tokens[:, 1:]))
        batch = Batch(done, 0, {"ids": ids}, {"ids": targets}, targets.size)
        ctx = Context(step=done, training=True, batch=batch, gradients=views)
        if captured is None:
            ctx = replace(ctx, batch=batch.map(place.put))
            _, kept = chain.forward((), ctx)
            chain.backward((), kept, ctx)
        else:
            captured.forward_backward(ctx)
        loss = ctx.tally["loss"]
        length, broken = norm(store, gradient)
        if broken is not None:
            raise ArithmeticError(f"step {done}: the gradient of {broken} is not finite")
        done += 1
        factor = clip_factor(OPTIM.clip, length / targets.size)
        optimizer.step(gradient, OPTIM.learning_rate, factor / targets.size, done)
        return loss / targets.size

    def facts() -> dict[str, Any]:
        held = cupy.get_default_memory_pool().total_bytes()
        held += captured.graphs.pool.total_bytes() if captured else 0
        return {"peak_bytes": held, "fallbacks": registry.fallbacks(), "refusals": registry.refusals()}

    return step, cupy.cuda.Device().synchronize, facts


def theirs(job: dict[str, Any], model: Any) -> Side:
    """nn.Linear, SDPA, autocast, fused AdamW; `compile`: through torch.compile."""
    import torch
    from torch import nn
    from torch_gpt import PeerGPT, make_adamw

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    plain = PeerGPT(model, job["vocabulary"]).to(device)
    for parameter in plain.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=model.init_std)
    adamw = make_adamw(plain, OPTIM, fused=True)
    run: Any = torch.compile(plain) if job["compile"] else plain

    def step(tokens: np.ndarray) -> Any:
        batch = torch.from_numpy(tokens).to(device, non_blocking=True).long()
        with torch.autocast(device, torch.bfloat16):
            loss = run(batch[:, :-1], batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), OPTIM.clip)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.detach()

    def facts() -> dict[str, Any]:
        return {"peak_bytes": torch.cuda.max_memory_reserved() if device == "cuda" else 0}

    return step, torch.cuda.synchronize if device == "cuda" else lambda: None, facts


def main() -> None:
    job = {"products": "bf16", "reference": "", "compile": False, "graphs": False} | json.loads(sys.argv[1])
    model, rows = SimpleNamespace(**job["model"]), job["rows"]
    random = np.random.default_rng(1)
    batches = [
        random.integers(0, job["vocabulary"], (rows, model.context + 1)).astype(np.int32) for _ in range(BATCHES)
    ]

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)

    began = time.perf_counter()
    try:
        step, wait, facts = {"ours": ours, "torch": theirs}[job["side"]](job, model)
        losses = [float(step(batches[number])) for number in range(3)]  # compiles, allocates, captures
        wait()
    except Exception as error:
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        return say({"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"})
    say({"ready_s": time.perf_counter() - began, "losses": losses})
    number = 0
    for line in sys.stdin:
        if not line.strip():
            return
        steps = json.loads(line)["steps"]
        wait()
        began = time.perf_counter()
        for _ in range(steps):
            loss = step(batches[number % BATCHES])
            number += 1
        wait()
        say({"seconds": (time.perf_counter() - began) / steps, "loss": float(loss)} | facts())


if __name__ == "__main__":
    main()
