"""Records what PyTorch computes for small modern decoders in float64: losses and every gradient.

    /tmp/torchenv/bin/python tests/golden/make_llama.py      # the environment: see benchmarks/torch_peer.py

The weights are drawn by `golden_weights` on both sides and not stored; the model is benchmarks/torch_llama.py.
"""

import sys
from pathlib import Path

import numpy as np

from mlm_mpi.models import llama
from mlm_mpi.rng import key_of, normal

HERE = Path(__file__).parent
FILE = HERE / "llama.npz"
VOCABULARY, ROWS, POSITIONS = 61, 3, 21
SIZE = {"layers": 2, "width": 24, "heads": 6, "context": 24, "init_std": 0.2}
MODELS = {
    "llama": llama.Settings(**SIZE, key_value_heads=2),
    "qwen": llama.Settings(
        **SIZE, key_value_heads=3, head_width=6, feed_forward=40, qk_norm=True, qkv_bias=True, logit_cap=3.0, window=7,
        full_every=2, rotary_base=500.0,
    ),
    "recipe": llama.Settings(
        **SIZE, activation="relu2", qk_norm=True, embedding_norm=True, logit_cap=5.0, rotary_skip=2
    ),
    "tied": llama.Settings(**SIZE, activation="relu2", qk_norm=True, tied=True, embedding_norm=True),
}  # fmt: skip
PACKED = "qwen"  # this one sees documents packed into a row


def golden_weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights in which no bias is zero and no gain is one."""
    draws = normal(key_of(0, "golden", name), 0, int(np.prod(shape))).reshape(shape)
    return 0.2 * draws + (1.0 if name.endswith("gain") else 0.0)


def documents(random: np.random.Generator) -> np.ndarray:
    """The number of each token's document. Shapes: -> (B, T)."""
    return (random.random((ROWS, POSITIONS)) < 0.2).cumsum(axis=1)


def main() -> None:
    sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
    import torch
    from torch_llama import PeerLlama

    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    random = np.random.default_rng(2026)
    ids = random.integers(0, VOCABULARY, (ROWS, POSITIONS + 1)).astype(np.int16)
    mask = random.random((ROWS, POSITIONS)) < 0.8
    packed = documents(random).astype(np.int16)
    record: dict[str, np.ndarray] = {"ids": ids, "mask": mask, "documents": packed}
    inputs = torch.from_numpy(ids[:, :-1].astype(np.int64))
    targets = torch.from_numpy(np.where(mask, ids[:, 1:], -100).astype(np.int64))
    for kind, settings in MODELS.items():
        model = PeerLlama(settings.resolved(), VOCABULARY)
        shapes = {name: array.shape for name, array in model.export().items()}
        model.load({name: golden_weights(name, shape) for name, shape in shapes.items()})
        loss = model(inputs, targets, "sum", torch.from_numpy(packed.astype(np.int64)) if kind == PACKED else None)
        loss.backward()
        record[f"{kind}/loss"] = np.array(float(loss.detach()))
        record |= {f"{kind}/gradient/{name}": value for name, value in model.export(gradients=True).items()}
        print(f"{kind}: loss {float(loss.detach())}, PyTorch {torch.__version__}")
    np.savez_compressed(FILE, **record)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
