"""Fine-tuning: what begins with another run's weights, what of it is frozen, adapters, the search for the best."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from numerics import directional, same_bits
from tiny import batches, tiny_config
from whole import Whole

from mlm_mpi import config as configuration
from mlm_mpi.backend.choice import place_of
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.cut import Box
from mlm_mpi.errors import ConfigError
from mlm_mpi.layers.adapters import adapt, linears, merge
from mlm_mpi.layers.base import Context, Sizes
from mlm_mpi.layers.chain import Chain
from mlm_mpi.models import gpt, llama
from mlm_mpi.params.sources import Arrays, Drawn, Over
from mlm_mpi.params.store import Apart, FlatStore
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks import language_model
from mlm_mpi.train import Eval, Start
from mlm_mpi.train.build import build
from mlm_mpi.train.folder import RunFolder
from mlm_mpi.train.search import Heldout, Search, best_of
from mlm_mpi.train.start import freeze

VOCABULARY = 37
GPT = gpt.Settings(layers=2, width=24, heads=3, context=8, init_std=0.3)
LLAMA = llama.Settings(layers=2, width=24, heads=3, context=8, feed_forward=64, init_std=0.3)
EVERY_MAP = ("attention.qkv", "attention.project", "feed_forward.up", "feed_forward.down")


class Adapted(Whole):
    """A model with adapters that are not zero, and what is frozen."""

    def __init__(self, settings, model=gpt, targets=EVERY_MAP, start=None, dtype="f8"):
        super().__init__(settings, VOCABULARY, dtype, model=model)
        adapt(self.chain.parts, 3, 6.0, targets) if targets else None
        freeze(self.chain.parts, start or Start(lora_rank=3 if targets else 0), None)
        self.chain = Chain(self.chain.parts)
        self.store = FlatStore(self.chain.parameter_blocks(), Mesh(), dtype)
        self.store.initialise(1)
        random = np.random.default_rng(5)
        for linear in (one.beside.up for part in self.chain.parts for one in linears(part) if one.beside):
            linear.weight.data[...] = random.normal(size=linear.weight.data.shape) * 0.1
        self.gradient = self.store.new_buffer()


def text(rows=2, length=8):
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (rows, length + 1)).astype(np.int32)
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("model", [gpt, llama])
def test_gradients_of_adapters_are_those_of_differences(model):
    whole = Adapted(GPT if model is gpt else LLAMA, model)
    assert whole.store.still is not None and len(whole.store.spans) == 16
    ids, targets = text()
    ctx = Context(training=True)
    whole.loss_and_grad(ids, targets, None, ctx)
    for span in whole.store.spans:
        directional(lambda: whole.loss(ids, targets, None, ctx), span.parameter.data, whole[span.parameter], tol=1e-6)
    found = whole.gradient.copy()
    whole.loss_and_grad(ids, targets, None, ctx, halves=True)
    assert same_bits(whole.gradient, found)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_a_merged_model_is_the_one_with_adapters(dtype):
    whole, (ids, _) = Adapted(GPT, dtype=dtype), text()
    before = whole.logits(ids)
    merge(whole.chain.parts)
    assert not any(p.name.endswith("lora_a.weight") for part in whole.chain.parts for p in part.parameters())
    np.testing.assert_allclose(whole.logits(ids), before, atol=1e-5 if dtype == "f4" else 1e-12)


def test_adapters_begin_with_the_model_as_it_was():
    plain, whole, (ids, _) = Whole(GPT, VOCABULARY), Adapted(GPT, targets=("qkv",)), text()
    plain.store.initialise(1)
    for linear in (one.beside.up for part in whole.chain.parts for one in linears(part) if one.beside):
        linear.weight.data[...] = 0.0
    assert same_bits(whole.logits(ids), plain.logits(ids))


@pytest.mark.parametrize(
    ("frozen", "floor"),
    [(("embed", "block0"), 2), (("embed.positions", "block*"), 0), (("embed", "block*"), 3), (("final.norm",), 0)],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_left_has_the_gradients_that_it_has_in_the_whole_model(frozen, floor, recompute):
    everything, (ids, targets) = Whole(GPT, VOCABULARY, "f4", recompute=recompute), text()
    everything.store.initialise(1)
    some = Whole(GPT, VOCABULARY, "f4", recompute=recompute)
    freeze(some.chain.parts, Start(freeze=frozen), None)
    some.chain = Chain(some.chain.parts)
    some.store = FlatStore(some.chain.parameter_blocks(), Mesh(), "f4")
    some.store.initialise(1)
    some.gradient = some.store.new_buffer()
    assert some.chain.floor == floor and some.store.size < everything.store.size
    assert some.store.weights_sha256() == everything.store.weights_sha256()
    ready: list[int] = []
    for halves in (False, True):
        for one in (everything, some):
            one.loss_and_grad(ids, targets, None, Context(), ready.append, halves=halves)
        wanted = {p.name: view for p, view in everything.store.by_parameter(everything.gradient).items()}
        for span in some.store.spans:
            assert same_bits(some[span.parameter], wanted[span.parameter.name])
    assert ready == [3, 2, 1, 0] * 4, "buckets of empty blocks leave too"


@pytest.mark.parametrize("halves", [False, True])
def test_nothing_is_computed_for_a_frozen_table(monkeypatch, halves):
    asked: list[str] = []
    missing = Apart.__missing__
    monkeypatch.setattr(Apart, "__missing__", lambda self, p: asked.append(p.name) or missing(self, p))
    whole, (ids, targets) = Whole(GPT, VOCABULARY, "f4"), text()
    freeze(whole.chain.parts, Start(freeze=("embed.tokens",)), None)
    whole.chain = Chain(whole.chain.parts)
    whole.store = FlatStore(whole.chain.parameter_blocks(), Mesh(), "f4")
    whole.store.initialise(1)
    whole.gradient = whole.store.new_buffer()
    whole.loss_and_grad(ids, targets, None, Context(), halves=halves)
    assert "embed.tokens" not in asked


def test_a_step_leaves_frozen_weights_alone_and_holds_no_moments_of_them():
    config = tiny_config("optim.weight_decay=0.5", "guard.policy=stop")
    plugins = Plugins()
    parts = language_model.parts(config, plugins, Sizes(VOCABULARY))
    freeze(parts, Start(freeze=("embed", "block0")), None)
    engine = build(config, plugins, parts, Mesh(), place_of(config), config.model.width)
    store = engine.machine.store
    store.initialise(3)
    before, trained = store.still.data.copy(), store.data.copy()
    done = engine.step(0, batches(config, engine.plan(0, 1)))
    assert same_bits(store.still.data, before) and not (store.data == trained).all()
    assert {flat.size for flat in engine.state().values()} == {store.size} and store.size < store.still.size
    squares = sum(
        float((view.astype("f8") ** 2).sum()) for view in store.views(engine.machine.optimizer.state()["moment1"])
    )
    assert math.isclose(math.sqrt(squares), 0.1 * min(1.0, done.gradient_norm), rel_tol=1e-3)


def refused(error, call, *texts):
    with pytest.raises(error) as caught:
        call()
    for one in texts:
        assert one in str(caught.value)


def test_names_that_are_none():
    parts = Whole(GPT, VOCABULARY).chain.parts
    refused(ConfigError, lambda: freeze(parts, Start(freeze=("blok0",)), None), '"blok0"', "did you mean 'block0'")
    refused(ConfigError, lambda: freeze(parts, Start(freeze=("*",)), None), "leaves nothing to learn")
    refused(ConfigError, lambda: adapt(parts, 2, 1.0, ["atention.qkv"]), "did you mean 'attention.qkv'")
    for keys, said in {
        ("start.checkpoint=x", "start.lora_rank=2", "mesh.tp=2"): "set mesh.tp = 1",
        ("start.checkpoint=x", "start.lora_rank=2", "start.lora_targets=[]"): "needs start.lora_targets",
        ("eval.patience=2",): "set eval.every, or eval.patience = 0",
    }.items():
        refused(ConfigError, lambda keys=keys: configuration.load(None, list(keys)), said)


def test_one_source_over_another():
    there = Arrays({"a": np.ones((4, 2)), "b": np.ones(3)})
    drawn = Drawn(1, {"a": ((4, 2), "zeros"), "b": ((5,), "zeros"), "c": ((2,), "zeros")})
    both = Over(there, drawn)
    assert both.read("a", Box((1, 0), (3, 2))).tolist() == [[1, 1], [1, 1]]
    assert both.shape("b") == (5,) and both.read("b", Box((0,), (5,))).tolist() == [0] * 5
    assert both.read("c", Box((0,), (2,))).tolist() == [0, 0]


def search(tmp_path, higher=False, **wanted):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir(exist_ok=True)
    return Search(Eval(every=1, best=True, **wanted), higher, folder, True)


@pytest.mark.parametrize("higher", [False, True])
def test_a_search_goes_on_as_if_nobody_had_killed_it(tmp_path, higher):
    values = [3.0, 2.0, 2.0, math.nan, 2.5, 1.0]
    values = [-value for value in values] if higher else values
    whole = search(tmp_path, higher, patience=4)
    said = [(whole.judge(step, Heldout(0.0, value)), whole.is_over) for step, value in enumerate(values, 1)]
    assert said == [(True, False), (True, False), (False, False), (False, False), (False, False), (True, False)]
    for cut in range(1, 6):
        first, second = search(tmp_path, higher, patience=4), search(tmp_path, higher, patience=4)
        for step, value in enumerate(values[:cut], 1):
            first.judge(step, Heldout(0.0, value))
        second.restore(json.loads(json.dumps(first.state())))
        assert not second.misses(cut) and second.misses(cut + 1)
        later = [(second.judge(s, Heldout(0.0, v)), second.is_over) for s, v in enumerate(values[cut:], cut + 1)]
        assert later == said[cut:]
    assert whole.state() == second.state()
    over = search(tmp_path, higher, patience=3)
    for step, value in enumerate(values[:5], 1):
        over.judge(step, Heldout(0.0, value))
    assert over.is_over
    assert over.judge(5, Heldout(0.0, 9.0)) is False, "a step is judged once"
    other = replace(over.wanted, figure="accuracy")
    fresh = Search(other, True, RunFolder(tmp_path), True)
    fresh.restore(over.state())
    assert fresh.state() == {}


def test_the_best_is_named_when_it_stands(tmp_path):
    one = search(tmp_path)
    one.judge(2, Heldout(1.5, 1.5))
    one.settle()
    refused(ConfigError, lambda: best_of(tmp_path), "eval.best = true")
    folder = tmp_path / "checkpoints" / "step-00000002"
    folder.mkdir()
    one.settle()
    assert best_of(tmp_path) == folder and set(one.spared()) == {2}
    one.judge(3, Heldout(1.0, 1.0))
    assert set(one.spared()) == {2, 3}, "the old one stays until the new one stands"
    again = search(tmp_path)
    again.restore({})
    assert again.named == 2
    (tmp_path / "best.json").write_text('{"checkpoint": "../../etc"}')
    refused(ConfigError, lambda: best_of(tmp_path), "best.json")
