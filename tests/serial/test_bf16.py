"""Models whose activations are bf16, on the CPU: whole steps through the kernels, in the plain C that any CPU runs."""

from dataclasses import replace

import numpy as np
import pytest
from numerics import same_bits
from samples import LABELS, OTHERS
from samples import VOCABULARY as MORE
from test_bert import SMALL, driven, made_of
from tiny import VOCABULARY, batches, tiny_config
from whole import Whole, engine_of

from mlm_mpi import generation
from mlm_mpi.backend import choice, registry
from mlm_mpi.backend.arrays import BFLOAT16, cpu
from mlm_mpi.backend.cpu import library
from mlm_mpi.layers.attention import KeyValueCache
from mlm_mpi.layers.base import Context
from mlm_mpi.models import gpt, llama
from mlm_mpi.train.engine import Engine
from mlm_mpi.train.memory import bytes_held

pytestmark = pytest.mark.skipif(not library.runs("base"), reason="no compiled library")

MODELS = {
    "gpt": (),
    "llama": (
        "model.kind=llama", "model.heads=6", "model.key_value_heads=3", "model.width=48", "model.qk_norm=true",
        "model.logit_cap=5", "model.window=6",
    ),
    "llama, relu2": ("model.kind=llama", "model.heads=3", "model.activation=relu2", "model.tied=true"),
    "lstm": ("model.kind=lstm",),
    "gru": ("model.kind=gru",),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_plain_c(monkeypatch):
    monkeypatch.setenv(library.BF16_VARIABLE, "portable")
    yield
    choice.select()


def trained(*overrides: str, steps: int = 2) -> tuple[Engine, list[float]]:
    """The engine after some steps, and their losses."""
    config = tiny_config("train.micro_batches=8", *overrides)
    engine = engine_of(config, VOCABULARY)
    engine.machine.store.initialise(config.train.seed)
    source = batches(config, engine.plan(0, steps))
    return engine, [engine.step(step, source).loss for step in range(steps)]


@pytest.mark.parametrize("model", MODELS)
def test_steps_are_the_kernels_and_lose_what_float64_does(model):
    """Relative to float64: 8 bits of a number are 4e-3, and a loss is a mean of many."""
    engine, losses = trained("numerics.products=bf16", *MODELS[model])
    assert not registry.fallbacks()
    store = engine.machine.store
    assert store.data.dtype == np.float32 and store.spans[0].parameter.data.dtype == BFLOAT16
    assert same_bits(store.working, store.data.astype(BFLOAT16)), "layers see what the update made"
    assert bytes_held(engine)["weights in bf16"] == bytes_held(engine)["weights"] // 2
    exact = trained("train.dtype=float64", *MODELS[model])[1]
    assert losses == pytest.approx(exact, rel=2e-3) and losses != pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(("norm", "task"), [("post", "masked"), ("pre", "first"), ("pre", "mean")])
def test_an_encoder_is_the_kernels_and_loses_what_float64_does(norm, task):
    settings = replace(SMALL, norm=norm, init_std=0.1)
    made, found = made_of(task, 3), {}
    for products, dtype in (("bf16", "f4"), ("float32", "f8")):
        choice.select(products=products)
        whole = driven(settings, task, dtype, place=cpu(dtype, products))
        whole.store.initialise(1)
        loss = whole.loss_and_grad(made, Context(training=True))
        told = whole.tally(made)
        assert products == "float32" or not registry.fallbacks()
        found[products] = loss, told["loss"], np.linalg.norm(whole.gradient)
    assert found["bf16"] == pytest.approx(found["float32"], rel=1e-2)
    assert found["bf16"] != pytest.approx(found["float32"], rel=1e-6)


HEADS = {
    "tagging": ("model.kind=bert", "task.smoothing=0.1"),
    "dialogue": ("model.kind=llama", "model.context=24"),
    "translation": ("model.kind=encoder_decoder",),
    "span_corruption": ("model.kind=encoder_decoder",),
    "question_answering": ("model.kind=bert",),
    "preference": ("model.kind=llama", "model.context=24", "start.checkpoint=x"),
}


@pytest.mark.parametrize(
    "task", ["question_answering", "preference", *(pytest.param(task, marks=pytest.mark.slow) for task in [*HEADS][:4])]
)
def test_the_heads_of_tasks_are_the_kernels_lose_what_float64_does_and_learn(task):
    """The same micro-batches again and again."""
    sizes = "model.layers=1", "model.width=16", "model.heads=2", "model.context=16", "model.dropout=0"
    words, found = (*sizes, f"task.kind={task}", *HEADS[task], "train.micro_batches=4", "train.lanes=4"), {}
    for products in ("numerics.products=bf16", "train.dtype=float64"):
        config = tiny_config(*words, products)
        engine = engine_of(config, MORE, labels=LABELS)
        engine.machine.store.initialise(config.train.seed)
        again = ((0, index) for _, index in engine.plan(0, 5))
        source = iter(OTHERS[task](config, again)).__next__
        ctx = Context(batch=next(iter(OTHERS[task](config, [(0, 0)]))))
        engine.machine.chain.forward((), ctx)  # as in an evaluation
        told = ctx.tally["loss"] / ctx.batch.count
        found[products] = np.array([told, *(engine.step(step, source).loss for step in range(5))])
        assert "bf16" not in products or not registry.fallbacks()
    ours, exact = found.values()
    assert 1e-6 < np.abs(ours / exact - 1).max() < 1e-2
    assert ours[-1] < 0.99 * ours[1]


@pytest.mark.parametrize("ops", ["matmul,linear", "all"])
def test_numpy_may_take_ops_back(ops):
    """In float32, of the same arrays: to find the kernel that spoils a loss."""
    _, losses = trained("numerics.products=bf16")
    _, found = trained("numerics.products=bf16", f"numerics.reference={ops}")
    assert found == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("optimiser", ["muon", "lion", "sgd"])
def test_every_optimiser_makes_the_layers_copy_anew(optimiser):
    engine, _ = trained("numerics.products=bf16", f"optim.name={optimiser}", "model.dropout=0")
    store = engine.machine.store
    assert same_bits(store.working, store.data.astype(BFLOAT16)) and not registry.fallbacks()


@pytest.mark.parametrize("model", MODELS)
def test_recomputing_and_threads_change_no_bit(model):
    """200 rows: two threads share the products."""
    words = ("numerics.products=bf16", "train.rows=20", *MODELS[model])
    hashes = {
        trained(*words, *more, steps=1)[0].machine.store.weights_sha256()
        for more in ((), ("train.recompute=true",), ("numerics.threads=2",))
    }
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (gpt, gpt.Settings(layers=2, width=32, heads=2, context=24, feed_forward=64)),
        (llama, llama.Settings(layers=2, width=32, heads=4, key_value_heads=2, context=24, qk_norm=True, logit_cap=5)),
    ],
)  # fmt: skip
def test_a_cache_gives_the_logits_of_the_whole_window_but_for_rounding(model, settings):
    choice.select(products="bf16")
    whole = Whole(settings, VOCABULARY, "f4", cpu("f4", "bf16"), model=model)
    whole.store.initialise(1)
    ids, cache = np.random.default_rng(2).integers(0, VOCABULARY, (1, 20)).astype("i4"), KeyValueCache(24)
    every = whole.logits(ids)
    parts = [whole.logits(ids[:, :7], cache), *(whole.logits(ids[:, at : at + 1], cache) for at in range(7, 20))]
    assert every.dtype == BFLOAT16
    every, found = every.astype("f4"), np.concatenate(parts, axis=1).astype("f4")
    assert np.abs(found - every).max() <= 2**-6 * np.abs(every).max()
    tokens = generation.continue_prompt(whole.chain, 24, [1, 2, 3], generation.Sampling(), place=whole.store.place)
    assert all(0 <= next(tokens) < VOCABULARY for _ in range(30))


def test_evaluation_of_a_step_is_the_loss_of_its_forward():
    choice.select(products="bf16")
    whole = Whole(gpt.Settings(layers=1, width=32, heads=2, context=16), VOCABULARY, "f4", cpu("f4", "bf16"))
    whole.store.initialise(1)
    ids = np.random.default_rng(2).integers(0, VOCABULARY, (3, 17)).astype("i4")
    arguments = np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:]), None
    assert whole.loss(*arguments, Context()) == whole.loss_and_grad(*arguments, Context())
    assert np.isfinite(whole.gradient).all() and whole.gradient.dtype == np.float32 and not registry.fallbacks()
