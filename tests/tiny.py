"""A model and data small enough to train in a test, made in memory."""

import numpy as np

from mlm_mpi import config as configuration
from mlm_mpi.config import Config
from mlm_mpi.data.batch import Batch

VOCABULARY = 37


def tiny_config(*overrides: str) -> Config:
    """J = 8 lanes of two micro-batches each, dropout on."""
    base = ["model.layers=2", "model.width=24", "model.context=10", "model.dropout=0.1"]
    base += [] if {"model.kind=lstm", "model.kind=gru"} & set(overrides) else ["model.heads=3"]
    base += ["train.micro_batches=16", "train.lanes=8", "train.rows=2", "train.steps=5", "train.seed=3"]
    base += ["optim.learning_rate=1e-2", "comm.bucket_mib=0.004"]
    return configuration.load(None, [*base, *overrides])


def batches(config: Config, plan: list[tuple[int, int]]):
    """A source of micro-batches that are pure functions of (step, index); target counts differ."""
    iterator = iter(plan)
    shape = (config.train.rows, config.model.context)

    def next_batch() -> Batch:
        step, index = next(iterator)
        random = np.random.default_rng([step, index])
        ids = random.integers(0, VOCABULARY, shape).astype(np.int32)
        targets = random.integers(0, VOCABULARY, shape).astype(np.int32)
        mask = random.random(shape) < 0.7
        return Batch(step, index, {"ids": ids}, {"ids": targets, "mask": mask}, int(mask.sum()))

    return next_batch
