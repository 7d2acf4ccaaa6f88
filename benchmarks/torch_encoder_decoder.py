"""The encoder-decoder of mlm_mpi/models/encoder_decoder.py as PyTorch would have it, and a beam search with its cache.

Needs PyTorch (see torch_peer.py). Eager, with what eager has: fused projections, scaled_dot_product_attention, no mask
where nothing is padded, and in the decoder's own attention none at all, since padding lies behind what may see it. The
head computes nothing of padding. Texts are padded to the longest of their batch; whoever calls sorts them by length.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Norm(nn.LayerNorm):
    def load(self, weights, name: str) -> None:
        self.weight.data, self.bias.data = tensor(weights[f"{name}.gain"]), tensor(weights[f"{name}.bias"])


class Linear(nn.Linear):
    def load(self, weights, name: str) -> None:
        weight = weights[f"{name}.weight"]
        self.weight.data = tensor(weight.reshape(len(weight), -1).T)
        self.bias.data = tensor(weights[f"{name}.bias"].reshape(-1))


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


class Attention(nn.Module):
    """`cross`: queries of x, keys and values of a memory."""

    def __init__(self, width: int, heads: int, cross: bool) -> None:
        super().__init__()
        self.heads, self.cross = heads, cross
        self.inner = nn.ModuleList([Linear(width, n * width) for n in ((1, 2) if cross else (3,))])
        self.project = Linear(width, width)

    def load(self, weights, name: str) -> None:
        for layer, what in zip(self.inner, ("query", "key_value") if self.cross else ("qkv",), strict=True):
            layer.load(weights, f"{name}.{what}")
        self.project.load(weights, f"{name}.project")

    def split(self, x: torch.Tensor, count: int) -> list[torch.Tensor]:
        """Shapes: (B, T, n C) -> n times (B, H, T, D)."""
        return [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in x.chunk(count, 2)]

    def attend(self, q, k, v, mask=None, causal: bool = False) -> torch.Tensor:
        o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return self.project(o.transpose(1, 2).flatten(2))

    def memory(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values of it: (B, S, C) -> (B, H, S, D) each."""
        return self.split(self.inner[1](memory), 2)

    def forward(self, x, mask=None, causal: bool = False) -> torch.Tensor:
        return self.attend(*self.split(self.inner[0](x), 3), mask, causal)

    def look(self, x, keys, values, mask=None) -> torch.Tensor:
        """At a memory."""
        return self.attend(*self.split(self.inner[0](x), 1), keys, values, mask)


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = Linear(width, inner), Linear(inner, width)

    def load(self, weights, name: str) -> None:
        self.up.load(weights, f"{name}.up")
        self.down.load(weights, f"{name}.down")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Of the encoder, or of the decoder, which has a `cross`."""

    def __init__(self, settings, cross: bool) -> None:
        super().__init__()
        s, width = settings, settings.width
        self.attention, self.mlp = Attention(width, s.heads, False), FeedForward(width, s.feed_forward)
        self.norms = nn.ModuleList(Norm(width, s.norm_epsilon) for _ in range(3 if cross else 2))
        self.cross = Attention(width, s.heads, True) if cross else None

    def load(self, weights, name: str) -> None:
        self.attention.load(weights, f"{name}.attention")
        self.mlp.load(weights, f"{name}.feed_forward")
        for number, norm in enumerate(self.norms, 1):
            norm.load(weights, f"{name}.norm{number}")
        if self.cross is not None:
            self.cross.load(weights, f"{name}.cross")


class PeerEncoderDecoder(nn.Module):
    """Settings: models/encoder_decoder.py's, resolved. `load` takes our weights by our names."""

    def __init__(self, settings, vocabulary: int) -> None:
        super().__init__()
        s, width = settings, settings.width
        self.settings, self.tokens = s, nn.Embedding(vocabulary, width)
        self.sources, self.targets = nn.Embedding(s.context, width), nn.Embedding(s.context, width)
        self.encoder = nn.ModuleList(Block(s, False) for _ in range(s.layers))
        self.decoder = nn.ModuleList(Block(s, True) for _ in range(s.decoder_layers))
        self.encoded, self.final = Norm(width, s.norm_epsilon), Norm(width, s.norm_epsilon)

    def load(self, weights) -> None:
        self.tokens.weight.data = tensor(weights["embed.tokens"])
        self.sources.weight.data = tensor(weights["embed.source.positions"])
        self.targets.weight.data = tensor(weights["embed.target.positions"])
        for name, blocks in (("encoder", self.encoder), ("decoder", self.decoder)):
            for number, block in enumerate(blocks):
                block.load(weights, f"{name}.block{number}")
        self.encoded.load(weights, "encoder.final.norm")
        self.final.load(weights, "decoder.final.norm")

    def memory(self, sources, there=None) -> torch.Tensor:
        """`there`: where there is a token, None for everywhere. Shapes: (B, S) each -> (B, S, C)."""
        x = self.tokens(sources) + self.sources.weight[: sources.shape[1]]
        mask = None if there is None else there[:, None, None]
        for block in self.encoder:
            x = x + block.attention(block.norms[0](x), mask)
            x = x + block.mlp(block.norms[1](x))
        return self.encoded(x)

    def loss(self, sources, read, wanted, there=None, counts=None) -> torch.Tensor:
        """Summed over targets. `there` (B, S): as of `memory`. `counts` (B, T): which targets do, None for all.

        Shapes: sources (B, S), read and wanted (B, T).
        """
        memory, mask = self.memory(sources, there), None if there is None else there[:, None, None]
        x = self.tokens(read) + self.targets.weight[: read.shape[1]]
        for block in self.decoder:
            x = x + block.attention(block.norms[0](x), causal=True)
            x = x + block.cross.look(block.norms[1](x), *block.cross.memory(memory), mask)
            x = x + block.mlp(block.norms[2](x))
        x, wanted = (x.flatten(0, 1), wanted.flatten()) if counts is None else (x[counts], wanted[counts])
        return F.cross_entropy(F.linear(self.final(x), self.tokens.weight), wanted, reduction="sum")


