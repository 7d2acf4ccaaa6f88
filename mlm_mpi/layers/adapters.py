"""Low-rank adapters: what fine-tuning learns beside frozen affine maps.

Source: Hu et al., LoRA, arXiv:2106.09685.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from mlm_mpi.errors import ConfigError, nearest
from mlm_mpi.layers.base import Context, Layer, Part
from mlm_mpi.layers.linear import Linear, flat
from mlm_mpi.ops import matmul
from mlm_mpi.params.store import Parameter


class Adapter:
    """y + s (x A) B, with A (K, r) and B (r, F). Shapes: x (…, K), y (…, F) -> (…, F).

    B starts at zero, so that training starts with the map as it was, and A with the standard deviation 1/√K (section
    4.1 of the source).
    """

    def __init__(self, linear: Linear, rank: int, scale: float) -> None:
        inputs, outputs = linear.inputs, math.prod(linear.weight.layout.shape[1:])
        self.down = Linear(f"{linear.name}.lora_a", inputs, rank, 1.0 / math.sqrt(inputs), bias=False)
        self.up = Linear(f"{linear.name}.lora_b", rank, outputs, "zeros", bias=False)
        self.scale = scale

    def parameters(self) -> list[Parameter]:
        return [*self.down.parameters(), *self.up.parameters()]

    def added(self, x: Any, y: Any, ctx: Context) -> Any:
        return self.up.mapped(self._scaled(x, ctx), ctx, residual=y)

    def backward(self, dy: Any, x: Any, dx: Any, ctx: Context) -> Any:
        """dx, over what the frozen map has of it. x A is computed again: it costs r / F of the map."""
        dh = self.up.backward(dy, self._scaled(x, ctx), ctx)
        dh *= self.scale
        dx += self.down.backward(dh, x, ctx)
        return dx

    def product(self) -> Any:
        """s A B, what the weight of the map has to grow by. Shapes: (K, F)."""
        a, b = (flat(layer.weight.data) for layer in (self.down, self.up))
        return self.scale * matmul.product(a, b)

    def _scaled(self, x: Any, ctx: Context) -> Any:
        h = self.down.mapped(x, ctx)
        h *= self.scale
        return h


def adapt(parts: Sequence[Part], rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Sets an adapter of s = α/r beside each affine map whose name ends in one of the targets.

    Raises ConfigError for a target that no map has.
    """
    maps = [linear for part in parts for linear in linears(part)]
    for target in targets:
        found = [linear for linear in maps if f".{linear.name}".endswith(f".{target}")]
        if not found:
            known = {linear.name.partition(".")[2] or linear.name for linear in maps}
            raise ConfigError(f'start.lora_targets = "{target}" is no affine map of this model{nearest(target, known)}')
        for linear in found:
            most = min(linear.inputs, math.prod(linear.weight.layout.shape[1:]))
            if rank > most:
                raise ConfigError(
                    f"start.lora_rank = {rank} is more than {linear.name} has inputs or outputs: set it to {most} "
                    "or less"
                )
            if linear.beside is None:  # two targets may name it
                linear.beside = Adapter(linear, rank, alpha / rank)


def is_adapters(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.endswith((".lora_a.weight", ".lora_b.weight"))


def linears(layer: Layer | Part) -> Iterator[Linear]:
    """The affine maps in a layer, in the order of its attributes: a layer's layers are attributes with parameters."""
    if isinstance(layer, Linear):
        yield layer
        return
    for inner in vars(layer).values():
        if hasattr(inner, "parameters"):
            yield from linears(inner)


def merge(parts: Sequence[Part]) -> None:
    """Adds every adapter to the weight of its map, and takes it away: W + s A B."""
    for linear in (linear for part in parts for linear in linears(part)):
        if isinstance(linear.beside, Adapter):
            weight = linear.weight.data
            weight += linear.beside.product().reshape(weight.shape)
            linear.beside = None
