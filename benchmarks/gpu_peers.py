"""What PyTorch has for the functions of `gpu_cases.py`, on the same arrays.

A peer takes a function's arguments as tensors and returns what is timed: a call without arguments that returns
PyTorch's results in the order of `Case.results`, as far as it has them, or nothing where it computes less.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import ADAMW, EPSILON
from torch.nn.attention import SDPBackend, sdpa_kernel

Run = Callable[[], list[torch.Tensor]]
aten = torch.ops.aten


def peers(function: str, dtype_name: str) -> dict[str, Callable[..., Run]]:
    """Name of a peer -> peer; "cuBLAS" is the bare product, "torch" all that our function does."""
    if function.startswith("attention."):
        names = ("flash", "cuDNN") if dtype_name == "bfloat16" else ("efficient",)
        make = _attention_forward if function.endswith("forward") else _attention_backward
        return {f"torch {name}": make(name) for name in names}
    return _PEERS.get(function, {})


# ---- products


def _add(a: Any, b: Any, out: Any, accumulate: bool) -> Run:
    if accumulate:
        return lambda: [out.add_(torch.mm(a, b))]
    return lambda: [torch.mm(a, b, out=out)]


def _bare(a: Any, b: Any) -> Run:
    def run() -> list[torch.Tensor]:
        torch.mm(a, b)
        return []

    return run


def _forward(x: Any, w: Any, b: Any, residual: Any = None) -> Run:
    if residual is None:
        return lambda: [torch.addmm(b, x, w)]
    return lambda: [torch.addmm(b, x, w) + residual]


def _forward_gelu(x: Any, w: Any, b: Any) -> Run:
    def run() -> list[torch.Tensor]:
        pre = torch.addmm(b, x, w)
        return [F.gelu(pre, approximate="tanh"), pre]

    return run


def _backward_input(dy: Any, w: Any, pre: Any = None) -> Run:
    if pre is None:
        return lambda: [torch.mm(dy, w.T)]
    return lambda: [aten.gelu_backward(torch.mm(dy, w.T), pre, approximate="tanh")]


# ---- attention

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def _attention(backend: str, q: Any, k: Any, v: Any, causal: bool) -> torch.Tensor:
    with sdpa_kernel(_BACKENDS[backend]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _attention_forward(backend: str) -> Callable[..., Run]:
    return lambda q, k, v, causal: lambda: [_attention(backend, q, k, v, causal).transpose(1, 2)]


def _attention_backward(backend: str) -> Callable[..., Run]:
    def peer(do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dq: Any, dk: Any, dv: Any, causal: bool) -> Run:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, gradient = _attention(backend, *leaves, causal), do.transpose(1, 2)
        return lambda: list(torch.autograd.grad(out, leaves, gradient, retain_graph=True))

    return peer


# ---- rows


def _layernorm_forward(x: Any, gain: Any, bias: Any, epsilon: float) -> Run:
    return lambda: [F.layer_norm(x, gain.shape, gain, bias, epsilon)]


def _layernorm_backward(
    dy: Any, x: Any, gain: Any, statistics: Any, dgain: Any, dbias: Any, accumulate: bool, add: Any
) -> Run:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, gain, torch.zeros_like(gain))]
    y = F.layer_norm(leaves[0], gain.shape, *leaves[1:], EPSILON)

    def run() -> list[torch.Tensor]:
        dx, *others = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        return [dx + add, *others]

    return run


def _rows(logits: Any, targets: Any, mask: None, gradient: bool) -> Run:
    leaf, wanted = logits.detach().requires_grad_(), targets.long()

    def run() -> list[torch.Tensor]:
        losses = F.cross_entropy(leaf, wanted, reduction="none")
        return [losses, *torch.autograd.grad(losses.sum(), leaf)]

    return run


def _embedding_backward(dy: Any, ids: Any, dtable: Any) -> Run:
    wanted = ids.long()
    return lambda: [dtable.add_(aten.embedding_dense_backward(dy, wanted, dtable.shape[0], -1, False))]


def _dropout(x: Any, draw: Any, residual: Any) -> Run:
    def run() -> list[torch.Tensor]:
        _ = F.dropout(x, draw.rate) + residual
        return []  # another mask

    return run


# ---- flat


def _adamw(p: Any, g: Any, m: Any, v: Any, *numbers: Any) -> Run:
    working = numbers[7] if len(numbers) > 7 else None
    step = torch.full((), float(ADAMW["step"]), device=p.device)
    options = {name: value for name, value in ADAMW.items() if name != "step"}

    def run() -> list[torch.Tensor]:
        torch._fused_adamw_([p], [g], [m], [v], [], [step], amsgrad=False, maximize=False, **options)
        return [p, m, v] if working is None else [p, m, v, working.copy_(p)]

    return run


def _squares(x: Any, block: int) -> Run:
    return lambda: [torch.linalg.vector_norm(x.view(-1, block), dim=1) ** 2]


_PEERS: dict[str, dict[str, Callable[..., Run]]] = {
    "matmul.add": {"cuBLAS": lambda a, b, out, accumulate: _bare(a, b), "torch": _add},
    "linear.forward": {"cuBLAS": lambda x, w, b, residual=None: _bare(x, w), "torch": _forward},
    "linear.forward_gelu": {"cuBLAS": lambda x, w, b: _bare(x, w), "torch": _forward_gelu},
    "linear.backward_input": {"cuBLAS": lambda dy, w, pre=None: _bare(dy, w.T), "torch": _backward_input},
    "linear.bias_gradient": {"torch": lambda dy, db, accumulate: lambda: [dy.sum(0, dtype=torch.float32)]},
    "gelu.forward": {"torch": lambda x: lambda: [F.gelu(x, approximate="tanh")]},
    "gelu.backward": {"torch": lambda dy, x: lambda: [aten.gelu_backward(dy, x, approximate="tanh")]},
    "layernorm.forward": {"torch": _layernorm_forward},
    "layernorm.backward": {"torch": _layernorm_backward},
    "crossentropy.rows": {"torch": _rows},
    "embedding.forward": {"torch": lambda ids, table: lambda: [F.embedding(ids, table)]},
    "embedding.backward": {"torch": _embedding_backward},
    "dropout.forward": {"torch": _dropout},
    "adamw.update": {"torch": _adamw},
    "clip.squares": {"torch": _squares},
    "sums.tree": {"torch": lambda leaves, merges, out: lambda: [sum(leaves[1:], leaves[0])]},
    "cast.to": {"torch": lambda x, out: lambda: [out.copy_(x)]},
}
