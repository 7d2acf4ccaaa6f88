"""Fixtures of the tests that run inside mpiexec."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import VOCABULARY, batches, tiny_config
from whole import engine_of

from mlm_mpi.comm import launch
from mlm_mpi.comm.group import Group
from mlm_mpi.train.engine import Engine


@pytest.fixture(scope="session")
def world() -> Group:
    """All ranks; a wait that lasts 60 s is a failure, not a hang."""
    return launch.start().with_timeout(60.0)


@pytest.fixture()
def group(world: Group) -> Group:
    """All ranks on a communicator of this test's own."""
    return world.duplicate()


@pytest.fixture()
def three(world: Group) -> None:
    """For what more ranks would only say once more."""
    if world.size > 3:
        pytest.skip("1, 2 and 3 ranks say it: none, an even and an uneven share")


@pytest.fixture()
def few(world: Group) -> None:
    """For what depends on the number of ranks, and not on whether it is a power of two or divides the lanes."""
    if world.size in (5, 7):
        pytest.skip("1, 2, 3, 4 and 8 ranks say it")


def digests(engine: Engine) -> dict[str, str]:
    """The SHA-256 of everything a step changes."""
    return {name: hashlib.sha256(flat.tobytes()).hexdigest() for name, flat in engine.state().items()}


class Alone(NamedTuple):
    """What one rank came to, step by step."""

    losses: list[float]
    norms: list[float]
    targets: list[int]
    digests: list[dict[str, str]]
    weights: list[np.ndarray]


@pytest.fixture(scope="session")
def alone(world: Group) -> Callable[..., Alone]:
    """Trains on one rank, from the beginning: rank 0 does and tells the others, once for each configuration.

    If every rank did, it would take as many times as long where ranks share cores.
    """
    known: dict[Any, Alone] = {}

    def trained(*overrides: str, left_out: tuple[int, ...] = (), levels: dict[str, Any] | None = None) -> Alone:
        """`left_out`: micro-batches of step 1 that are never run, in two steps. `levels`: what the guard has seen."""
        key = overrides, left_out, repr(levels)
        if key not in known:
            config, what = tiny_config(*overrides), "what one rank comes to"
            engine, steps = engine_of(config, VOCABULARY), range(2 if left_out else config.train.steps)
            rows, weights = [], [np.empty_like(engine.machine.store.data) for _ in steps]
            if world.rank == 0:
                engine.machine.store.initialise(config.train.seed)
                engine.quarantine = {(1, index): "left out" for index in left_out}
                if levels is not None:
                    engine.machine.guard.restore(levels)
                source = batches(config, list(engine.plan(0, len(steps))))
                for step in steps:
                    done = engine.step(step, source)
                    rows.append((done.loss, done.gradient_norm, done.targets, digests(engine)))
                    weights[step][...] = engine.machine.store.data
            losses, norms, targets, states = map(list, zip(*world.broadcast(rows, what), strict=True))
            for flat in weights:
                world.spread(flat, 0, what)
            known[key] = Alone(losses, norms, targets, states, weights)
        return known[key]

    return trained
