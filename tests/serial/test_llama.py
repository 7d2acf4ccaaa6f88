"""The modern decoder: values recorded from PyTorch, gradients, caches, windows, documents, what it refuses."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from every_model import check_bits, check_every_gradient
from whole import Whole

from mlm_mpi.errors import ConfigError
from mlm_mpi.layers.attention import KeyValueCache
from mlm_mpi.layers.base import Context, Sizes, elements
from mlm_mpi.layers.head import TokenHead
from mlm_mpi.models import llama
from mlm_mpi.models.llama import Settings

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from make_llama import FILE, MODELS, PACKED, VOCABULARY, golden_weights

SMALL = Settings(
    layers=2, width=24, heads=6, key_value_heads=3, context=40, init_std=0.3, qk_norm=True, qkv_bias=True,
    logit_cap=4.0, window=9, full_every=2,
)  # fmt: skip
VARIANTS = {
    "llama": Settings(layers=2, width=24, heads=6, key_value_heads=2, context=40, init_std=0.3),
    "everything": SMALL,
    "dropout": replace(
        SMALL, dropout=0.2, activation="relu2", tied=True, embedding_norm=True, zero_init=True, rotary_skip=2
    ),
}


def whole_of(settings: Settings, dtype: str = "f8", recompute: bool = False) -> Whole:
    whole = Whole(settings, VOCABULARY, dtype, recompute=recompute, model=llama)
    whole.store.initialise(1)
    if settings.zero_init:  # where all is zero no gradient says much
        for view in whole.store.views(whole.store.data):
            view += 0.05 * np.arange(view.size).reshape(view.shape) % 0.3 * (np.abs(view).max() == 0)
    return whole


def batch(rows: int = 2, positions: int = 33) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r = np.random.default_rng(0)
    ids = r.integers(0, VOCABULARY, (rows, positions + 1), dtype=np.int32)
    return ids[:, :-1], ids[:, 1:], r.random((rows, positions)) < 0.8


def starts_of(documents: np.ndarray) -> np.ndarray:
    """The first token of each token's document."""
    return np.array([np.searchsorted(row, row) for row in documents], np.int32)


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_every_gradient_are_those_of_pytorch(kind: str):
    with np.load(FILE, allow_pickle=False) as file:
        record = {name: file[name] for name in file.files}
    whole = Whole(MODELS[kind], VOCABULARY, "f8", model=llama)
    for name, value in whole.store.named(whole.store.data).items():
        value[...] = golden_weights(name, value.shape)
    inputs = {"starts": starts_of(record["documents"])} if kind == PACKED else {}
    ids, targets = record["ids"][:, :-1].astype(np.int32), record["ids"][:, 1:].astype(np.int32)
    total = whole.loss_and_grad(ids, targets, record["mask"], Context(training=True), inputs=inputs)
    assert total == pytest.approx(float(record[f"{kind}/loss"]), rel=1e-10)
    gradients = {name for name in record if name.startswith(f"{kind}/gradient/")}
    for span in whole.store.spans:
        name = f"{kind}/gradient/{span.parameter.name}"
        gradients.remove(name)
        ours, theirs = whole[span.parameter], record[name]
        assert np.linalg.norm(ours - theirs) <= 1e-9 * np.linalg.norm(theirs), name
    assert not gradients


@pytest.mark.parametrize("kind", VARIANTS)
def test_every_gradient(kind: str):
    check_every_gradient(whole_of(VARIANTS[kind]), *batch())


@pytest.mark.parametrize("kind", VARIANTS)
def test_recomputing_and_repeating_give_the_same_bits_and_accumulating_adds(kind: str):
    check_bits(*(whole_of(VARIANTS[kind], "f4", recompute) for recompute in (False, True, False)), *batch())