class Cache:
    """Keys and values of the tokens so far, (T, R, C) a layer: what is valid lies in one piece, and a choice of rows is
    one copy into a second buffer, which then takes the first one's place."""

    def __init__(self, layers: int, context: int, width: int) -> None:
        self.layers, self.context, self.width, self.length = layers, context, width, 0
        self.buffers, self.others = [], []

    def extend(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Shapes: (R, C) each -> (T, R, C) each."""
        if layer == len(self.buffers):
            self.buffers.append(torch.empty(2, self.context, *keys.shape))
        buffer = self.buffers[layer]
        buffer[0, self.length], buffer[1, self.length] = keys, values
        return buffer[0, : self.length + 1], buffer[1, : self.length + 1]

    def take(self, rows: torch.Tensor) -> None:
        """Goes on with these rows (R,)."""
        if not self.others or self.others[0].shape[2] != len(rows):
            self.others = [torch.empty(2, self.context, len(rows), self.width) for _ in self.buffers]
        for buffer, other in zip(self.buffers, self.others, strict=True):
            for side in (0, 1):
                torch.index_select(buffer[side, : self.length], 1, rows, out=other[side, : self.length])
        self.buffers, self.others = self.others, self.buffers


@torch.inference_mode()
def written(
    model: PeerEncoderDecoder, sources: torch.Tensor, there: torch.Tensor | None, start: int, width: int, steps: int,
    grouped: bool,
) -> torch.Tensor:  # fmt: skip
    """The likeliest hypothesis of each source after so many steps, none of which ends: nothing here looks for an end.

    `there`: as of `memory`. `grouped`: the hypotheses of a source are as many queries of one memory; else the memory is
    repeated, once. Shapes: sources and there (B, S) -> (B, steps).
    """
    count, heads, channels = len(sources), model.settings.heads, model.settings.width
    memory, mask = model.memory(sources, there), None if there is None else there[:, None, None]
    memories = [block.cross.memory(memory) for block in model.decoder]
    cache, scores = Cache(len(model.decoder), steps, channels), torch.zeros(count, 1)
    last, made = torch.full((count,), start), torch.empty(count, 0, dtype=torch.int64)
    for step in range(steps):
        rows = len(last)
        x = (model.tokens(last) + model.targets.weight[step])[:, None]
        for number, block in enumerate(model.decoder):
            q, k, v = block.attention.inner[0](block.norms[0](x))[:, 0].chunk(3, 1)
            k, v = (a.unflatten(2, (heads, -1)).permute(1, 2, 0, 3) for a in cache.extend(number, k, v))
            x = x + block.attention.attend(q.unflatten(1, (heads, 1, -1)), k, v)
            n = block.norms[1](x)
            if grouped:
                n = n.view(count, rows // count, channels)
            x = x + block.cross.look(n, *memories[number], mask).view(rows, 1, channels)
            x = x + block.mlp(block.norms[2](x))
        cache.length += 1
        logits = F.linear(model.final(x[:, 0]), model.tokens.weight)
        found = scores.flatten()[:, None] + F.log_softmax(logits, 1)
        scores, places = found.view(count, -1).topk(width)
        vocabulary = logits.shape[1]
        parents = (places // vocabulary + torch.arange(count)[:, None] * (rows // count)).flatten()
        last = (places % vocabulary).flatten()
        made = torch.cat([made[parents], last[:, None]], 1)
        cache.take(parents)
        if step == 0 and not grouped:
            memories = [[side[parents] for side in sides] for sides in memories]
            mask = None if mask is None else mask[parents]
    return made.view(count, width, steps)[:, 0]
