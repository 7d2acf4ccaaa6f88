"""Continuing a prompt: how the next token is drawn, with and without a cache of keys and values."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlm_mpi.backend.arrays import Place, cpu, to_host, wide
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.data.batch import Batch
from mlm_mpi.errors import ConfigError
from mlm_mpi.layers.attention import KeyValueCache
from mlm_mpi.layers.base import Array, Context
from mlm_mpi.layers.chain import Chain
from mlm_mpi.rng import key_of, uniform


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature below 1e-30: the likeliest. top_k 0 and top_p 1: no cut.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv:1904.09751 (top-p).
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for condition, text in (
            (0 <= self.temperature < math.inf, f"--temperature {self.temperature} must be finite and not negative"),
            (self.top_k >= 0, f"--top-k {self.top_k} must not be negative (0: no cut)"),
            (0 < self.top_p <= 1, f"--top-p {self.top_p} must be in (0, 1]"),
        ):
            if not condition:
                raise ConfigError(text)


# Below it float32 logits above 1e-20 that differ at all are more than e^500 apart; none divides to infinity above it.
_COLDEST = 1e-30


def choose(logits: np.ndarray, sampling: Sampling, number: int) -> int:
    """Token number `number` of a continuation, drawn from logits (V,)."""
    if sampling.temperature < _COLDEST:
        return int(logits.argmax())
    scaled = logits.astype("f8") / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    cumulative = np.cumsum(weights / weights.sum())
    kept = int(np.searchsorted(cumulative, sampling.top_p)) + 1 if sampling.top_p < 1 else len(order)
    cumulative = cumulative[:kept] / cumulative[min(kept, len(order)) - 1]
    draw = float(uniform(key_of(sampling.seed, "generate"), number, 1)[0])
    return int(order[min(int(np.searchsorted(cumulative, draw, side="right")), len(cumulative) - 1)])


def logits(
    chain: Chain, ids: Array, cache: KeyValueCache | None = None, mesh: Mesh | None = None, source: Batch | None = None
) -> Array | None:  # fmt: skip
    """Shapes: ids (B, T) -> (B, T, V); with a cache, T new positions after those it holds.

    `source`: what an encoder reads; with a cache of an encoder-decoder it is given once, with the first ids.

    Where ranks of a mesh share the model, this one's part of it: (B, T, V / tp) of the last stage, None of the others.
    Collective over pp and tp.
    """
    mesh = mesh or Mesh()
    ctx = Context(mesh, batch=Batch(0, 0, {"ids": ids}, {}, 0, source=source), cache=cache)
    last = mesh.coord("pp") == mesh.size("pp") - 1
    (hidden, *_), _ = (chain.without_last_part() if last else chain).forward((), ctx)
    found = chain.parts[-1].logits(hidden, ctx) if last else None  # type: ignore[attr-defined]  # a head of tokens
    if cache is not None:
        cache.advance(ids.shape[1])
    return found


def _next(found: Array | None, sampling: Sampling, number: int, mesh: Mesh) -> int:
    """The token that follows the last position of logits, the same on all ranks that share the model. Collective."""
    token = -1
    if found is not None:
        mine = to_host(wide(found[0, -1]))
        token = choose(mesh.group("tp").allgather_array(mine, "the logits").reshape(-1), sampling, number)
    return int(mesh.group("pp").allgather_array(np.array([token]), "the next token")[-1, 0])


def continue_prompt(
    chain: Chain, context: int, prompt: Sequence[int], sampling: Sampling, cached: bool = True,
    place: Place | None = None, mesh: Mesh | None = None,
) -> Iterator[int]:  # fmt: skip
    """Endless continuation of a prompt of at least one token.

    `mesh`: of the ranks that share the model, all of which draw the same tokens; a rank keeps keys and values of its
    own layers and heads. Each token is collective over them.

    When the context is full, the newest half of it is read again and generation goes on from there.
    `cached=False` reads the whole window for every token: the reference for the cache.
    """
    place, mesh, held = place or cpu(), mesh or Mesh(), list(prompt)[-context:]
    cache, unread, number = KeyValueCache(context), list(held), 0
    while True:
        ids = place.put(np.array([unread if cached else held], np.int32))
        token = _next(logits(chain, ids, cache if cached else None, mesh), sampling, number, mesh)
        yield token
        number += 1
        held, unread = [*held, token], [token]
        if len(held) > context:
            held = held[-max(1, context // 2) :]
            cache, unread = KeyValueCache(context), list(held)
