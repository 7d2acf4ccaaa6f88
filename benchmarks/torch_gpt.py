"""GPT-2 and its AdamW in PyTorch: the peer of `step.py`, `quality.py` and `gpu_check.py`, the oracle of tests/golden.

Independent of `mlm_mpi`'s mathematics: nn.Linear, nn.LayerNorm, F.scaled_dot_product_attention, F.cross_entropy and
torch.optim.AdamW; of the package it imports nothing.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


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
    """GPT-2 as nanoGPT writes it: pre-norm, learned positions, tanh GELU, tied head.

    `model`: the `Settings` of `mlm_mpi.models.gpt`, `feed_forward` given.
    """

    def __init__(self, model: Any, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, model.width)
        self.positions = nn.Embedding(model.context, model.width)
        self.blocks = nn.ModuleList(
            PeerBlock(model.width, model.heads, model.feed_forward, model.norm_epsilon) for _ in range(model.layers)
        )
        self.norm = nn.LayerNorm(model.width, eps=model.norm_epsilon)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Cross-entropy of the targets; a target of −100 does not count."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
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

    def views(self) -> dict[str, list[nn.Parameter]]:
        """Our name of every parameter -> the parameters here that it consists of."""
        return {name: [parameter] for name, (parameter, _) in self.pairs().items()}

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
    return name.endswith((".weight", ".tokens"))


def make_adamw(model: Any, optim: Any, **kind: bool) -> torch.optim.AdamW:
    """AdamW with the two usual parameter groups, of a model that tells its parameters by our names."""
    views = model.views()
    groups = [
        {"params": [p for name in views if decays(name) for p in views[name]], "weight_decay": optim.weight_decay},
        {"params": [p for name in views if not decays(name) for p in views[name]], "weight_decay": 0.0},
    ]
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW(groups, lr=optim.learning_rate, betas=betas, eps=optim.epsilon, **kind)
