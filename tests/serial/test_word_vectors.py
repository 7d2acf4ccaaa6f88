"""Skip-gram: which pairs a text has, what is drawn by chance, gradients, and classes of words that are learnt."""

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpora import run_prepare
from numerics import directional, poisoned, same_bits

from mlm_mpi import config as configuration
from mlm_mpi.backend import registry
from mlm_mpi.backend.choice import place_of
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.data.batch import Batch
from mlm_mpi.data.loader import Loader
from mlm_mpi.data.mixture import Joined, mixture_of
from mlm_mpi.data.pairs import Drawing, Noise, Pairs, counted, kept
from mlm_mpi.data.sampler import Sampler
from mlm_mpi.errors import ConfigError, DataError
from mlm_mpi.formats.vectors import tokens_by_word
from mlm_mpi.layers.base import Context, Sizes
from mlm_mpi.layers.chain import Chain
from mlm_mpi.layers.sampled import NegativeSampling
from mlm_mpi.models import skipgram
from mlm_mpi.params.store import FlatStore
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks import word_vectors
from mlm_mpi.train.build import build
from mlm_mpi.wordspace import WordSpace

END, V = 0, 30


class Text:
    """A stream of tokens in memory."""

    split = "train"

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.tokens = np.array(ids, np.uint16), len(ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]


def text_of(count: int) -> Text:
    ids = np.random.default_rng(0).integers(1, V, count)
    ids[::17] = END
    return Text(ids.tolist())


def pairs_of(text: Text, context: int, threshold: float = 0.0, window: int = 3, whole: bool = True) -> Pairs:
    counts = counted([text], V, [END])  # type: ignore[list-item]
    drawing = Drawing(5, kept(counts, threshold), Noise(counts, 0.75), window, 4, END)
    return Pairs(text, context, whole, drawing)  # type: ignore[arg-type]


def test_pairs_are_those_within_reach_of_each_word() -> None:
    text, context = text_of(200), 50
    samples = pairs_of(text, context)
    batch = samples.batch([1, 3], 7, 2)
    found = Counter(zip(batch.inputs["ids"][:, 0].tolist(), batch.targets["ids"][:, 0].tolist(), strict=True))
    inner, outer = Counter(), Counter()
    for first in (50, 150):
        ids = text.ids[first : first + context].tolist()
        for i, j in itertools.permutations(range(context), 2):
            between = ids[min(i, j) : max(i, j) + 1]
            if abs(i - j) <= 3 and END not in between:
                outer[ids[i], ids[j]] += 1
                inner[ids[i], ids[j]] += abs(i - j) == 1
    assert inner <= found <= outer and inner != found != outer
    assert batch.count == sum(found.values()) == len(batch.inputs["ids"])
    # a window reaches 1, 2 or 3 words, each as likely: of pairs at distance d there are (4 − d)/3
    many = sum(samples.batch([1, 3], step, 0).count for step in range(200)) / 200
    expected = sum(inner.values()) * (1 + 2 / 3 + 1 / 3)
    assert abs(many - expected) < 0.1 * expected


def test_a_batch_is_a_function_of_step_and_numbers() -> None:
    samples = pairs_of(text_of(400), 40, 0.02)
    first, again = samples.batch([2, 5], 3, 1), samples.batch([2, 5], 3, 1)
    assert all(same_bits(a, b) for a, b in zip(first.arrays(), again.arrays(), strict=True))
    for other in (samples.batch([2, 5], 4, 1), samples.batch([2, 5], 3, 2), samples.batch([2, 6], 3, 1)):
        assert not np.array_equal(first.targets["ids"], other.targets["ids"])
    assert first.inputs["ids"].dtype == first.targets["ids"].dtype == np.int32
    assert first.targets["ids"].shape == (first.count, 5) and END not in first.targets["ids"]


