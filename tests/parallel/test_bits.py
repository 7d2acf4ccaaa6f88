"""The first promise: the same losses, norms and weights, bit for bit, on any number of ranks."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import digests
from tiny import VOCABULARY, batches, tiny_config
from whole import Listed, engine_of

from mlm_mpi.comm.group import Group
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.errors import NumericsError
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.chain import Chain
from mlm_mpi.schedules import zero_bubble
from mlm_mpi.train.measure import measure


def train(config, group, steps=None):
    engine = engine_of(config, VOCABULARY, Mesh(group))
    engine.machine.store.initialise(config.train.seed)
    source = batches(config, engine.plan(0, steps or config.train.steps))
    results = [engine.step(step, source) for step in range(steps or config.train.steps)]
    return engine, results


def saved_and_restored(engine, other, group, tmp_path_factory, step, background=False):
    """What `engine` holds, by way of a checkpoint of all ranks, in `other`."""
    from mlm_mpi.train import checkpoint

    folder = Path(group.broadcast(str(tmp_path_factory.mktemp("checkpoints")), "a folder"))
    saver = checkpoint.Saver(folder, engine.machine.store, engine.state(), b"{}", group, 2, background=background)
    saver.begin(step)
    about = {"config": {}, "vocabulary": VOCABULARY, "catalog": "", "fingerprint": {}}
    assert saver.publish(about) is None
    found = checkpoint.resume(folder, other.machine.store, other.state(), group, print)
    assert found is not None and found[1].step == step


@pytest.mark.parametrize("overlap", ["true", "false"])
def test_five_steps_have_the_same_bits_as_on_one_rank(group, alone, overlap):
    engine, results = train(tiny_config(f"comm.overlap={overlap}"), group)
    expected = alone()
    assert [r.loss for r in results] == expected.losses
    assert [r.gradient_norm for r in results] == expected.norms
    assert digests(engine) == expected.digests[-1] and list(digests(engine)) == ["weights", "moment1", "moment2"]


def test_input_halves_that_run_ahead_change_no_bit(group, alone):
    """Weight halves come two micro-batches, so a lane, later, as on stage 2 of 4; buckets leave in the last of them."""
    config, expected = tiny_config(), alone()
    engine = engine_of(config, VOCABULARY, Mesh(group))
    engine.machine = replace(engine.machine, instructions=lambda _, __, micros: zero_bubble.instructions(2, 4, micros))
    engine.machine.store.initialise(config.train.seed)
    source = batches(config, engine.plan(0, 2))
    assert [engine.step(step, source).loss for step in range(2)] == expected.losses[:2]
    assert digests(engine) == expected.digests[1]


@pytest.mark.parametrize("reduction", ["canonical", "naive", "allreduce"])
def test_a_rank_without_lanes_changes_no_bit(group, alone, reduction):
    """A spare; allreduce has no bits of its own, and comes near."""
    if group.size == 1:
        pytest.skip("a spare alone would have nobody to stand beside")
    config = tiny_config("comm.spares=1", f"comm.reduction={reduction}", "guard.audit_every=1")
    engine, results = train(config, group, 2)
    expected = alone()
    assert engine.machine.assignment.ranks == group.size - 1
    assert not any(result.verdict.said for result in results)
    if reduction == "allreduce":
        np.testing.assert_allclose(engine.machine.store.data, expected.weights[1], atol=1e-5)
        return
    assert [r.loss for r in results] == expected.losses[:2]
    assert digests(engine) == expected.digests[1]


@pytest.mark.usefixtures("three")
def test_sgd_too(group, alone):
    overrides = "optim.name=sgd", "model.dropout=0.0", "train.steps=3"
    assert digests(train(tiny_config(*overrides), group)[0]) == alone(*overrides).digests[-1]


@pytest.mark.usefixtures("few")
def test_muon_and_an_average_have_their_bits_and_go_on_with_them(group, alone, tmp_path_factory):
    """Three steps of one rank are one of these ranks, which own a few matrices each, a checkpoint, and two more."""
    overrides = [
        "optim.name=muon", "optim.average=0.9", "optim.decay_fraction=0.5", "optim.momentum_steps=2",
        "model.dropout=0.0", "train.micro_batches=8", "train.steps=3",
    ]  # fmt: skip
    config, expected = tiny_config(*overrides), alone(*overrides).digests[-1]
    assert list(expected) == ["weights", "moment1", "moment2", "average"]
    assert expected["average"] != expected["weights"]
    engine, _ = train(config, group, 1)
    resumed = engine_of(config, VOCABULARY, Mesh(group))
    saved_and_restored(engine, resumed, group, tmp_path_factory, 1)
    source = batches(config, resumed.plan(1, 3))
    for step in (1, 2):
        resumed.step(step, source)
    assert digests(resumed) == expected


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("change", ["model.kind=lstm", "model.kind=gru", "numerics.products=bf16"])
def test_other_models_and_activations_have_their_bits_and_go_on_with_them(
    group, alone, change, tmp_path_factory, monkeypatch
):
    """Three steps on one rank are two on these ranks, a checkpoint, and one of another start. bf16 in plain C."""
    monkeypatch.setenv("MLM_MPI_BF16", "portable")
    overrides = change, "train.steps=3", "train.rows=1"
    config, expected = tiny_config(*overrides), alone(*overrides)
    engine, _ = train(config, group, 2)
    resumed = engine_of(config, VOCABULARY, Mesh(group))
    saved_and_restored(engine, resumed, group, tmp_path_factory, 2)
    resumed.step(2, batches(config, resumed.plan(2, 3)))
    assert digests(resumed) == expected.digests[-1]


@pytest.mark.usefixtures("three")
def test_allreduce_agrees_in_double_precision(group, alone):
    overrides = "train.dtype=float64", "train.steps=3"
    results = train(tiny_config("comm.reduction=allreduce", *overrides), group)[1]
    np.testing.assert_allclose([r.loss for r in results], alone(*overrides).losses, rtol=1e-10)


@pytest.mark.usefixtures("three")
def test_the_loss_is_divided_by_the_global_count_once(group):
    """Target counts differ between micro-batches: a mean of means would differ."""
    config = tiny_config("train.dtype=float64", "train.steps=1")
    engine = engine_of(config, VOCABULARY, Mesh(group))
    engine.machine.store.initialise(config.train.seed)
    every = [batches(config, [(0, index)])() for index in range(16)]
    sums = []
    for batch in every if group.rank == 0 else ():
        ctx = Context(seed=3, step=0, micro_batch=batch.index, training=True, batch=batch)
        hidden, _ = Chain(engine.machine.chain.parts[:-1]).forward((), ctx)
        engine.machine.chain.parts[-1].forward(hidden, replace(ctx, training=False))
        sums.append(ctx.tally["loss"])
    result = engine.step(0, batches(config, engine.plan(0, 1)))
    assert result.targets == sum(b.count for b in every)
    total = group.broadcast(sum(map(float, sums)), "the sum of one rank")
    np.testing.assert_allclose(result.loss, total / result.targets, rtol=1e-12)


@pytest.mark.usefixtures("few")
def test_the_first_bucket_leaves_before_the_backward_ends(group):
    config = tiny_config()
    engine = engine_of(config, VOCABULARY, Mesh(group))
    engine.machine.store.initialise(3)
    finish, ended = engine.machine.reduction.finish, []
    engine.machine.reduction.finish = lambda: (ended.append(time.perf_counter()), finish())[1]
    first = engine.machine.chain.parts[0]
    embedding, embedded = first.backward, []

    def last_backward(*arguments):
        dx = embedding(*arguments)
        embedded.append(time.perf_counter())
        return dx

    first.backward = last_backward
    engine.step(0, batches(config, engine.plan(0, 1)))
    assert engine.machine.reduction.first_start_s < embedded[-1] < ended[0]


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_named_on_all_ranks_before_any_update(group, where):
    config = tiny_config("model.dropout=0.0", "guard.policy=stop")
    engine = engine_of(config, VOCABULARY, Mesh(group))
    engine.machine.store.initialise(3)
    before = engine.machine.store.weights_sha256()
    head, block, source = (
        engine.machine.chain.parts[-1],
        engine.machine.chain.parts[2],
        batches(config, engine.plan(0, 1)),
    )

    def poisoned(part, spoil):
        backward = part.backward

        def run(dy, saved, ctx):
            dx = backward(dy, saved, ctx)
            if ctx.micro_batch == 11:
                spoil(ctx)
            return dx

        part.backward = run

    if where == "loss":
        poisoned(head, lambda ctx: ctx.tally.update(loss=float("nan")))
    else:
        poisoned(block, lambda ctx: ctx.grad(block.norm2.gain).put(3, np.inf))
    name = "no parameter" if where == "loss" else "block1.norm2.gain"
    with pytest.raises(NumericsError, match=f"step 1, micro-batch 11: .*{name} is not finite") as caught:
        engine.step(0, source)
    assert caught.value.agreed
    assert engine.machine.store.weights_sha256() == before


@pytest.mark.usefixtures("few")
def test_heldout_loss_is_the_same_on_any_number_of_ranks(group):
    config = tiny_config()
    losses = []
    for ranks in (Group(), group):
        engine = engine_of(config, VOCABULARY, Mesh(ranks))
        engine.machine.store.initialise(3)
        every = Listed([batches(config, [(9, number)])() for number in range(5)])
        machine = engine.machine
        losses.append(measure(machine.chain, every, 1, 0, machine.mesh, machine.place))
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def trained(world):
    """An engine of these ranks after two steps."""
    return train(tiny_config("train.steps=2"), world)[0]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_restores_the_same_bits_on_one_rank(group, trained, background, tmp_path_factory):
    engine, other = trained, engine_of(tiny_config("train.steps=2"), VOCABULARY)
    saved_and_restored(engine, other, group, tmp_path_factory, 2, background=background)
    assert other.machine.store.weights_sha256() == engine.machine.store.weights_sha256()
    assert np.array_equal(other.machine.optimizer.moment1, engine.machine.optimizer.moment1)
