"""The same GPT-2 in PyTorch: the peer of `step.py` and `quality.py`, and the oracle of tests/golden.

Runs in an environment of its own that has PyTorch (the package and its tests never import it):

    python3 -m venv /tmp/torchenv
    /tmp/torchenv/bin/pip install torch numpy h5py msgspec tokenizers threadpoolctl psutil
    /tmp/torchenv/bin/pip install -e . --no-deps

Independent of `mlm_mpi`'s mathematics: nn.Linear, nn.LayerNorm, F.scaled_dot_product_attention,
F.cross_entropy, torch.optim.AdamW and, on several ranks, DistributedDataParallel over gloo; of the package it
uses the random draws, the schedule and the loader.
"""

import json
import math
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mlm_mpi import config
from mlm_mpi.backend.arrays import keep_freed_memory
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.loader import Loader, TokenStream, heldout_batches
from mlm_mpi.data.sampler import Sampler, windows_of
from mlm_mpi.models import gpt
from mlm_mpi.optim.schedule import learning_rate
from mlm_mpi.params.store import FlatStore


class PeerBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, epsilon: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=epsilon)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=epsilon)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(c, dim=2)
        q, k, v = (a.view(b, t, self.heads, c // self.heads).transpose(1, 2) for a in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(o.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class PeerGPT(nn.Module):
    """GPT-2 as nanoGPT writes it: pre-norm, learned positions, tanh GELU, tied head."""

    def __init__(self, model: config.Model, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, model.width)
        self.positions = nn.Embedding(model.context, model.width)
        self.blocks = nn.ModuleList(
            PeerBlock(model.width, model.heads, model.feed_forward, model.norm_epsilon) for _ in range(model.layers)
        )
        self.norm = nn.LayerNorm(model.width, eps=model.norm_epsilon)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Cross-entropy of the targets; a target of −100 does not count."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), reduction=reduction)

    def pairs(self) -> dict[str, tuple[nn.Parameter, bool]]:
        """Our name of every parameter -> (parameter, whether PyTorch stores the matrix the other way round)."""
        out: dict[str, tuple[nn.Parameter, bool]] = {
            "embed.tokens": (self.tokens.weight, False),
            "embed.positions": (self.positions.weight, False),
            "final.norm.gain": (self.norm.weight, False),
            "final.norm.bias": (self.norm.bias, False),
        }
        for i, block in enumerate(self.blocks):
            for ours, module in (("norm1", block.norm1), ("norm2", block.norm2)):
                out[f"block{i}.{ours}.gain"] = module.weight, False
                out[f"block{i}.{ours}.bias"] = module.bias, False
            for ours, module in (
                ("attention.qkv", block.qkv), ("attention.project", block.project),
                ("feed_forward.up", block.up), ("feed_forward.down", block.down),
            ):  # fmt: skip
                out[f"block{i}.{ours}.weight"] = module.weight, True
                out[f"block{i}.{ours}.bias"] = module.bias, False
        return out

    def load(self, weights: dict[str, np.ndarray]) -> None:
        """Takes our weights."""
        pairs = self.pairs()
        assert pairs.keys() == weights.keys(), pairs.keys() ^ weights.keys()
        with torch.no_grad():
            for name, (parameter, turned) in pairs.items():
                mine = torch.from_numpy(np.array(weights[name]))
                flat = mine.reshape(mine.shape[0], -1).T if turned else mine.reshape(parameter.shape)
                parameter.copy_(flat)

    def export(self, gradients: bool = False) -> dict[str, np.ndarray]:
        """Weights or gradients under our names, two-dimensional matrices turned our way."""
        out = {}
        for name, (parameter, turned) in self.pairs().items():
            value = (parameter.grad if gradients else parameter).detach().numpy()
            out[name] = np.array(value.T if turned else value)
        return out


def decays(name: str) -> bool:
    """Weight decay acts on matrices and the token table, not on norms, biases and positions."""
    return name.endswith(".weight") or name == "embed.tokens"


def make_adamw(model: PeerGPT, optim: config.Optim, **kind: bool) -> torch.optim.AdamW:
    """AdamW with the two usual parameter groups."""
    pairs = model.pairs()
    groups = [
        {"params": [p for name, (p, _) in pairs.items() if decays(name)], "weight_decay": optim.weight_decay},
        {"params": [p for name, (p, _) in pairs.items() if not decays(name)], "weight_decay": 0.0},
    ]
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW(groups, lr=optim.learning_rate, betas=betas, eps=optim.epsilon, **kind)


def train_step(
    model: nn.Module, adamw: torch.optim.AdamW, batch: torch.Tensor, rate: float, clip: float, bf16: bool
) -> float:
    """What a PyTorch user writes: forward, backward, clip, update; the mean loss of all ranks."""
    for group in adamw.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(batch[:, :-1], batch[:, 1:])
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    adamw.step()
    adamw.zero_grad(set_to_none=True)
    loss = loss.detach()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return float(loss)


def slowest(seconds: list[float]) -> list[float]:
    """Position by position, the largest of all ranks."""
    table = torch.tensor(seconds, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(table, dist.ReduceOp.MAX)
    return table.tolist()


def join(ranks: int) -> int:
    """Starts the other ranks, as torchrun does, joins them over gloo and returns this process's rank."""
    if ranks == 1:
        return 0
    rank = int(os.environ.get("TORCH_PEER_RANK", "0"))
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        for other in range(1, ranks):
            environment = os.environ | {"TORCH_PEER_RANK": str(other)}
            subprocess.Popen([sys.executable, *sys.argv], env=environment, stdin=subprocess.DEVNULL)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    return rank


def turns(rank: int) -> Iterator[int]:
    """Numbers of steps, one for every line {"steps": n} that rank 0 reads; ends at an empty line."""
    while True:
        line = sys.stdin.readline().strip() if rank == 0 else ""
        steps = torch.tensor(json.loads(line)["steps"] if line else 0)
        if dist.is_initialized():
            dist.broadcast(steps, 0)
        if not steps:
            return
        yield int(steps)


def best_adamw(model: PeerGPT, optim: config.Optim) -> tuple[str, torch.optim.AdamW]:
    """PyTorch's fastest AdamW on the gradients at hand; tried one after the other, so one state is held at a time."""
    kinds = ("fused", "foreach")
    seconds = []
    for kind in kinds:
        adamw = make_adamw(model, optim, **{kind: True})
        times = []
        for _ in range(4):
            start = time.perf_counter()
            adamw.step()
            times.append(time.perf_counter() - start)
        adamw.state.clear()
        seconds.append(min(times))
    seconds = slowest(seconds)
    best = kinds[seconds.index(min(seconds))]
    return best, make_adamw(model, optim, **{best: True})


def measure(job: dict[str, Any]) -> None:
    """Serves `step.py`: for every line {"steps": n} on stdin, n steps, and what they cost as a line of JSON."""
    rank = join(job["ranks"])

    def write(value: dict[str, Any]) -> None:
        if rank == 0:
            print(json.dumps(value), flush=True)

    model_config, optim = config.Model(**job["model"]), config.Optim(**job["optim"])
    rows, vocabulary = job["rows"], job["vocabulary"]
    plain = PeerGPT(model_config, vocabulary)
    nn.init.normal_(plain.tokens.weight, std=0.02)
    model: Any = DistributedDataParallel(plain, gradient_as_bucket_view=True) if job["ranks"] > 1 else plain
    if job["compile"]:
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of compilers that stays
        model = torch.compile(model)
    random = np.random.default_rng(1 + rank)

    def batch() -> torch.Tensor:
        return torch.from_numpy(random.integers(0, vocabulary, (rows, model_config.context + 1)))

    try:
        first = batch()
        model(first[:, :-1], first[:, 1:]).backward()
    except Exception as error:
        if not job["compile"]:
            raise
        return write({"skip": str(error).strip().partition("\n")[0]})
    kind, adamw = best_adamw(plain, optim)
    adamw.zero_grad(set_to_none=True)

    write({"about": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, AdamW {kind}"})
    for steps in turns(rank):
        seconds, faults = [], []
        for _ in range(steps):
            fresh = batch()
            if dist.is_initialized():
                dist.barrier()
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
            train_step(model, adamw, fresh, 1e-4, optim.clip, job["bf16"])
            seconds.append(time.perf_counter() - start)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        most = slowest([*seconds, *faults, peak])
        write({"seconds": most[:steps], "faults": most[steps:-1], "peak_bytes": most[-1]})
    if dist.is_initialized():
        dist.destroy_process_group()


def quality(job: dict[str, Any]) -> None:
    """Serves `quality.py`: trains on our micro-batches from our initial weights, then evaluates held out."""
    c = config.from_table(job["config"], "the parent")
    corpus = Catalog.open(c.data.dir)
    vocabulary = corpus.tokenizer().vocab_size
    train, context = c.train, c.model.context
    torch.set_default_dtype({"float32": torch.float32, "float64": torch.float64}[train.dtype])
    model = PeerGPT(c.model, vocabulary)
    store = FlatStore(gpt.build(c.model, vocabulary).parameter_blocks(), Mesh(), train.dtype)
    store.initialise(train.seed)
    model.load(store.named(store.data))
    adamw = make_adamw(model, c.optim, fused=True)
    sampler = Sampler(train.seed, windows_of(corpus.tokens("train"), context), train.micro_batches, train.rows)
    loader = Loader(TokenStream(corpus, "train"), sampler, context, c.data.prefetch)
    print(json.dumps({"torch": torch.__version__}), flush=True)
    sys.stdin.readline()

    losses = []
    targets = train.micro_batches * train.rows * context
    for step in range(train.steps):
        total = 0.0
        for index in range(train.micro_batches):
            batch = loader.micro_batch(step, index)
            loss = model(torch.from_numpy(batch.ids).long(), torch.from_numpy(batch.targets).long(), "sum") / targets
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        if c.optim.clip:
            nn.utils.clip_grad_norm_(model.parameters(), c.optim.clip)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(c.optim, train.steps, step)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    nats, count = 0.0, 0
    stream = TokenStream(corpus, "heldout")
    with torch.no_grad():
        for batch in heldout_batches(stream, context, c.eval.rows):
            wanted = batch.targets if batch.mask is None else np.where(batch.mask, batch.targets, -100)
            nats += float(model(torch.from_numpy(batch.ids).long(), torch.from_numpy(wanted).long(), "sum"))
            count += batch.targets_count
    bits = nats / math.log(2.0) / corpus.characters("heldout")
    print(json.dumps({"losses": losses, "loss": nats / count, "bits_per_character": bits}), flush=True)


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.set_num_interop_threads(1)
    if job["keep_freed_memory"]:
        keep_freed_memory()
    torch.manual_seed(0)
    {"step": measure, "quality": quality}[job["task"]](job)


if __name__ == "__main__":
    main()
