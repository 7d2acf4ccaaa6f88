"""The pre-norm transformer block, composed of what it is given, and feed-forward halves."""

from typing import Any, Protocol, runtime_checkable

from mlm_mpi.layers.base import Array, Context, Flow, Map
from mlm_mpi.layers.linear import Linear, ResidualLinear, flat
from mlm_mpi.params.store import Parameter


class Norm(Protocol):
    """A normalisation whose backward can add the gradient that went past its branch. Shapes: (B, T, C) -> the same."""

    def parameters(self) -> list[Parameter]: ...
    def forward(self, x: Array, ctx: Context) -> tuple[Array, Any]: ...
    def backward(self, dy: Array, saved: Any, ctx: Context, add: Array = None) -> Array: ...


class Branch(Protocol):
    """A mixer of positions or an mlp; adds `residual` at its end. Shapes: (B, T, C) -> (B, T, C)."""

    def parameters(self) -> list[Parameter]: ...
    def forward(self, x: Array, ctx: Context, residual: Array = None) -> tuple[Array, Any]: ...
    def backward(self, dy: Array, saved: Any, ctx: Context) -> Array: ...


@runtime_checkable
class Attends(Protocol):
    """A mixer whose positions look at each other. Shapes: (B, T, C) -> (B, H, T, T), rows look at columns."""

    name: str

    def maps(self, x: Array, ctx: Context) -> Array: ...


class FeedForward:
    """x -> GELU(x W₁ + b₁) W₂ + b₂. Shapes: (B, T, C) -> (B, T, C), (B, T, F) in between."""

    def __init__(self, up: Linear, down: ResidualLinear) -> None:
        self.up, self.down = up, down

    def parameters(self) -> list[Parameter]:
        return self.up.parameters() + self.down.parameters()

    def forward(self, x: Array, ctx: Context, residual: Array = None) -> tuple[Array, Any]:
        """`residual` or None: what the result is added to."""
        hidden, pre = self.up.forward_gelu(x, ctx)  # (B, T, F)
        y, s_down = self.down.join(hidden, residual, ctx)
        return y, (x, pre, s_down)

    def backward(self, dy: Array, saved: Any, ctx: Context) -> Array:
        x, pre, s_down = saved
        return self.up.backward(self.down.backward(dy, s_down, ctx, pre), x, ctx)


class Activation(Protocol):
    """An op of ops/ between the two products. Shapes: (N, *outputs of the first) <-> (N, F)."""

    def forward(self, x: Array) -> Array: ...
    def backward(self, dy: Array, x: Array) -> Array: ...


class ActivatedFeedForward:
    """x -> activation(x W₁) W₂, where W₁ (C, 2, F) may give a gate too. Shapes: (B, T, C) -> (B, T, C)."""

    def __init__(self, up: Linear, activation: Activation, down: ResidualLinear) -> None:
        self.up, self.activation, self.down = up, activation, down

    def parameters(self) -> list[Parameter]:
        return self.up.parameters() + self.down.parameters()

    def forward(self, x: Array, ctx: Context, residual: Array = None) -> tuple[Array, Any]:
        """`residual` or None: what the result is added to."""
        up = self.up.forward(x, ctx)[0]  # (B, T, …), all positions
        pre = up.reshape(-1, *self.up.outputs)  # (N, 2, F), or (N, F)
        hidden = self.activation.forward(pre).reshape(*up.shape[:2], -1)
        y, s_down = self.down.join(hidden, residual, ctx)
        return y, (x, pre, s_down)

    def backward(self, dy: Array, saved: Any, ctx: Context) -> Array:
        x, pre, s_down = saved
        dhidden = self.down.backward(dy, s_down, ctx)
        dpre = self.activation.backward(flat(dhidden), pre)
        return self.up.backward(dpre.reshape(*dhidden.shape[:2], -1), x, ctx)


class Block:
    """x + mixer(norm1(x)), then x + mlp(norm2(x)). Shapes: (B, T, C) -> (B, T, C).

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019.
    """

    def __init__(self, norm1: Norm, mixer: Branch, norm2: Norm, mlp: Branch) -> None:
        self.norm1, self.mixer, self.norm2, self.mlp = norm1, mixer, norm2, mlp

    def parameters(self) -> list[Parameter]:
        parts = (self.norm1, self.mixer, self.norm2, self.mlp)
        return [p for part in parts for p in part.parameters()]

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, Any]:
        n1, s_norm1 = self.norm1.forward(x[0], ctx)
        middle, s_mixer = self.mixer.forward(n1, ctx, residual=x[0])
        n2, s_norm2 = self.norm2.forward(middle, ctx)
        y, s_mlp = self.mlp.forward(n2, ctx, residual=middle)
        return (y,), (s_norm1, s_mixer, s_norm2, s_mlp)

    def backward(self, dy: Flow, saved: Any, ctx: Context) -> Flow:
        s_norm1, s_mixer, s_norm2, s_mlp = saved
        d = self.norm2.backward(self.mlp.backward(dy[0], s_mlp, ctx), s_norm2, ctx, add=dy[0])
        return (self.norm1.backward(self.mixer.backward(d, s_mixer, ctx), s_norm1, ctx, add=d),)

    def maps(self, x: Flow, ctx: Context) -> dict[str, Map]:
        """Who attends to whom in it, by the name of what attends."""
        return _maps(self.mixer, self.norm1.forward(x[0], ctx)[0], ctx)


class PostNormBlock:
    """norm1(x + mixer(x)), then norm2 of that and mlp of it. Shapes: (B, T, C) -> (B, T, C).

    Source: Vaswani et al., arXiv:1706.03762; BERT's (Devlin et al., arXiv:1810.04805).
    """

    def __init__(self, mixer: Branch, norm1: Norm, mlp: Branch, norm2: Norm) -> None:
        self.mixer, self.norm1, self.mlp, self.norm2 = mixer, norm1, mlp, norm2

    def parameters(self) -> list[Parameter]:
        parts = (self.mixer, self.norm1, self.mlp, self.norm2)
        return [p for part in parts for p in part.parameters()]

    def forward(self, x: Flow, ctx: Context) -> tuple[Flow, Any]:
        a, s_mixer = self.mixer.forward(x[0], ctx, residual=x[0])
        middle, s_norm1 = self.norm1.forward(a, ctx)
        b, s_mlp = self.mlp.forward(middle, ctx, residual=middle)
        y, s_norm2 = self.norm2.forward(b, ctx)
        return (y,), (s_mixer, s_norm1, s_mlp, s_norm2)

    def backward(self, dy: Flow, saved: Any, ctx: Context) -> Flow:
        s_mixer, s_norm1, s_mlp, s_norm2 = saved
        db = self.norm2.backward(dy[0], s_norm2, ctx)
        da = self.norm1.backward(self.mlp.backward(db, s_mlp, ctx) + db, s_norm1, ctx)
        return (self.mixer.backward(da, s_mixer, ctx) + da,)

    def maps(self, x: Flow, ctx: Context) -> dict[str, Map]:
        """As `Block.maps`."""
        return _maps(self.mixer, x[0], ctx)


def _maps(mixer: Branch, x: Array, ctx: Context) -> dict[str, Map]:
    """Those of a mixer that has some; a mean over positions, say, has none."""
    return {mixer.name: Map(mixer.maps(x, ctx))} if isinstance(mixer, Attends) else {}
