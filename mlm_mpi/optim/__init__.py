"""Optimisers over flat buffers: `optim.name` names the file."""

from typing import Any, Protocol


class Optimizer(Protocol):
    """Updates `store.data` in place; its state is flat buffers of the store's layout."""

    def step(self, gradient: Any, learning_rate: float, scale: float, number: int) -> None: ...
    def state(self) -> dict[str, Any]: ...
