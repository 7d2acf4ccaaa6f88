"""The modern decoder in PyTorch, as a PyTorch user writes it: the oracle of tests/golden and the peer of `step.py`.

Independent of `mlm_mpi`'s mathematics: nn.Linear for queries, keys, values, gate and up; nn.RMSNorm,
F.scaled_dot_product_attention, complex numbers for rotary positions; of the package it imports nothing.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def turns(context: int, width: int, base: float) -> torch.Tensor:
    """e^(i·p·base^(−2k/R)), rounded to float32: one complex number for every position and pair. Shapes: -> (T, R/2)."""
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(context, dtype=torch.float64), frequencies)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def rotate(x: torch.Tensor, turned: torch.Tensor) -> torch.Tensor:
    """The halves of a head are real and imaginary parts. Shapes: x (B, H, T, D) -> the same."""
    real, imaginary = x.chunk(2, dim=3)
    z = torch.complex(real, imaginary) * turned.to(torch.complex128 if x.dtype == torch.float64 else torch.complex64)
    return torch.cat([z.real, z.imag], dim=3)


class PeerLlamaBlock(nn.Module):
    def __init__(self, m: Any, number: int) -> None:
        super().__init__()
        self.m, inner, keys = m, m.heads * m.head_width, m.key_value_heads * m.head_width
        self.window = 0 if m.full_every and (number + 1) % m.full_every == 0 else m.window
        self.turned = not (m.rotary_skip and (number + 1) % m.rotary_skip == 0)
        self.norm1, self.norm2 = (nn.RMSNorm(m.width, eps=m.norm_epsilon) for _ in range(2))
        self.q = nn.Linear(m.width, inner, bias=m.qkv_bias)
        self.k, self.v = (nn.Linear(m.width, keys, bias=m.qkv_bias) for _ in range(2))
        self.project = nn.Linear(inner, m.width, bias=False)
        self.up, self.down = (
            nn.Linear(m.width, m.feed_forward, bias=False), nn.Linear(m.feed_forward, m.width, bias=False)
        )  # fmt: skip
        if m.activation == "swiglu":
            self.gate = nn.Linear(m.width, m.feed_forward, bias=False)
        if m.qk_norm:
            self.norm_q, self.norm_k = (nn.RMSNorm(m.head_width, eps=m.norm_epsilon) for _ in range(2))

    def forward(self, x: torch.Tensor, turned: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
        b, t, _ = x.shape
        n = self.norm1(x)
        q, k, v = (f(n).view(b, t, -1, self.m.head_width).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.m.qk_norm:
            q, k = self.norm_q(q), self.norm_k(k)
        if self.turned:
            q, k = rotate(q, turned[:t]), rotate(k, turned[:t])
        o = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **self._mask(t, documents))
        x = x + self.project(o.transpose(1, 2).reshape(b, t, -1))
        n = self.norm2(x)
        hidden = F.silu(self.gate(n)) * self.up(n) if self.m.activation == "swiglu" else F.relu(self.up(n)).square()
        return x + self.down(hidden)

    def _mask(self, t: int, documents: torch.Tensor | None) -> dict[str, Any]:
        if not self.window and documents is None:
            return {"is_causal": True}
        at = torch.arange(t)
        seen = (at[:, None] >= at) & (at[:, None] - at < (self.window or t))
        if documents is not None:  # (B, T): the number of the document that a token belongs to
            seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
        return {"attn_mask": seen}


class PeerLlama(nn.Module):
    """`model`: the resolved `Settings` of `mlm_mpi.models.llama`."""

    def __init__(self, model: Any, vocabulary: int) -> None:
        super().__init__()
        self.m = model
        self.tokens = nn.Embedding(vocabulary, model.width)
        if model.embedding_norm:
            self.first_norm = nn.RMSNorm(model.width, eps=model.norm_epsilon)
        self.blocks = nn.ModuleList(PeerLlamaBlock(model, number) for number in range(model.layers))
        self.norm = nn.RMSNorm(model.width, eps=model.norm_epsilon)
        self.head = nn.Linear(model.width, vocabulary, bias=False)
        if model.tied:
            self.head.weight = self.tokens.weight
        self.register_buffer("turned", turns(model.context, model.head_width, model.rotary_base))

    def forward(
        self, ids: torch.Tensor, targets: torch.Tensor, reduction: str = "mean", documents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Cross-entropy of the targets; a target of −100 does not count."""
        x = self.tokens(ids)
        if self.m.embedding_norm:
            x = self.first_norm(x)
        for block in self.blocks:
            x = block(x, self.turned, documents)
        logits = self.head(self.norm(x))
        if self.m.logit_cap:
            logits = self.m.logit_cap * torch.tanh(logits / self.m.logit_cap)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), reduction=reduction)

    def load(self, weights: dict[str, np.ndarray]) -> None:
        """Takes our weights, by our names."""
        with torch.no_grad():
            for name, matrices in self.views().items():
                array = weights[name]
                for matrix, part in zip(matrices, self._split(name, array), strict=True):
                    matrix.copy_(torch.from_numpy(np.ascontiguousarray(part)))

    def export(self, gradients: bool = False) -> dict[str, np.ndarray]:
        """Weights or gradients under our names, in the shapes of our arrays."""
        parts = {
            name: [(p.grad if gradients else p).detach().numpy() for p in matrices]
            for name, matrices in self.views().items()
        }
        return {name: self._joined(name, arrays) for name, arrays in parts.items()}

    def views(self) -> dict[str, list[nn.Parameter]]:
        """Our name of every parameter -> the parameters here that it consists of."""
        out: dict[str, list[nn.Parameter]] = {"embed.tokens": [self.tokens.weight]}
        if self.m.embedding_norm:
            out["embed.norm.gain"] = [self.first_norm.weight]
        for i, block in enumerate(self.blocks):
            name = f"block{i}"
            out[f"{name}.norm1.gain"] = [block.norm1.weight]
            out[f"{name}.attention.qkv.weight"] = [f.weight for f in (block.q, block.k, block.v)]
            if self.m.qkv_bias:
                out[f"{name}.attention.qkv.bias"] = [f.bias for f in (block.q, block.k, block.v)]
            if self.m.qk_norm:
                out[f"{name}.attention.norm.gain"] = [block.norm_q.weight, block.norm_k.weight]
            out[f"{name}.attention.project.weight"] = [block.project.weight]
            out[f"{name}.norm2.gain"] = [block.norm2.weight]
            gated = self.m.activation == "swiglu"
            out[f"{name}.feed_forward.up.weight"] = [*([block.gate.weight] if gated else []), block.up.weight]
            out[f"{name}.feed_forward.down.weight"] = [block.down.weight]
        out["final.norm.gain"] = [self.norm.weight]
        if not self.m.tied:
            out["head.tokens"] = [self.head.weight]
        return out

    def _split(self, name: str, array: np.ndarray) -> list[np.ndarray]:
        # ours -> here: matrices are stored (in, out) there and (out, in) here
        if ".qkv." in name:  # (C, G, g + 2, D), a bias without the first dim
            units = array.reshape(-1, *array.shape[-3:])
            parts = [units[:, :, :-2], units[:, :, -2], units[:, :, -1]]
            parts = [part.reshape(len(units), -1).T for part in parts]
            return parts if name.endswith("weight") else [part[:, 0] for part in parts]
        if name.endswith("attention.norm.gain"):
            return list(array)
        if name.endswith("up.weight") and array.ndim == 3:
            return [array[:, 0].T, array[:, 1].T]
        return [array.T if name.endswith(".weight") else array]

    def _joined(self, name: str, parts: list[np.ndarray]) -> np.ndarray:
        m = self.m
        if ".qkv." in name:
            shape = -1, m.key_value_heads, 1, m.head_width
            q, k, v = (part.T if part.ndim == 2 else part[None] for part in parts)
            q = q.reshape(len(q), m.key_value_heads, -1, m.head_width)
            units = np.concatenate([q, k.reshape(shape), v.reshape(shape)], axis=2)
            return units if name.endswith("weight") else units[0]
        if len(parts) == 2:
            return np.stack([part.T if part.ndim == 2 else part for part in parts], axis=-2)
        return np.array(parts[0].T if name.endswith(".weight") else parts[0])
