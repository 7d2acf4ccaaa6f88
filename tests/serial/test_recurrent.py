"""LSTM and GRU language models: values recorded from PyTorch, gradients, states, documents, the order of additions."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from every_model import check_bits, check_every_gradient
from numerics import same_bits
from whole import Whole

from mlm_mpi import config
from mlm_mpi.backend import choice
from mlm_mpi.cut import Box
from mlm_mpi.data.batch import Batch
from mlm_mpi.errors import ConfigError
from mlm_mpi.layers.attention import KeyValueCache
from mlm_mpi.layers.base import Context, Sizes, elements
from mlm_mpi.layers.head import TokenHead
from mlm_mpi.models import gru, lstm
from mlm_mpi.ops import gru as gru_op
from mlm_mpi.ops import lstm as lstm_op
from mlm_mpi.ops import matmul
from mlm_mpi.params.sources import Drawn

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from make_llama import golden_weights
from make_recurrent import FILE, MODELS, PACKED, VOCABULARY

SMALL: dict[str, Any] = {"layers": 2, "width": 24, "context": 40, "init_std": 0.4}
VARIANTS: dict[str, tuple[ModuleType, Any]] = {
    "lstm": (lstm, lstm.Settings(**SMALL)),
    "gru": (gru, gru.Settings(**SMALL)),
    "lstm, dropout": (lstm, lstm.Settings(**SMALL, dropout=0.3, tied=False, logit_cap=3.0)),
    "gru, dropout": (gru, gru.Settings(**SMALL, dropout=0.3, residual=False, final_norm=False)),
}


def whole_of(kind: str, dtype: str = "f8", recompute: bool = False) -> Whole:
    model, settings = VARIANTS[kind]
    whole = Whole(settings, VOCABULARY, dtype, recompute=recompute, model=model)
    whole.store.initialise(1)
    for name, view in whole.store.named(whole.store.data).items():
        if name.endswith("bias"):
            view += 0.1 * np.arange(view.size).reshape(view.shape) % 0.4
    return whole


def batch(rows: int = 2, positions: int = 13) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r = np.random.default_rng(0)
    ids = r.integers(0, VOCABULARY, (rows, positions + 1), dtype=np.int32)
    return ids[:, :-1], ids[:, 1:], r.random((rows, positions)) < 0.8


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_every_gradient_are_those_of_pytorch(kind: str):
    with np.load(FILE, allow_pickle=False) as file:
        record = {name: file[name] for name in file.files}
    model, settings = MODELS[kind]
    whole = Whole(settings, VOCABULARY, "f8", model=model)
    for name, value in whole.store.named(whole.store.data).items():
        value[...] = golden_weights(name, value.shape)
    inputs = {"starts": record["starts"].astype(np.int32)} if kind in PACKED else {}
    ids, targets = record["ids"][:, :-1].astype(np.int32), record["ids"][:, 1:].astype(np.int32)
    total = whole.loss_and_grad(ids, targets, record["mask"], Context(training=True), inputs=inputs)
    assert total == pytest.approx(float(record[f"{kind}/loss"]), rel=1e-10)
    found = whole.store.by_parameter(whole.gradient)
    assert {f"{kind}/gradient/{p.name}" for p in found} == {n for n in record if n.startswith(f"{kind}/gradient")}
    for parameter, ours in found.items():
        theirs = record[f"{kind}/gradient/{parameter.name}"]
        assert np.linalg.norm(ours - theirs) <= 1e-9 * np.linalg.norm(theirs), parameter.name


@pytest.mark.parametrize("kind", VARIANTS)
def test_every_gradient(kind: str):
    check_every_gradient(whole_of(kind), *batch())


@pytest.mark.parametrize("kind", VARIANTS)
def test_recomputing_and_repeating_give_the_same_bits_and_accumulating_adds(kind: str):
    check_bits(*(whole_of(kind, "f4", recompute) for recompute in (False, True, False)), *batch())


@pytest.mark.parametrize("kind", ["lstm, dropout", "gru"])
def test_a_state_that_is_kept_gives_the_logits_of_the_whole_window(kind: str):
    for dtype, tolerance in (("f8", 1e-12), ("f4", 1e-5)):
        whole, ids = whole_of(kind, dtype), batch()[0]
        at_once, cache = whole.logits(ids), KeyValueCache(40)
        pieces = [whole.logits(ids[:, first:stop], cache) for first, stop in ((0, 5), (5, 6), (6, 7), (7, 13))]
        assert np.allclose(np.concatenate(pieces, axis=1), at_once, atol=tolerance)
        assert not np.allclose(whole.logits(ids[:, 5:6]), at_once[:, 5:6], atol=tolerance), "the state says nothing"


@pytest.mark.parametrize("kind", ["lstm", "gru, dropout"])
def test_packed_documents_have_the_states_they_have_alone(kind: str):
    """To the last bit: neither what was before a document nor the rows computed beside it enter."""
    ids, _, _ = batch(rows=3)
    ends = (0, 4, 6, 13)
    starts = np.tile(np.repeat(ends[:-1], np.diff(ends)).astype(np.int32), (3, 1))
    cell, x = whole_of(kind, "f4").chain.parts[1].cell, drawn(3, 13, 24)
    packed = Context(training=True, batch=Batch(0, 0, {"ids": ids, "starts": starts}, {}, 0))
    h = cell.forward(x, packed)[0]
    for a, b in pairwise(ends):
        for rows in (slice(0, 3), slice(1, 2)):
            assert same_bits(h[rows, a:b].copy(), cell.forward(x[rows, a:b].copy(), Context())[0])


def test_packed_documents_have_the_gradients_they_have_alone():
    whole, (ids, targets, _) = whole_of("lstm"), batch()
    inputs = {"starts": np.tile(np.repeat([0, 6], [6, 7]).astype(np.int32), (2, 1))}
    packed = whole.loss_and_grad(ids, targets, None, Context(), inputs=inputs)
    together, whole.gradient = whole.gradient.copy(), whole.store.new_buffer()
    alone = [
        whole.loss_and_grad(ids[:, cut], targets[:, cut], None, Context(accumulate=number > 0))
        for number, cut in enumerate((slice(0, 6), slice(6, 13)))
    ]
    assert packed == pytest.approx(sum(alone), rel=1e-12)
    assert np.allclose(together, whole.gradient, rtol=1e-9, atol=1e-12)


C = 400  # more than a chain of 384, in 8 shares of 50
OPS = {4: lstm_op, 3: gru_op}


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype("f4")


@pytest.fixture
def kernels() -> Any:
    chosen = choice.select()
    if not chosen.first.library:
        pytest.skip("no kernels")
    yield chosen
    assert not chosen.fallen, "the kernel did not run"


@pytest.mark.parametrize("rows", [1, 8, 13])
def test_a_product_inside_the_loop_has_the_order_of_one_outside(rows: int, kernels: Any):
    """Step 1 of two is a step 0 that is given h u already. A single row has no other order than several have."""
    u, pre = 0.05 * drawn(C, 4, C), drawn(rows, 2, 4, C)
    last = pre[:, 1].reshape(rows, -1).copy()
    h, c = lstm_op.forward(pre, u)
    twice = (np.tile(x, (2, 1)) for x in (h[:, 0], last, c[:, 0]))
    before, given, cell = twice
    matmul.add(before, u.reshape(C, -1), given, True)
    again, _ = lstm_op.forward(given.reshape(-1, 1, 4, C), u, None, None, cell)
    assert same_bits(again[:rows, 0].copy(), h[:, 1].copy())


@pytest.mark.parametrize("gates", OPS)
def test_the_sum_over_units_is_joined_of_shares(gates: int, kernels: Any):
    """Who has the operands of a share has its sum: step 0's gradient is that of dy + dp uᵀ, in 8 shares."""
    rows, op = 8, OPS[gates]
    u, dy, opened = 0.05 * drawn(C, gates, C), drawn(rows, 2, C), np.tanh(drawn(rows, 2, gates, C))
    opened[:, 1, 1] = 0  # nothing goes back beside the product: f of an LSTM, z of a GRU
    whole, *states = opened.copy(), *(drawn(rows, 2, C) for _ in range(5 - gates))
    at_0 = [x[:, :1].copy() for x in (opened, *states)]
    op.backward(dy, whole, *states, u, None, 8)
    dp = whole[:, 1].copy()
    if gates == 3:
        dp[:, 2] = states[-1][:, 1]
    given = matmul.product(dp.reshape(rows, -1), u.reshape(C, -1).T, 8, gates)
    op.backward((dy[:, 0] + given)[:, None].copy(), *at_0, u, None, 8)
    assert same_bits(at_0[0][:, 0].copy(), whole[:, 0].copy())


