"""GPT-2 cut over two ranks by PyTorch's own tensor parallelism: the peer of `meshes.py`.

`torch.distributed.tensor.parallel` over gloo, as its documentation shows it for a Llama: queries, keys, values and the
first product of the feed-forward cut by columns, the other two by rows, table and head by the vocabulary, the loss in
parallel. Runs in an environment of its own that has PyTorch; of the package it imports nothing. The head has a table of
its own, which DTensor cannot share with the embedding's; nothing is saved by that here.
"""

import json
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

RANKS = 2


class Block(nn.Module):
    """As `torch_gpt.PeerBlock`; heads can be cut only where queries, keys and values are products of their own."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.head = width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        n = self.norm1(x)
        q, k, v = (f(n).view(b, t, -1, self.head).transpose(1, 2) for f in (self.query, self.key, self.value))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(o.transpose(1, 2).reshape(b, t, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, model: Any, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, model.width), nn.Embedding(model.context, model.width)
        hidden = model.feed_forward or 4 * model.width
        self.blocks = nn.ModuleList(Block(model.width, model.heads, hidden) for _ in range(model.layers))
        self.norm = nn.LayerNorm(model.width)
        self.output = nn.Linear(model.width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))


def shared_out(model: GPT) -> GPT:
    """Over all ranks."""
    mesh = init_device_mesh("cpu", (RANKS,))
    columns, rows = ColwiseParallel, RowwiseParallel
    for block in model.blocks:
        plan = {"query": columns(), "key": columns(), "value": columns(), "project": rows()}
        parallelize_module(block, mesh, plan | {"up": columns(), "down": rows()})
    ends = {
        "tokens": RowwiseParallel(input_layouts=Replicate()),
        "output": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    return parallelize_module(model, mesh, ends)


def join() -> int:
    """Starts the other rank, joins it over gloo, returns this process's rank."""
    rank = int(os.environ.get("TORCH_PEER_RANK", "0"))
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        environment = os.environ | {"TORCH_PEER_RANK": "1"}
        subprocess.Popen([sys.executable, *sys.argv], env=environment, stdin=subprocess.DEVNULL)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    return rank


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    rank = join()
    torch.manual_seed(0)
    model = shared_out(GPT(SimpleNamespace(**job["model"]), job["vocabulary"]))
    parameters = list(model.parameters())
    mine = [p.detach().to_local() if isinstance(p, DTensor) else p.detach() for p in parameters]
    adamw = torch.optim.AdamW(mine, lr=1e-4, fused=True)  # which takes no mixture of DTensors and others
    shape = job["rows"], job["model"]["context"] + 1

    def step() -> float:
        total = 0.0
        for _ in range(job["micro_batches"]):
            batch = torch.randint(0, job["vocabulary"], shape)  # the same on both ranks: the seed is
            with loss_parallel():
                loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
                (loss / job["micro_batches"]).backward()
            total += float(loss.detach().full_tensor() if hasattr(loss, "full_tensor") else loss.detach())
        squares = torch.zeros(2)  # of what is cut, and of what both ranks hold
        for p, local in zip(parameters, mine, strict=True):
            cut = isinstance(p, DTensor)
            local.grad = p.grad.redistribute(placements=p.placements).to_local() if cut else p.grad
            squares[int(not cut)] += local.grad.square().sum()
        dist.all_reduce(cut_sum := squares[:1].clone())
        length = float((cut_sum + squares[1:]).sqrt())
        if length > job["clip"]:
            torch._foreach_mul_([local.grad for local in mine], job["clip"] / length)
        adamw.step()
        for p, local in zip(parameters, mine, strict=True):
            p.grad = local.grad = None
        return total

    def say(value: dict[str, Any]) -> None:
        if rank == 0:
            print(json.dumps(value), flush=True)

    say({"about": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, tensor parallelism over gloo"})
    while True:
        line = sys.stdin.readline().strip() if rank == 0 else ""
        more = torch.tensor(int(bool(line)))
        dist.broadcast(more, 0)
        if not more:
            break
        dist.barrier()
        began = time.perf_counter()
        loss = step()
        seconds = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        say({"seconds": float(seconds), "loss": loss})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