def test_the_last_stretch_is_short_and_one_without_pairs_has_the_end_with_itself() -> None:
    text = Text([END, 1, END, 2, END, 3, 3, 4, 4])
    assert len(pairs_of(text, 5)) == 1 and len(pairs_of(text, 5, whole=False)) == 2
    last = pairs_of(text, 5, whole=False).batch([1], 0, 0, rows=4)
    assert {*last.inputs["ids"].reshape(-1).tolist()} == {3, 4}
    none = pairs_of(text, 5).batch([0], 0, 0)
    assert none.count == 1 and none.inputs["ids"].tolist() == [[END]] and none.targets["ids"][0, 0] == END
    with pytest.raises(DataError, match="train has no word that vectors could be learnt of"):
        counted([Text([END, END])], V, [END])  # type: ignore[list-item]


def test_a_mixture_stacks_pairs_of_several_corpora() -> None:
    one, two = pairs_of(text_of(200), 50), pairs_of(text_of(300), 50)
    batch = Joined([one, two], [1, 1], ["one", "two"]).batch([1, 5, 2], 3, 1)
    alone = [part.batch(numbers, 3, 1) for part, numbers in ((one, [1]), (two, [1]), (one, [2]))]
    assert batch.count == sum(part.count for part in alone)
    for name in ("inputs", "targets"):
        expected = np.concatenate([getattr(part, name)["ids"] for part in alone])
        assert np.array_equal(getattr(batch, name)["ids"], expected)


def test_frequent_words_are_left_out_and_chance_follows_a_power() -> None:
    counts = np.array([0, 1, 16, 81, 10_000], np.int64)
    keep = kept(counts, 0.01)
    x = 0.01 * counts.sum() / np.maximum(counts, 1)
    assert np.array_equal(keep[1:], np.sqrt(x[1:]) + x[1:]) and keep[0] == 0 and keep[1] > 1 > keep[4] > 0.1
    assert kept(counts, 0.0).tolist() == [0, 1, 1, 1, 1]
    for power in (0.0, 0.75, 1.0):
        drawn = np.bincount(Noise(counts, power).draw((1, 2), 0, 200_000, 3, 4), minlength=5) / 200_000
        expected = np.where(counts > 0, np.maximum(counts, 1) ** power, 0)
        assert np.allclose(drawn, expected / expected.sum(), atol=0.004)
    noise = Noise(counts, 0.75)
    assert np.array_equal(noise.draw((1, 2), 0, 99, 3, 4)[40:], noise.draw((1, 2), 40, 59, 3, 4))


def tables(dtype: str, width: int = 9) -> tuple[Chain, FlatStore]:
    trunk = skipgram.build(skipgram.Settings(width=width, init_std=0.4), Sizes(V))
    chain = Chain([*trunk.parts, NegativeSampling(trunk.table)])
    store = FlatStore(chain.parameter_blocks(), Mesh(), dtype)
    store.initialise(1)
    assert not trunk.table.data.any() and trunk.parts[0].parameters()[0].data.any()
    trunk.table.data[...] = np.random.default_rng(3).standard_normal((V, width)) * 0.4
    return chain, store


def trained(chain: Chain, store: FlatStore, batch: Batch, accumulate: bool = False, gradient=None):  # type: ignore[no-untyped-def]
    gradient = poisoned(store.size, dtype=store.dtype) if gradient is None else gradient
    views = store.by_parameter(gradient)
    ctx = Context(training=True, batch=batch, gradients=views, accumulate=accumulate)
    _, left = chain.forward((), ctx)
    chain.backward((), left, ctx)
    return float(ctx.tally["loss"]), views, gradient


def test_the_loss_is_that_of_the_paper_and_its_gradients_the_slopes() -> None:
    chain, store = tables("f8")
    batch = pairs_of(text_of(200), 50).batch([0, 2], 0, 0)
    loss, views, _ = trained(chain, store, batch)

    def measured() -> float:
        ctx = Context(batch=batch)
        chain.forward((), ctx)
        return float(ctx.tally["loss"])

    v, u = (span.parameter.data for span in store.spans)
    expected = 0.0
    for (centre,), (near, *drawn) in zip(batch.inputs["ids"].tolist(), batch.targets["ids"].tolist(), strict=True):
        expected += math.log1p(math.exp(-float(v[centre] @ u[near])))
        expected += sum(math.log1p(math.exp(float(v[centre] @ u[k]))) for k in drawn if k != near)
    assert loss == pytest.approx(expected, rel=1e-12) == measured()
    for parameter, gradient in views.items():
        directional(measured, parameter.data, gradient)