@pytest.mark.parametrize("gates", OPS)
def test_threads_share_the_rows_and_no_bit_knows(gates: int):
    found = []
    for threads in (1, 2):
        choice.select(threads=threads)
        pre, u = drawn(17, 3, gates, 24), drawn(24, gates, 24)
        more = [] if gates == 4 else [drawn(24)]
        h, state = OPS[gates].forward(pre, u, *more)
        kept = [state] if gates == 4 else [h, state]
        OPS[gates].backward(drawn(17, 3, 24), pre, *kept, u, None, 8)
        found.append([h, pre, *kept])
    choice.select()
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


def test_forget_gates_start_open_in_whatever_pieces_they_are_read():
    whole = Whole(lstm.Settings(width=8), VOCABULARY, model=lstm)
    whole.store.initialise(7)
    bias = whole.store.named(whole.store.data)["layer1.cell.input.bias"]
    assert np.array_equal(bias, np.outer([0, 1, 0, 0], np.ones(8)))
    source = Drawn(0, {"bias": ((4, 8), (0.0, 1.0, 0.0, 0.0))})
    assert np.array_equal(source.read("bias", Box((1, 3), (3, 5))), [[1, 1], [0, 0]])


def test_an_optimiser_of_matrices_sees_each_gate_as_one():
    parts = gru.build(gru.Settings(width=8), Sizes(VOCABULARY)).parts
    found = {p.name: [x.shape for x in p.as_matrices(np.empty(p.layout.shape))] for p in parts[1].parameters()}
    assert found["layer0.cell.input.weight"] == found["layer0.cell.recurrent.weight"] == [(8, 1, 8)] * 3
    assert found["layer0.cell.input.bias"] == found["layer0.cell.recurrent.bias"] == []


