"""What PyTorch calls the ops of ops.py: the same arrays, the same work, out of place where PyTorch has no other way."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
aten = torch.ops.aten


def peers(arrays: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """name of a row -> a call; rows that PyTorch has no op for are left out."""
    t = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
    x, dy, wide, dwide, up, down, gain, bias = (
        t[name] for name in ("x", "dy", "wide", "dwide", "up", "down", "gain", "bias")
    )
    logits, table, upbias = t["logits"], t["table"], torch.zeros(t["up"].shape[1])
    ids, targets = t["ids"].long(), t["targets"].long()
    q, k, v = (t[name].clone().requires_grad_() for name in ("q", "k", "w"))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    do = t["do"].transpose(1, 2)
    width = [x.shape[1]]
    _, mean, deviation = aten.native_layer_norm(x, width, gain, bias, 1e-5)
    added = torch.zeros_like(up)
    scores = logits.clone().requires_grad_()
    p = t["p"].clone().requires_grad_()
    p.grad = t["g"]
    optimizer = torch.optim.AdamW([p], fused=True)

    def crossentropy() -> Any:
        return torch.autograd.grad(F.cross_entropy(scores, targets, reduction="sum"), scores)

    return {
        "linear.forward, up": lambda: torch.addmm(upbias, x, up),
        "linear.forward, down, residual": lambda: torch.addmm(bias, wide, down).add_(x),
        "matmul.add dy Wᵀ, up": lambda: dwide @ up.T,
        "matmul.add dy Wᵀ, down": lambda: dy @ down.T,
        "matmul.add xᵀdy, up": lambda: x.T @ dwide,
        "matmul.add xᵀdy, up, accumulated": lambda: added.addmm_(x.T, dwide),
        "matmul.add xᵀdy, down": lambda: wide.T @ dy,
        "matmul.add, logits": lambda: x[:512] @ table.T,
        "matmul.add, logits' dx": lambda: logits @ table,
        "matmul.add, logits' dW": lambda: logits.T @ x[:512],
        "linear.bias_gradient": lambda: dwide.sum(0),
        "gelu.forward": lambda: F.gelu(wide, approximate="tanh"),
        "gelu.backward": lambda: aten.gelu_backward(dwide, wide, approximate="tanh"),
        "layernorm.forward": lambda: aten.native_layer_norm(x, width, gain, bias, 1e-5),
        "layernorm.backward": lambda: aten.native_layer_norm_backward(
            dy, x, width, mean, deviation, gain, bias, [True, True, True]
        )[0].add_(dy),
        "attention.forward": lambda: F.scaled_dot_product_attention(q.detach(), k.detach(), v.detach(), is_causal=True),
        "attention.backward": lambda: torch.autograd.grad(attended, (q, k, v), do, retain_graph=True),
        "crossentropy.rows, 512 rows": crossentropy,
        "embedding.forward": lambda: F.embedding(ids, table),
        "embedding.backward": lambda: aten.embedding_dense_backward(dy, ids, table.shape[0], -1, False),
        "dropout.forward with residual": lambda: F.dropout(x, 0.1).add_(dy),
        "adamw.update, 4 Mi elements": optimizer.step,
        "clip.squares, 4 Mi elements": lambda: torch.linalg.vector_norm(p.detach()),
    }
