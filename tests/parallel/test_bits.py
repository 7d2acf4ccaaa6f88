"""The first promise: the same losses, norms and weights, bit for bit, on any number of ranks."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import VOCABULARY, batches, tiny_config

from mlm_mpi.comm.group import Group
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.errors import NumericsError
from mlm_mpi.train.replica import Replica


def train(config, group):
    replica = Replica(config, VOCABULARY, Mesh(group))
    replica.store.initialise(config.train.seed)
    source = batches(config, replica.plan(0, config.train.steps))
    results = [replica.step(step, source) for step in range(config.train.steps)]
    return replica, results


@pytest.mark.parametrize("overlap", ["true", "false"])
def test_five_steps_have_the_same_bits_as_on_one_rank(group, overlap):
    config = tiny_config(f"comm.overlap={overlap}")
    alone, expected = train(config, Group())
    replica, results = train(config, group)
    assert [r.loss for r in results] == [r.loss for r in expected]
    assert [r.gradient_norm for r in results] == [r.gradient_norm for r in expected]
    assert replica.store.weights_sha256() == alone.store.weights_sha256()
    assert np.array_equal(replica.optimizer.moment2, alone.optimizer.moment2)


def test_sgd_too(group):
    config = tiny_config("optim.name=sgd", "model.dropout=0.0")
    assert train(config, group)[0].store.weights_sha256() == train(config, Group())[0].store.weights_sha256()


def test_allreduce_agrees_in_double_precision(group):
    config = tiny_config("comm.reduction=allreduce", "train.dtype=float64")
    expected = [r.loss for r in train(tiny_config("train.dtype=float64"), Group())[1]]
    np.testing.assert_allclose([r.loss for r in train(config, group)[1]], expected, rtol=1e-10)


def test_the_loss_is_divided_by_the_global_count_once(group):
    """Target counts differ between micro-batches: a mean of means would differ."""
    config = tiny_config("train.dtype=float64", "train.steps=1")
    replica = Replica(config, VOCABULARY, Mesh(group))
    replica.store.initialise(config.train.seed)
    every = [batches(config, [(0, index)])() for index in range(16)]
    from mlm_mpi.layers.base import Context

    sums = [
        replica.stack.loss(b.ids, b.targets, b.mask, Context(seed=3, step=0, micro_batch=b.index, training=True))
        for b in every
    ]
    result = replica.step(0, batches(config, replica.plan(0, 1)))
    assert result.targets == sum(b.targets_count for b in every)
    np.testing.assert_allclose(result.loss, sum(sums) / result.targets, rtol=1e-12)


def test_the_first_bucket_leaves_before_the_backward_ends(group):
    config = tiny_config()
    replica = Replica(config, VOCABULARY, Mesh(group))
    replica.store.initialise(3)
    finish, ended = replica.reduction.finish, []
    replica.reduction.finish = lambda: (ended.append(time.perf_counter()), finish())[1]
    embedding, embedded = replica.stack.embedding.backward, []

    def last_backward(*arguments):
        embedding(*arguments)
        embedded.append(time.perf_counter())

    replica.stack.embedding.backward = last_backward
    replica.step(0, batches(config, replica.plan(0, 1)))
    assert replica.reduction.first_start_s < embedded[-1] < ended[0]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_named_on_all_ranks_before_any_update(group, where):
    config = tiny_config("model.dropout=0.0")
    replica = Replica(config, VOCABULARY, Mesh(group))
    replica.store.initialise(3)
    before = replica.store.weights_sha256()
    source, run = batches(config, replica.plan(0, 1)), replica._loss_and_grad

    def poisoned(batch, accumulate, ready):
        loss = run(batch, accumulate, ready if where == "loss" or batch.index != 11 else None)
        if batch.index == 11 and where == "loss":
            return float("nan")
        if batch.index == 11:
            replica.stack.blocks[1].norm2.gain.grad[3] = np.inf
            if ready is not None:
                for block in range(3, -1, -1):
                    ready(block)
        return loss

    replica._loss_and_grad = poisoned
    name = "no parameter" if where == "loss" else "block1.norm2.gain"
    with pytest.raises(NumericsError, match=f"step 0, micro-batch 11: .*{name} is not finite") as caught:
        replica.step(0, source)
    assert caught.value.agreed
    assert replica.store.weights_sha256() == before


def test_heldout_loss_is_the_same_on_any_number_of_ranks(group):
    config = tiny_config()
    losses = []
    for ranks in (Group(), group):
        replica = Replica(config, VOCABULARY, Mesh(ranks))
        replica.store.initialise(3)
        losses.append(replica.heldout_loss(lambda number: batches(config, [(9, number)])(), 5))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("writers", [1, 2, 3])
def test_a_checkpoint_restores_the_same_bits_with_other_writers(group, writers, tmp_path_factory):
    from mlm_mpi.train import checkpoint

    config = tiny_config("train.steps=2")
    replica, _ = train(config, group)
    folder = Path(group.broadcast(str(tmp_path_factory.mktemp("checkpoints")), "a folder"))
    saver = checkpoint.Saver(folder, replica.store, replica.state(), b"{}", group, 2, background=writers % 2 == 0)
    saver.begin(2)
    about = {"config": {}, "vocabulary": VOCABULARY, "catalog": "", "fingerprint": {}}
    assert saver.publish(about) is None
    other = Replica(config, VOCABULARY, Mesh(Group()))
    found = checkpoint.resume(folder, other.store, other.state(), group, print)
    assert found is not None and found[1].step == 2
    assert other.store.weights_sha256() == replica.store.weights_sha256()
    assert np.array_equal(other.optimizer.moment1, replica.optimizer.moment1)
