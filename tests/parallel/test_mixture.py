"""A mixture whose micro-batches grow: the same bits on any number of ranks, and when a stage is left half-way."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from streams import Tokens
from tiny import VOCABULARY, tiny_config
from whole import engine_of

from mlm_mpi.comm.group import Group
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.data.loader import Loader
from mlm_mpi.data.mixture import Joined, mixture_of
from mlm_mpi.data.objectives import causal
from mlm_mpi.data.sampler import Sampler
from mlm_mpi.data.warmup import Pieces

CONFIG = (
    "model.layers=1", "model.context=8", "train.rows=4", "train.steps=4", "optim.warmup_steps=2", "train.first_rows=1",
    "train.micro_batches=8",    "train.rows_warmup_steps=3", "train.first_context=2", "train.context_warmup_steps=4",
)  # fmt: skip


def source(config):
    """Micro-batches of two corpora, 0.7 and 0.3."""
    ramp = config.train.context_ramp(config.model.context)
    parts = [Pieces(causal.samples(Tokens(size, seed), 8, True), ramp) for seed, size in ((1, 900), (2, 400))]
    samples = Joined(parts, (7, 3), ("a", "b"))
    sampler = Sampler(config.train.seed, mixture_of(samples), config.train.micro_batches, config.train.rows_ramp())
    return Loader(samples, sampler, 1)


def go_on(engine, config, first, stop):
    """(loss, targets) of steps first … stop - 1."""
    loader, plan = source(config), engine.plan(first, stop)
    results = [engine.step(step, lambda: loader.micro_batch(*next(plan))) for step in range(first, stop)]
    return [(result.loss, result.targets) for result in results]


def new_engine(config, group):
    engine = engine_of(config, VOCABULARY, Mesh(group))
    engine.machine.store.initialise(config.train.seed)
    return engine


@pytest.mark.usefixtures("three")
def test_as_on_one_rank_and_resumed_there_within_a_stage(group):
    config = tiny_config(*CONFIG)
    alone = new_engine(config, Group())
    expected = go_on(alone, config, 0, 4)
    assert [targets // (8 * 8) for _, targets in expected] == [1, 2, 2, 4]
    engine, resumed = new_engine(config, group), new_engine(config, Group())
    assert go_on(engine, config, 0, 2) == expected[:2]
    for name, buffer in resumed.state().items():
        buffer[...] = engine.state()[name]
    assert go_on(resumed, config, 2, 4) == go_on(engine, config, 2, 4) == expected[2:]
    assert resumed.machine.store.weights_sha256() == alone.machine.store.weights_sha256()
    assert engine.machine.store.weights_sha256() == alone.machine.store.weights_sha256()