@pytest.mark.parametrize("kind", VARIANTS)
def test_lower_bounds_are_those_of_the_model(kind: str):
    model, settings = VARIANTS[kind]
    trunk, found = model.build(settings, Sizes(VOCABULARY)), model.least(settings, Sizes(VOCABULARY), 3)
    assert found.parameters == sum(map(elements, (*trunk.parts, TokenHead(trunk))))
    assert found.parts == 2 and found.passing == 3 * 40 * 24
    gates = 4 if model is lstm else 3
    assert model.flops(settings, Sizes(VOCABULARY), 5) == 5 * 6 * 24 * (2 * 2 * gates * 24 + VOCABULARY)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.kind=lstm", "model.heads=2"], "model.heads"),
        (["model.kind=gru", "model.layers=0"], "model.layers = 0"),
        (["model.kind=gru", "model.dropout=1.0"], "model.dropout = 1"),
    ],
)
def test_what_these_models_do_not_know_is_refused_in_a_line(overrides: list[str], words: str):
    with pytest.raises(ConfigError, match=words) as caught:
        config.load(None, overrides)
    assert "\n" not in str(caught.value)


def test_a_width_decides_the_standard_deviation():
    settings = config.load(None, ["model.kind=gru", "model.width=48"]).model
    assert settings.init_std == 1 / 12 and replace(settings, init_std=0.3).resolved().init_std == 0.3
