"""Records what PyTorch's nn.TransformerEncoderLayer computes in small encoders, float64: losses and every gradient.

    /tmp/torchenv/bin/python tests/golden/make_bert.py      # the environment: see benchmarks/torch_peer.py

The weights are drawn by `golden_weights` on both sides and not stored; the model is benchmarks/torch_bert.py. There
texts are padded, here they lie one behind the other.
"""

import sys
from pathlib import Path

import numpy as np
from make_llama import golden_weights

from mlm_mpi.models import bert

HERE = Path(__file__).parent
FILE = HERE / "bert.npz"
VOCABULARY, LABELS, ROWS, POSITIONS = 61, 5, 4, 21
SIZE = {"layers": 2, "width": 24, "heads": 4, "context": 24, "dropout": 0.0}
MODELS = {norm: bert.Settings(**SIZE, norm=norm).resolved() for norm in ("post", "pre")}
TASKS = {"post": ("masked", "first"), "pre": ("masked", "mean")}
LENGTHS = (21, 7, 13, 2)  # of the texts of the classifier


def batch() -> dict[str, np.ndarray]:
    """Rows of tokens, which are hidden, what is to be found (-100: nothing), segments, labels."""
    random = np.random.default_rng(2027)
    ids = random.integers(0, VOCABULARY, (ROWS, POSITIONS))
    hidden = random.random(ids.shape) < 0.2
    return {
        "ids": ids, "hidden": hidden, "targets": np.where(hidden | (random.random(ids.shape) < 0.1), ids, -100),
        "segments": (np.arange(POSITIONS) > random.integers(3, 9, (ROWS, 1))).astype(np.int64),
        "classes": random.integers(0, LABELS, ROWS),
    }  # fmt: skip


def main() -> None:
    sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
    import torch
    from torch.nn import functional as F
    from torch_bert import PeerBert

    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    there = {name: torch.from_numpy(array) for name, array in batch().items()}
    padding = torch.arange(POSITIONS)[None, :] >= torch.tensor(LENGTHS)[:, None]
    record: dict[str, np.ndarray] = {}
    for kind, settings in MODELS.items():
        for task in TASKS[kind]:
            model = PeerBert(settings, VOCABULARY, 0 if task == "masked" else LABELS)
            shapes = shapes_of(settings, task)
            model.load({name: golden_weights(name, shape) for name, shape in shapes.items()})
            if task == "masked":
                loss = model.masked(there["ids"], there["hidden"], there["targets"], there["segments"])
            else:
                logits = model.logits(there["ids"], padding, there["segments"], task)
                weights = torch.linspace(0.5, 1.5, LABELS)
                smoothing = 0.1 if task == "mean" else 0.0
                each = F.cross_entropy(logits, there["classes"], reduction="none", label_smoothing=smoothing)
                loss = (each * weights[there["classes"]]).sum()
                record[f"{kind}/{task}/logits"] = logits.detach().numpy()
            loss.backward()
            record[f"{kind}/{task}/loss"] = np.array(float(loss.detach()))
            for name, gradient in model.gradients().items():
                gradient = gradient.T if name.endswith("weight") else gradient
                record[f"{kind}/{task}/gradient/{name}"] = gradient.reshape(shapes[name])
            print(f"{kind}, {task}: loss {float(loss.detach())}, PyTorch {torch.__version__}")
    np.savez_compressed(FILE, **record)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


def shapes_of(settings: bert.Settings, task: str) -> dict[str, tuple[int, ...]]:
    """Our names and shapes, written out so that nothing but the draws is shared."""
    c, f = settings.width, settings.feed_forward
    out: dict[str, tuple[int, ...]] = {
        "embed.tokens": (VOCABULARY, c), "embed.norm.gain": (c,), "embed.norm.bias": (c,),
        "embed.positions": (settings.context, c), "embed.segments": (2, c), "embed.hidden": (1, c),
    }  # fmt: skip
    for i in range(settings.layers):
        for norm in ("norm1", "norm2"):
            out |= {f"block{i}.{norm}.gain": (c,), f"block{i}.{norm}.bias": (c,)}
        out |= {f"block{i}.attention.qkv.weight": (c, 3, c), f"block{i}.attention.qkv.bias": (3, c)}
        for name, k, n in (("attention.project", c, c), ("feed_forward.up", c, f), ("feed_forward.down", f, c)):
            out |= {f"block{i}.{name}.weight": (k, n), f"block{i}.{name}.bias": (n,)}
    if settings.norm == "pre":
        out |= {"final.norm.gain": (c,), "final.norm.bias": (c,)}
    if task == "masked":
        last = {
            "head.transform.weight": (c, c),
            "head.transform.bias": (c,),
            "head.norm.gain": (c,),
            "head.norm.bias": (c,),
        }
    else:
        last = {
            "classes.dense.weight": (c, c), "classes.dense.bias": (c,), "classes.out.weight": (c, LABELS),
            "classes.out.bias": (LABELS,),
        }  # fmt: skip
    return out | last


if __name__ == "__main__":
    main()