def test_no_kernel_hands_on_and_lanes_add() -> None:
    chain, store = tables("f4", width=13)
    batch = pairs_of(text_of(400), 50).batch([0, 2], 0, 0)
    before = registry.fallbacks()
    loss, _, once = trained(chain, store, batch)
    assert registry.fallbacks() == before
    again, _, twice = trained(chain, store, batch)
    assert again == loss and same_bits(once, twice)
    _, _, added = trained(chain, store, batch, True, twice)
    assert np.array_equal(added[: 2 * V], 2 * once[: 2 * V])


# ---- a planted corpus


CLASSES = {"animal": "cat dog cow hen fox owl", "verb": "eats sees likes fears", "food": "corn rice milk bread",
           "place": "barn yard wood field"}  # fmt: skip


def planted(folder: Path, seed: int = 0) -> Path:
    """Sentences "the ANIMAL VERB FOOD in the PLACE", whose words differ at random."""
    r = np.random.default_rng(seed)
    words = {name: text.split() for name, text in CLASSES.items()}

    def sentence() -> str:
        animal, verb, food, place = (str(r.choice(words[name])) for name in words)
        return f"the {animal} {verb} {food} in the {place} .\n"

    (folder / "text.txt").write_text("".join(sentence() for _ in range(800)))
    return folder / "text.txt"


def test_words_of_a_class_come_to_lie_together(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    run_prepare(planted(tmp_path), "--out", corpus, "--tokenizer", "words", "--vocab", "100", "--heldout", 0)
    config = configuration.load(None, [
        "model.kind=skipgram", "model.width=16", "model.context=64", "task.kind=word_vectors", "task.window=2",
        f"data.dir={corpus}", "train.steps=45", "train.micro_batches=4", "train.rows=8", "optim.learning_rate=0.05",
        "optim.weight_decay=0", "optim.schedule=linear", "task.subsample=0.01",
    ])  # fmt: skip
    plugins = Plugins()
    task = word_vectors.build(config, plugins)
    engine = build(config, plugins, task.parts(), Mesh(), place_of(config), task.width)
    engine.machine.store.initialise(config.train.seed)
    train, samples = config.train, task.samples("train")
    loader = Loader(samples, Sampler(train.seed, mixture_of(samples), train.micro_batches, train.rows_ramp()), 2)
    plan = engine.plan(0, train.steps)
    losses = [engine.step(step, lambda: loader.micro_batch(*next(plan))).loss for step in range(train.steps)]
    assert losses[0] == pytest.approx(6 * math.log(2), rel=0.1) and losses[-1] < 0.8 * losses[0]
    of_a_class = " ".join(CLASSES.values()).split()  # not "the", "in", ".", which stand near all
    found = {word: at for word, at in tokens_by_word(task.corpora.tokenizer()).items() if word in of_a_class}
    space = WordSpace(list(found), engine.machine.store.spans[0].parameter.data[list(found.values())])
    for name, text in CLASSES.items():
        for word in text.split():
            near = {other for other, _ in space.near(word, len(text.split()) - 1)}
            assert near <= {*text.split()}, (name, word, near)


def test_what_the_task_cannot_do_is_one_line(tmp_path: Path) -> None:
    words = "model.kind=skipgram", "task.kind=word_vectors"
    for overrides, said in (
        (("mesh.tp=2",), 'model.kind = "skipgram" does not heed mesh.tp: take that out'),
        (("mesh.pp=2",), 'model.kind = "skipgram" does not heed mesh.pp'),
        (("data.documents=separate",), "does not heed data.documents"),
        (("train.context_warmup_steps=2",), 'task.kind = "word_vectors" does not heed train.context_warmup_steps'),
    ):
        with pytest.raises(ConfigError) as caught:
            configuration.load(None, [*words, *overrides])
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match='"gpt" does not read pairs of words, .* set model.kind = "skipgram"'):
        configuration.load(None, ["task.kind=word_vectors"])