@pytest.mark.parametrize("kind", ["llama", "everything"])
def test_a_cache_gives_the_logits_of_the_whole_window(kind: str):
    whole = whole_of(VARIANTS[kind])
    ids = batch(positions=30)[0]
    at_once, cache = whole.logits(ids), KeyValueCache(40)
    pieces = [whole.logits(ids[:, first:stop], cache) for first, stop in ((0, 11), (11, 12), (12, 30))]
    assert np.allclose(np.concatenate(pieces, axis=1), at_once, atol=1e-12)


def test_a_window_hides_what_is_older_and_nothing_else():
    whole = whole_of(replace(SMALL, layers=1, full_every=0, window=5))
    ids = batch(rows=1)[0]
    changed = ids.copy()
    changed[0, 10] = (changed[0, 10] + 1) % VOCABULARY
    moved = np.abs(whole.logits(changed) - whole.logits(ids)).max(axis=2)[0] > 0
    assert moved.nonzero()[0].tolist() == [10, 11, 12, 13, 14]


def test_packed_documents_have_the_loss_they_have_alone():
    """Rotary positions are relative: a document in the middle of a row is the document at its beginning."""
    whole = whole_of(replace(SMALL, window=0))
    ids, targets, _ = batch(rows=1)
    ends = 0, 7, 20, 33
    starts = np.concatenate([np.full(stop - first, first) for first, stop in pairwise(ends)])
    inputs = {"starts": starts[None].astype(np.int32)}
    packed = whole.loss_and_grad(ids, targets, None, Context(training=True), inputs=inputs)
    alone = [whole.loss(ids[:, a:b], targets[:, a:b], None, Context()) for a, b in pairwise(ends)]
    assert packed == pytest.approx(sum(alone), rel=1e-8)  # tables are float32


def test_positions_beyond_an_earlier_context_are_scaled():
    """With a factor of 2 position 2p is turned as position p was."""
    ids = np.repeat(batch(rows=1, positions=16)[0], 2, axis=1)
    plain, scaled = (
        whole_of(replace(VARIANTS["llama"], layers=1, rotary_scaling=kind, rotary_factor=factor))
        for kind, factor in (("none", 1.0), ("linear", 2.0))
    )
    tables = [whole.chain.parts[1].mixer.positions.at(ids, 0, 40) for whole in (plain, scaled)]
    assert np.allclose(tables[1][0][::2], tables[0][0][:20], atol=1e-7)
    assert not np.allclose(plain.logits(ids), scaled.logits(ids))


@pytest.mark.parametrize("kind", VARIANTS)
def test_lower_bounds_are_those_of_the_model(kind: str):
    settings, sizes = VARIANTS[kind], Sizes(VOCABULARY)
    trunk = llama.build(settings, sizes)
    found = llama.least(settings, sizes, 3)
    assert found.parameters == sum(map(elements, (*trunk.parts, TokenHead(trunk))))
    assert found.parts == 2 and found.passing == 3 * 40 * 24


def test_flops_count_products_and_what_a_window_sees():
    full, cut = (llama.flops(replace(SMALL, window=w, full_every=0), Sizes(VOCABULARY), 1) for w in (0, 10))
    assert full - cut == 2 * 12 * 24 * (40 - 10)
    products = 24 * (24 * 2 + 2 * 3 * 4) + 3 * 24 * 64
    assert cut == 6 * (2 * products + VOCABULARY * 24) + 2 * 12 * 24 * 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key_value_heads": 4}, "model.heads = 6 is not a multiple of model.key_value_heads = 4: set .* = 2"),
        ({"window": 41}, "model.window = 41 is larger than model.context = 40: set model.window = 0"),
        ({"head_width": 5}, "a head is 5 numbers wide, which rotary positions turn in pairs: set model.head_width = 6"),
        ({"width": 26}, "model.width = 26 is not a multiple of model.heads = 6: set model.width = 30"),
        ({"rotary_low": 40.0}, "model.rotary_low = 40 must be below model.rotary_high = 32: .* = 160"),
    ],
)
def test_what_contradicts_itself_is_refused_with_a_remedy(change: dict[str, int], words: str):
    with pytest.raises(ConfigError, match=words):
        replace(SMALL, **change).resolved()
