"""The same GPT-2 in PyTorch: the peer of `step.py` and `quality.py`, and the oracle of tests/golden.

Runs in an environment of its own that has PyTorch (the package and its tests never import it):

    python3 -m venv /tmp/torchenv
    /tmp/torchenv/bin/pip install torch numpy h5py msgspec tokenizers threadpoolctl psutil ml_dtypes
    /tmp/torchenv/bin/pip install -e . --no-deps

The model is `torch_gpt.py`; on several ranks it is trained by DistributedDataParallel over gloo. Of the package
it uses the random draws, the schedule and the loader.
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
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch_gpt import PeerGPT, make_adamw
from torch_llama import PeerLlama

from mlm_mpi import config
from mlm_mpi.backend.choice import keep_freed_memory
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.data.batch import Batch
from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.loader import Loader
from mlm_mpi.data.mixture import mixture_of
from mlm_mpi.data.objectives import causal
from mlm_mpi.data.sampler import Sampler
from mlm_mpi.data.stream import TokenStream
from mlm_mpi.layers.base import Sizes
from mlm_mpi.models import gpt, llama
from mlm_mpi.optim.adamw import Settings
from mlm_mpi.params.store import FlatStore
from mlm_mpi.plug import Plugins
from mlm_mpi.rates import learning_rate
from mlm_mpi.tasks import language_model


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


def best_adamw(model: PeerGPT | PeerLlama, optim: Settings) -> tuple[str, torch.optim.AdamW]:
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

    kind, peer = {"gpt": (gpt, PeerGPT), "llama": (llama, PeerLlama)}[job["model"]["kind"]]
    model_config, optim = kind.Settings(**job["model"]), Settings(**job["optim"])
    rows, vocabulary = job["rows"], job["vocabulary"]
    plain = peer(model_config, vocabulary)
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
    store = FlatStore(
        [part.parameters() for part in language_model.parts(c, Plugins(), Sizes(vocabulary))], Mesh(), train.dtype
    )
    store.initialise(train.seed)
    model.load(store.named(store.data))
    adamw = make_adamw(model, c.optim, fused=True)
    samples = causal.samples(TokenStream(corpus, "train"), context, training=True)
    sampler = Sampler(train.seed, mixture_of(samples), train.micro_batches, train.rows_ramp())
    loader = Loader(samples, sampler, c.data.prefetch)
    decay = Plugins().find("rates", c.optim.schedule, "optim.schedule").rate
    print(json.dumps({"torch": torch.__version__}), flush=True)
    sys.stdin.readline()

    losses, began = [], time.perf_counter()
    targets = train.micro_batches * train.rows * context
    for step in range(train.steps):
        total = 0.0
        for index in range(train.micro_batches):
            batch = loader.micro_batch(step, index)
            loss = model(*_tensors(batch), "sum") / targets
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        if c.optim.clip:
            nn.utils.clip_grad_norm_(model.parameters(), c.optim.clip)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(
                c.optim.learning_rate, c.optim.warmup_steps, c.optim.final_fraction, decay, train.steps, step
            )
        adamw.step()
        adamw.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began

    nats, count = 0.0, 0
    heldout = causal.samples(TokenStream(corpus, "heldout"), context, training=False)
    rows = min(c.eval.rows, len(heldout))
    with torch.no_grad():
        for number, start in enumerate(range(0, len(heldout), rows)):
            batch = heldout.batch(range(start, min(start + rows, len(heldout))), 0, number, rows)
            nats += float(model(*_tensors(batch), "sum"))
            count += batch.count
    bits = nats / math.log(2.0) / corpus.characters("heldout")
    print(
        json.dumps({"losses": losses, "loss": nats / count, "bits_per_character": bits, "seconds": seconds}), flush=True
    )


def _tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and targets, -100 where they do not count."""
    wanted, mask = batch.targets["ids"], batch.targets.get("mask")
    wanted = wanted if mask is None else np.where(mask, wanted, -100)
    return torch.from_numpy(batch.inputs["ids"]).long(), torch.from_numpy(wanted).long()


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
