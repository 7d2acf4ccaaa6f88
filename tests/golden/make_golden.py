"""Records what PyTorch computes for a small GPT-2 in float64: losses, gradients, three AdamW steps.

    /tmp/torchenv/bin/python tests/golden/make_golden.py      # the environment: see benchmarks/torch_peer.py

The weights are drawn by `golden_weights` below on both sides and not stored. The model is PyTorch's own
(nn.Linear, nn.LayerNorm, F.scaled_dot_product_attention, F.cross_entropy); the optimiser is
torch.optim.AdamW with decay on matrices and the token table. The gradient is scaled by
min(1, limit / norm) with the norm of torch.nn.utils.get_total_norm: clip_grad_norm_ itself adds 1e-6 to the
norm, which Pascanu et al. do not.
"""

import sys
from pathlib import Path

import numpy as np

from mlm_mpi.models import gpt
from mlm_mpi.optim import adamw
from mlm_mpi.rng import key_of, normal

HERE = Path(__file__).parent
FILE = HERE / "gpt.npz"
VOCABULARY, ROWS, POSITIONS, STEPS = 61, 3, 21, 3
MODEL = gpt.Settings(layers=2, width=24, heads=4, context=24, feed_forward=96, init_std=0.2)
OPTIM = adamw.Settings(weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8, clip=1.0)
RATES = (1e-2, 2e-2, 1.5e-2)


def golden_weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights in which no bias is zero and no gain is one."""
    draws = normal(key_of(0, "golden", name), 0, int(np.prod(shape))).reshape(shape)
    return 0.2 * draws + (1.0 if name.endswith("gain") else 0.0)


def shapes() -> dict[str, tuple[int, ...]]:
    """Our names and shapes, written out so that nothing but the draws is shared."""
    c, f = MODEL.width, MODEL.feed_forward
    out: dict[str, tuple[int, ...]] = {"embed.tokens": (VOCABULARY, c), "embed.positions": (MODEL.context, c)}
    for i in range(MODEL.layers):
        for norm in ("norm1", "norm2"):
            out |= {f"block{i}.{norm}.gain": (c,), f"block{i}.{norm}.bias": (c,)}
        for name, k, n in (
            ("attention.qkv", c, 3 * c), ("attention.project", c, c), ("feed_forward.up", c, f),
            ("feed_forward.down", f, c),
        ):  # fmt: skip
            out |= {f"block{i}.{name}.weight": (k, n), f"block{i}.{name}.bias": (n,)}
    return out | {"final.norm.gain": (c,), "final.norm.bias": (c,)}


def main() -> None:
    sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
    import torch
    from torch_gpt import PeerGPT, make_adamw

    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    random = np.random.default_rng(2026)
    ids = random.integers(0, VOCABULARY, (STEPS, ROWS, POSITIONS + 1)).astype(np.int16)
    mask = random.random((STEPS, ROWS, POSITIONS)) < 0.8
    record: dict[str, np.ndarray] = {"ids": ids, "mask": mask, "rates": np.array(RATES)}

    model = PeerGPT(MODEL, VOCABULARY)
    model.load({name: golden_weights(name, shape) for name, shape in shapes().items()})
    adamw = make_adamw(model, OPTIM, foreach=False, fused=False)
    losses, norms = [], []
    for step in range(STEPS):
        inputs = torch.from_numpy(ids[step, :, :-1].astype(np.int64))
        targets = torch.from_numpy(np.where(mask[step], ids[step, :, 1:], -100).astype(np.int64))
        loss = model(inputs, targets, "sum")
        loss.backward()
        losses.append(float(loss.detach()))
        if step == 0:
            record |= {f"gradient/{name}": value for name, value in model.export(gradients=True).items()}
        gradients = [p.grad for p in model.parameters()]
        for g in gradients:
            g /= int(mask[step].sum())
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        for g in gradients:
            g *= min(1.0, OPTIM.clip / norms[-1])
        for group in adamw.param_groups:
            group["lr"] = RATES[step]
        adamw.step()
        adamw.zero_grad()
    record |= {f"weight/{name}": value for name, value in model.export().items()}
    record |= {"losses": np.array(losses), "norms": np.array(norms), "torch": np.array(torch.__version__)}
    np.savez_compressed(FILE, **record)
    print(f"{FILE}: {FILE.stat().st_size} bytes, losses {losses}, norms {norms}, PyTorch {torch.__version__}")


if __name__ == "__main__":
    main()
