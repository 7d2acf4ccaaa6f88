"""The encoder: golden values of PyTorch, every gradient, texts in a row, hidden tokens, bits."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numerics import directional, poisoned, same_bits
from whole import Driven

from mlm_mpi.data.batch import Batch
from mlm_mpi.layers.base import Context, Sizes
from mlm_mpi.layers.classes import ClassHead
from mlm_mpi.layers.head import TokenHead
from mlm_mpi.models import bert

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
from make_bert import FILE, LABELS, LENGTHS, MODELS, TASKS, VOCABULARY, batch, golden_weights  # noqa: E402

RELATIVE = 1e-10
SMALL = bert.Settings(layers=2, width=16, heads=2, context=24, dropout=0.0, init_std=0.3).resolved()


def masked_batch() -> Batch:
    """The recorded one: whole rows, some of whose tokens have to be found."""
    made = batch()
    ids = np.where(made["hidden"], 0, made["ids"]).astype(np.int32)
    at = np.flatnonzero(made["targets"] >= 0).astype(np.int32)
    padded = np.concatenate([at, np.zeros(-len(at) % 8, np.int32)])
    targets = {
        "ids": made["ids"].reshape(-1)[padded].astype(np.int32),
        "at": padded,
        "mask": np.arange(len(padded)) < len(at),
    }
    inputs = {"ids": ids, "hidden": made["hidden"], "segments": made["segments"].astype(np.int32)}
    return Batch(0, 0, inputs, targets, len(at))


def texts_batch(filled: int = 0) -> Batch:
    """The recorded texts, one behind the other, and so many positions behind them."""
    made = batch()
    rows = [slice(0, length) for length in LENGTHS]
    ids = np.concatenate([made["ids"][b, row] for b, row in enumerate(rows)])
    segments = np.concatenate([made["segments"][b, row] for b, row in enumerate(rows)])
    places = np.concatenate([np.arange(length) for length in LENGTHS])
    inputs = {
        name: np.concatenate([array, np.zeros(filled, int)]).astype(np.int32)[None]
        for name, array in (("ids", ids), ("places", places), ("segments", segments))
    }
    weights = np.linspace(0.5, 1.5, LABELS)
    targets = {"classes": made["classes"].astype(np.int32), "weights": weights[made["classes"]]}
    return Batch(0, 0, inputs, targets, len(LENGTHS), texts=tuple(np.cumsum(LENGTHS).tolist()))


def driven(settings: bert.Settings, task: str, dtype: str = "f8", **more) -> Driven:
    """A model with the head of a task, its weights not yet set."""
    trunk = bert.build(settings, Sizes(VOCABULARY))
    if task == "masked":
        return Driven([*trunk.parts, TokenHead(trunk)], dtype, **more)
    trunk.table.tied = False
    smoothing = 0.1 if task == "mean" else 0.0
    head = ClassHead(settings.width, LABELS, bert.final_norm(settings), task, settings.dropout, 0.3, smoothing)
    return Driven([*trunk.parts, head], dtype, **more)


def probabilities(whole: Driven, made: Batch) -> np.ndarray:
    """Of texts whose labels nobody knows."""
    return whole.tally(replace(made, targets={}))["probabilities"]


def with_ngrams(task: str, buckets: int = 50, **more) -> Driven:
    """A model whose vectors of two and of three tokens are not zero, as they would be at the start."""
    whole = driven(replace(SMALL, ngrams=3, ngram_buckets=buckets), task, **more)
    whole.store.initialise(1)
    table = whole.store.named(whole.store.data)["embed.ngrams"]
    table[...] = np.random.default_rng(5).standard_normal(table.shape) * 0.3
    return whole


def made_of(task: str, filled: int = 0) -> Batch:
    return masked_batch() if task == "masked" else texts_batch(filled)


@pytest.fixture(scope="module")
def record() -> dict[str, np.ndarray]:
    with np.load(FILE, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize(("norm", "task"), [(norm, task) for norm, tasks in TASKS.items() for task in tasks])
@pytest.mark.parametrize("filled", [0, 5])
def test_loss_and_every_gradient_are_those_of_pytorch(record, norm: str, task: str, filled: int) -> None:
    whole = driven(MODELS[norm], task)
    for name, value in whole.store.named(whole.store.data).items():
        value[...] = golden_weights(name, value.shape)
    loss = whole.loss_and_grad(made_of(task, filled), Context(training=True))
    assert loss == pytest.approx(record[f"{norm}/{task}/loss"], rel=RELATIVE)
    recorded = {name for name in record if name.startswith(f"{norm}/{task}/gradient/")}
    assert len(recorded) + (task != "masked") == len(whole.store.spans), (
        "the row of hidden tokens has no gradient there"
    )
    for span in whole.store.spans:
        name = f"{norm}/{task}/gradient/{span.parameter.name}"
        theirs = record.get(name, np.zeros(span.parameter.layout.shape))
        error = np.linalg.norm(whole[span.parameter] - theirs) / max(
            np.linalg.norm(theirs), 1e-300 if name in record else 1
        )
        assert error <= RELATIVE, f"{span.parameter.name}: {error:.1e}"


@pytest.mark.parametrize(("norm", "task"), [("post", "first"), ("pre", "mean")])
def test_probabilities_and_outcomes_are_those_of_pytorch(record, norm: str, task: str) -> None:
    whole = driven(MODELS[norm], task)
    for name, value in whole.store.named(whole.store.data).items():
        value[...] = golden_weights(name, value.shape)
    logits = record[f"{norm}/{task}/logits"]
    wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    made = texts_batch(3)
    assert np.allclose(probabilities(whole, made), wanted, rtol=1e-9)
    tally = whole.tally(made)
    targets, rows = made.targets["classes"], np.arange(len(LENGTHS))
    columns = targets, wanted.argmax(axis=1), wanted.max(axis=1), wanted[rows, targets]
    assert np.allclose(tally["outcomes"], np.stack(columns, axis=1), rtol=1e-9)
    assert tally["loss"] == pytest.approx(-np.log(wanted[rows, targets]).sum(), rel=1e-9)


@pytest.mark.parametrize(
    ("norm", "task"),
    [
        ("post", "masked"), ("pre", "mean"),
        *(
            pytest.param(*which, marks=pytest.mark.slow)
            for which in (("pre", "first"), ("post", "mean"), ("pre", "masked"))
        ),
    ],
)  # fmt: skip
def test_every_gradient_is_the_slope_of_the_loss_with_dropout(norm: str, task: str) -> None:
    whole = driven(replace(SMALL, norm=norm, dropout=0.2), task)
    whole.store.initialise(1)
    made, ctx = made_of(task, 3), Context(training=True, seed=3, step=5, micro_batch=1)
    whole.gradient = poisoned(whole.store.size)
    whole.loss_and_grad(made, ctx)
    for span in whole.store.spans:
        p, kept = span.parameter, whole[span.parameter].copy()
        directional(lambda: whole.training_loss(made, ctx), p.data, kept, tol=1e-6)


def test_labels_of_positions_have_every_gradient() -> None:
    whole = driven(SMALL, "token")
    whole.store.initialise(1)
    made = texts_batch(5)
    at = np.array([0, 3, 21, 22, 30, 42, 0, 0], np.int32)
    targets = {"at": at[:6], "classes": np.array([0, 1, 2, 3, 4, 0], np.int32)}
    made, ctx = replace(made, targets=targets, count=6), Context(training=True)
    whole.loss_and_grad(made, ctx)
    for span in whole.store.spans:
        p, kept = span.parameter, whole[span.parameter].copy()
        directional(lambda: whole.training_loss(made, ctx), p.data, kept, tol=1e-6)


@pytest.mark.parametrize("task", ["masked", "mean"])
def test_recomputing_repeating_and_halves_give_equal_bits(task: str) -> None:
    settings, made = replace(SMALL, norm="pre", dropout=0.1), made_of(task, 3)
    plain, recomputed = driven(settings, task, "f4"), driven(settings, task, "f4", recompute=True)
    ctx, found = Context(training=True), []
    for whole, halves in ((plain, False), (plain, True), (recomputed, False)):
        whole.store.initialise(1)
        whole.gradient = poisoned(whole.store.size, dtype="f4")
        whole.loss_and_grad(made, ctx, halves=halves)
        found.append(whole.store.views(whole.gradient))
    assert all(same_bits(a, b) and same_bits(a, c) for a, b, c in zip(*found, strict=True))


@pytest.mark.parametrize("task", ["masked", "mean"])
def test_runs_of_tokens_have_every_gradient(task: str) -> None:
    whole, made, ctx = with_ngrams(task), made_of(task, 3), Context(training=True)
    whole.gradient = poisoned(whole.store.size)
    whole.loss_and_grad(made, ctx)
    for span in whole.store.spans:
        p, kept = span.parameter, whole[span.parameter].copy()
        directional(lambda: whole.training_loss(made, ctx), p.data, kept, tol=1e-6)


def test_runs_of_tokens_are_told_apart_by_their_order() -> None:
    """Without places, attention and other texts: what is left to tell "ab" from "ba" are the vectors of runs."""
    whole = with_ngrams("mean", buckets=4096)
    named = whole.store.named(whole.store.data)
    named["embed.positions"][...] = 0.0
    ids = np.array([[3, 4, 4, 3]], np.int32)
    made = Batch(0, 0, {"ids": ids, "places": np.array([[0, 1, 0, 1]], np.int32)}, {}, 2, texts=(2, 4))
    first, second = probabilities(whole, made)
    assert np.abs(first - second).max() > 1e-3
    named["embed.ngrams"][...] = 0.0
    assert np.allclose(*probabilities(whole, made), atol=1e-12)


@pytest.mark.parametrize("ngrams", [False, True])
def test_a_text_does_not_see_its_neighbours(ngrams: bool) -> None:
    whole = with_ngrams("first") if ngrams else driven(SMALL, "first")
    if not ngrams:
        whole.store.initialise(1)
    made = texts_batch()
    other = replace(made, inputs=made.inputs | {"ids": made.inputs["ids"].copy()})
    other.inputs["ids"][0, LENGTHS[0] :] += 1
    first, second = probabilities(whole, made), probabilities(whole, other)
    assert same_bits(first[0], second[0]) and not same_bits(first[1], second[1])


@pytest.mark.parametrize("ngrams", [False, True])
def test_hidden_tokens_are_not_read(ngrams: bool) -> None:
    whole = with_ngrams("masked") if ngrams else driven(SMALL, "masked")
    if not ngrams:
        whole.store.initialise(1)
    made = masked_batch()
    other = replace(
        made, inputs=made.inputs | {"ids": np.where(made.inputs["hidden"], 7, made.inputs["ids"]).astype(np.int32)}
    )
    assert same_bits(whole.hidden(made), whole.hidden(other))
