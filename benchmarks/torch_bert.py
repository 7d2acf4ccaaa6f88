"""The encoder of mlm_mpi/models/bert.py as PyTorch would have it: nn.TransformerEncoderLayer and modules around it.

Needs PyTorch (see torch_peer.py). Texts are padded and masked, as is usual there; hidden tokens take the row of a mask.
"""

import torch
from torch import nn
from torch.nn import functional as F


def gelu(x: torch.Tensor) -> torch.Tensor:
    """The tanh form, as in BERT's release."""
    return F.gelu(x, approximate="tanh")


class PeerBert(nn.Module):
    """Trunk, and the head of a masked language model, or a classifier of so many labels; settings: models/bert.py's."""

    def __init__(self, settings, vocabulary: int, labels: int = 0) -> None:
        super().__init__()
        s, width = settings, settings.width
        self.pre = s.norm == "pre"
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(s.context, width)
        self.segments, self.hidden = nn.Embedding(s.segments, width), nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width, s.norm_epsilon)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, s.heads, s.feed_forward or 4 * width, s.dropout, gelu, s.norm_epsilon, batch_first=True,
                norm_first=self.pre,
            )
            for _ in range(s.layers)
        )  # fmt: skip
        self.final = nn.LayerNorm(width, s.norm_epsilon) if self.pre else nn.Identity()
        if labels:
            self.dense, self.out = nn.Linear(width, width), nn.Linear(width, labels)
        else:
            self.transform, self.last = nn.Linear(width, width), nn.LayerNorm(width, s.norm_epsilon)

    def trunk(self, ids, segments=None, hidden=None, padding=None):
        """Shapes: (B, T) each -> (B, T, C); `padding`: True where there is no token."""
        x = self.tokens(ids)
        if hidden is not None:
            x = torch.where(hidden[..., None], self.hidden, x)
        x = (
            x
            + self.positions(torch.arange(ids.shape[1]))
            + self.segments(torch.zeros_like(ids) if segments is None else segments)
        )
        x = self.norm(x)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=padding)
        return x

    def masked(self, ids, hidden, targets, segments=None):
        """Summed loss over the targets that are not -100. Shapes: (B, T) each."""
        chosen = targets >= 0
        x = self.final(self.trunk(ids, segments, hidden)[chosen])
        logits = self.last(gelu(self.transform(x))) @ self.tokens.weight.T
        return F.cross_entropy(logits, targets[chosen], reduction="sum")

    def logits(self, ids, padding=None, segments=None, pooling="first"):
        """Shapes: (B, T) each -> (B, L)."""
        x = self.trunk(ids, segments, None, padding)
        if pooling == "mean":
            there = torch.ones_like(ids, dtype=x.dtype) if padding is None else (~padding).to(x.dtype)
            x = (x * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        else:
            x = x[:, 0]
        return self.out(gelu(self.dense(self.final(x))))

    def places(self):
        """Our name -> (tensor, how ours becomes it): PyTorch's weights are (out, in)."""

        def turned(a):
            return a.reshape(a.shape[0], -1).T

        def plain(a):
            return a.reshape(-1) if a.ndim == 2 and a.shape[0] == 1 else a

        def flat(a):
            return a.reshape(-1)

        out = {
            "embed.tokens": (self.tokens.weight, lambda a: a), "embed.positions": (self.positions.weight, lambda a: a),
            "embed.segments": (self.segments.weight, lambda a: a), "embed.hidden": (self.hidden, plain),
        }  # fmt: skip

        def norm(name, module):
            out[f"{name}.gain"], out[f"{name}.bias"] = (module.weight, flat), (module.bias, flat)

        def linear(name, weight, bias):
            out[f"{name}.weight"], out[f"{name}.bias"] = (weight, turned), (bias, flat)

        norm("embed.norm", self.norm)
        for i, b in enumerate(self.blocks):
            name = f"block{i}"
            norm(f"{name}.norm1", b.norm1)
            norm(f"{name}.norm2", b.norm2)
            linear(f"{name}.attention.qkv", b.self_attn.in_proj_weight, b.self_attn.in_proj_bias)
            linear(f"{name}.attention.project", b.self_attn.out_proj.weight, b.self_attn.out_proj.bias)
            linear(f"{name}.feed_forward.up", b.linear1.weight, b.linear1.bias)
            linear(f"{name}.feed_forward.down", b.linear2.weight, b.linear2.bias)
        if self.pre:
            norm("final.norm", self.final)
        if hasattr(self, "out"):
            linear("classes.dense", self.dense.weight, self.dense.bias)
            linear("classes.out", self.out.weight, self.out.bias)
        else:
            linear("head.transform", self.transform.weight, self.transform.bias)
            norm("head.norm", self.last)
        return out

    def load(self, weights) -> None:
        """From our names and shapes."""
        with torch.no_grad():
            for name, (tensor, change) in self.places().items():
                tensor.copy_(torch.from_numpy(change(weights[name]).copy()))

    def gradients(self):
        """By our names, as (out, in) matrices; `turned` into ours by whoever compares."""
        return {
            name: tensor.grad.numpy().copy() for name, (tensor, _) in self.places().items() if tensor.grad is not None
        }
