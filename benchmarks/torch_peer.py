"""The same GPT-2 in PyTorch eager: the peer of `step.py` and `quality.py`, and the oracle of tests/golden.

Runs in an environment of its own that has PyTorch (the package and its tests never import it):

    python3 -m venv /tmp/torchenv
    /tmp/torchenv/bin/pip install torch numpy h5py msgspec tokenizers threadpoolctl psutil
    /tmp/torchenv/bin/pip install -e . --no-deps

Independent of `mlm_mpi`'s mathematics: nn.Linear, nn.LayerNorm, F.scaled_dot_product_attention,
F.cross_entropy and torch.optim.AdamW; of the package it uses the random draws, the schedule and the loader.
"""

import json
import math
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

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


def train_step(model: PeerGPT, adamw: torch.optim.AdamW, ids: Any, targets: Any, rate: float, clip: float) -> float:
    """What a PyTorch user writes: forward, backward, clip, update."""
    for group in adamw.param_groups:
        group["lr"] = rate
    loss = model(ids, targets)
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    adamw.step()
    adamw.zero_grad(set_to_none=True)
    return float(loss.detach())


def measure(job: dict[str, Any]) -> None:
    """Serves `step.py`: for every line {"steps": n} on stdin, n steps, and their seconds as a line of JSON."""
    model_config = config.Model(**job["model"])
    optim = config.Optim(**job["optim"])
    rows, vocabulary = job["rows"], job["vocabulary"]
    model = PeerGPT(model_config, vocabulary)
    nn.init.normal_(model.tokens.weight, std=0.02)
    random = np.random.default_rng(1)

    def step(adamw: torch.optim.AdamW) -> tuple[float, float]:
        batch = torch.from_numpy(random.integers(0, vocabulary, (rows, model_config.context + 1)))
        start = time.perf_counter()
        loss = train_step(model, adamw, batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), 1e-4, optim.clip)
        return time.perf_counter() - start, loss

    kinds = {"fused": {"fused": True}, "foreach": {"foreach": True}}
    optimizers = {name: make_adamw(model, optim, **kind) for name, kind in kinds.items()}
    tried = {}
    for name, adamw in optimizers.items():
        step(adamw)
        tried[name] = min(step(adamw)[0] for _ in range(2))
    best = min(tried, key=lambda name: tried[name])
    print(json.dumps({"torch": torch.__version__, "adamw": best, "cpu": torch.backends.cpu.get_cpu_capability()}))
    sys.stdout.flush()
    for line in iter(lambda: sys.stdin.readline().strip(), ""):
        seconds = [step(optimizers[best])[0] for _ in range(json.loads(line)["steps"])]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}))
        sys.stdout.flush()


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
