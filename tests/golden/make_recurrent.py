"""Records what PyTorch's nn.LSTM and nn.GRU compute in small language models, float64: losses and every gradient.

    /tmp/torchenv/bin/python tests/golden/make_recurrent.py      # the environment: see benchmarks/torch_peer.py

The weights are drawn by `golden_weights` on both sides and not stored. Of PyTorch's two biases of a gate the second is
zero, but for that of a GRU's candidate, which is inside the reset gate's product.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from make_llama import golden_weights

from mlm_mpi.models import gru, lstm

HERE = Path(__file__).parent
FILE = HERE / "recurrent.npz"
VOCABULARY, ROWS, POSITIONS = 31, 3, 11
SIZE = {"layers": 2, "width": 8, "context": 12}
MODELS: dict[str, tuple[ModuleType, Any]] = {
    "lstm": (lstm, lstm.Settings(**SIZE)),
    "gru": (gru, gru.Settings(**SIZE)),
    "lstm, classical": (lstm, lstm.Settings(**SIZE, tied=False, final_norm=False, residual=False)),
    "gru, plain": (gru, gru.Settings(**SIZE, residual=False)),
}
PACKED = ("lstm", "gru, plain")  # these see documents packed into a row


def starts(random: np.random.Generator) -> np.ndarray:
    """The first token of each token's document. Shapes: -> (B, T)."""
    begins = np.where(random.random((ROWS, POSITIONS)) < 0.2, np.arange(POSITIONS), 0)
    return np.maximum.accumulate(begins, axis=1)


def main() -> None:
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)

    class Peer(nn.Module):
        """The model as PyTorch has it; a document is run by itself."""

        def __init__(self, kind: str, s: Any) -> None:
            super().__init__()
            self.s, self.gates = s, 4 if kind.startswith("lstm") else 3
            one = nn.LSTM if self.gates == 4 else nn.GRU
            self.tokens = nn.Embedding(VOCABULARY, s.width)
            self.layers = nn.ModuleList(one(s.width, s.width, batch_first=True) for _ in range(s.layers))
            self.norms = nn.ModuleList(nn.RMSNorm(s.width, eps=s.norm_epsilon) for _ in range(s.layers + 1))
            self.head = nn.Linear(s.width, VOCABULARY, bias=False)
            if s.tied:
                self.head.weight = self.tokens.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.tokens(ids)
            for layer, norm in zip(self.layers, self.norms, strict=False):
                x = x + layer(norm(x))[0] if self.s.residual else layer(x)[0]
            return self.head(self.norms[-1](x) if self.s.final_norm else x)

        def views(self) -> dict[str, tuple[nn.Parameter, ...]]:
            """Our name of every parameter -> what it consists of here."""
            out = {"embed.tokens": (self.tokens.weight,)}
            for number, layer in enumerate(self.layers):
                name = f"layer{number}"
                if self.s.residual:
                    out[f"{name}.norm.gain"] = (self.norms[number].weight,)
                out[f"{name}.cell.input.weight"] = (layer.weight_ih_l0,)
                out[f"{name}.cell.input.bias"] = (layer.bias_ih_l0,)
                out[f"{name}.cell.recurrent.weight"] = (layer.weight_hh_l0,)
                if self.gates == 3:
                    out[f"{name}.cell.recurrent.bias"] = (layer.bias_hh_l0,)
            if self.s.final_norm:
                out["final.norm.gain"] = (self.norms[-1].weight,)
            if not self.s.tied:
                out["head.tokens"] = (self.head.weight,)
            return out

        def load(self) -> None:
            width, gates = self.s.width, self.gates
            with torch.no_grad():
                for layer in self.layers:
                    layer.bias_hh_l0.zero_()
                for name, (p,) in self.views().items():
                    last = slice(2 * width, None) if name.endswith("recurrent.bias") else slice(None)
                    if name.endswith(".weight"):  # (C, G, C) there is (G·C, C) here
                        p.copy_(torch.from_numpy(golden_weights(name, (width, gates, width)).reshape(width, -1).T))
                    else:
                        p[last] = torch.from_numpy(golden_weights(name, tuple(p[last].shape)))

        def gradients(self) -> dict[str, np.ndarray]:
            width, found = self.s.width, {}
            for name, (p,) in self.views().items():
                array = p.grad.numpy()
                if name.endswith(".weight"):
                    array = array.T.reshape(width, self.gates, width)
                if name.endswith("input.bias"):
                    array = array.reshape(self.gates, width)
                found[name] = array[2 * width :] if name.endswith("recurrent.bias") else array
            return found

    random = np.random.default_rng(2026)
    ids = random.integers(0, VOCABULARY, (ROWS, POSITIONS + 1)).astype(np.int16)
    mask, packed = random.random((ROWS, POSITIONS)) < 0.8, starts(random).astype(np.int16)
    record: dict[str, np.ndarray] = {"ids": ids, "mask": mask, "starts": packed}
    targets = torch.from_numpy(np.where(mask, ids[:, 1:], -100).astype(np.int64))
    for kind, (_, settings) in MODELS.items():
        model = Peer(kind, settings)
        model.load()
        total = 0.0
        for row in range(ROWS):
            begins = np.unique(packed[row]) if kind in PACKED else np.array([0])
            for first, stop in zip(begins, [*begins[1:], POSITIONS], strict=True):
                logits = model(torch.from_numpy(ids[row : row + 1, first:stop].astype(np.int64)))
                total = total + F.cross_entropy(logits[0], targets[row, first:stop], reduction="sum")
        total.backward()
        record[f"{kind}/loss"] = np.array(float(total.detach()))
        record |= {f"{kind}/gradient/{name}": value for name, value in model.gradients().items()}
        print(f"{kind}: loss {float(total.detach())}, PyTorch {torch.__version__}")
    np.savez_compressed(FILE, **record)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
