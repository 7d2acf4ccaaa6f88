"""Several corpora as one: shares exact, every window once an epoch, the same whoever asks in whatever order."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from corpora import run_prepare, write_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import Tokens

from mlm_mpi import config
from mlm_mpi.backend.arrays import cpu
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.data import Data
from mlm_mpi.data.batch import Batch
from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.corpora import Corpora
from mlm_mpi.data.mixture import Joined, Mixture, mixture_of
from mlm_mpi.data.objectives import causal
from mlm_mpi.data.sampler import Sampler
from mlm_mpi.data.warmup import Ramp
from mlm_mpi.errors import ConfigError, DataError
from mlm_mpi.layers.chain import Chain
from mlm_mpi.rng import key_of, permute
from mlm_mpi.train.measure import measure

weights = st.lists(st.integers(1, 10**9), min_size=1, max_size=6).map(tuple)


def corpus_of(mixture, sample):
    """Which corpus, and which of its samples: the definition, with fractions."""
    left, total = sample, sum(mixture.weights)
    for corpus, weight in enumerate(mixture.weights):
        share = Fraction(weight, total)
        had = (left * share).__floor__()
        if ((left + 1) * share).__floor__() > had:
            return corpus, had
        left, total = left - had, total - weight
    raise AssertionError


@settings(max_examples=60, deadline=None)
@given(weights, st.integers(0, 1 << 50), st.integers(0, 40))
def test_samples_follow_the_definition_and_shares_are_exact(parts, first, count):
    mixture = Mixture((1,) * len(parts), parts)
    found = mixture.split(first, count)
    assert sorted(place for _, places in found for place in places.tolist()) == list(range(count))
    for corpus, (had, places) in enumerate(found):
        assert [(corpus, had + n) for n in range(len(places))] == [
            corpus_of(mixture, first + place) for place in places.tolist()
        ]
        assert abs(had - Fraction(first * parts[corpus], sum(parts))) < len(parts)
    assert sum(mixture.counts(first)) == first


def test_two_corpora_are_never_a_whole_sample_off():
    mixture = Mixture((1, 1), (7, 3))
    for samples in range(200):
        assert abs(mixture.counts(samples)[0] - Fraction(7 * samples, 10)) < 1


def test_every_window_once_an_epoch_in_its_corpus_own_order():
    sizes, m, b = (13, 5, 8), 2, 7
    sampler = Sampler(4, Mixture(sizes, (5, 2, 3), ("a", "b", "c")), m, Ramp(b))
    drawn = np.concatenate([sampler.positions(step, index) for step in range(5) for index in range(m)])
    start = 0
    for corpus, size in enumerate(sizes):
        own = drawn[(start <= drawn) & (drawn < start + size)] - start
        for epoch in range(len(own) // size):
            key = key_of(4, "sampler", epoch, *([corpus] if corpus else []))
            assert own[epoch * size : (epoch + 1) * size].tolist() == permute(key, size, np.arange(size)).tolist()
        start += size
        assert len(own) >= 2 * size, corpus
    backwards = Sampler(4, sampler.mixture, m, Ramp(b))
    for step in reversed(range(5)):
        for index in reversed(range(m)):
            at = (step * m + index) * b
            assert np.array_equal(backwards.positions(step, index), drawn[at : at + b])


def test_a_mixture_of_one_is_the_corpus_alone():
    alone, mixed = Sampler(3, mixture_of(range(50)), 2, Ramp(4)), Sampler(3, Mixture((50,), (10**9,)), 2, Ramp(4))
    assert [alone.positions(s, 1).tolist() for s in range(20)] == [mixed.positions(s, 1).tolist() for s in range(20)]


def test_far_into_a_run_costs_nothing_and_loses_no_digit():
    mixture = Mixture((10**12, 10**12), (333_333_333, 666_666_667), ("a", "b"))
    assert mixture.counts(3 * 10**18) == [999_999_999 * 10**9, 2_000_000_001 * 10**9]
    sampler = Sampler(0, mixture, 64, Ramp(64))
    drawn = sampler.positions((1 << 32) - 1, 63)
    assert len(set(drawn.tolist())) == 64 and drawn.min() >= 0 and drawn.max() < 2 * 10**12


def test_a_corpus_too_small_for_its_share_of_a_step_is_named():
    Sampler(0, Mixture((70, 6), (7, 3), ("a", "b")), 4, Ramp(5))
    with pytest.raises(DataError, match=r"b has 5 windows, one step takes .* = 20, 6 of them from here: prepare more"):
        Sampler(0, Mixture((70, 5), (7, 3), ("a", "b")), 4, Ramp(5))


def joined(training, *sizes):
    made = [causal.samples(Tokens(size, seed=n), 4, training) for n, size in enumerate(sizes)]
    return Joined(made, (1,) * len(sizes), [f"c{n}" for n in range(len(sizes))])


def test_rows_come_from_their_corpora():
    samples = joined(True, 41, 21)
    assert len(samples) == 15 and samples.mixture == Mixture((10, 5), (1, 1), ("c0", "c1"))
    numbers = [3, 12, 14, 0, 9, 10]
    batch = samples.batch(numbers, 2, 1)
    for row, number in enumerate(numbers):
        tokens = Tokens(41, seed=0).read(4 * number, 4 * number + 5) if number < 10 else None
        tokens = Tokens(21, seed=1).read(4 * (number - 10), 4 * (number - 10) + 5) if tokens is None else tokens
        assert batch.inputs["ids"][row].tolist() == tokens[:-1].tolist()
        assert batch.targets["ids"][row].tolist() == tokens[1:].tolist()
    assert (batch.step, batch.index, batch.count, set(batch.targets)) == (2, 1, 24, {"ids"})


def test_short_rows_and_padding_are_masked():
    samples = joined(False, 12, 7)  # 11 targets: 4, 4, 3; 6 targets: 4, 2
    batch = samples.batch([2, 3], 0, 0, rows=4)
    assert batch.inputs["ids"].shape == (4, 4) and batch.count == 7
    assert batch.targets["mask"].sum(axis=1).tolist() == [3, 4, 0, 0]


class Counting(Chain):
    """A chain whose loss is the number of targets times the corpus' first token."""

    def __init__(self):
        super().__init__([])

    def forward(self, x, ctx):
        batch: Batch = ctx.batch
        ctx.tally["loss"] = float(batch.inputs["ids"][0, 0] * batch.count)


def test_held_out_losses_are_told_by_corpus_and_a_limit_is_shared():
    samples = Joined(
        [causal.samples(Tokens(size, value=n), 4, False) for n, size in ((2, 81), (5, 41), (9, 0))],
        (1, 1, 1), ("two", "five", "empty"),
    )  # fmt: skip
    sums = measure(Counting(), samples, 4, 0, Mesh(), cpu())
    parts = {name: part[:3] for name, part in sums.parts.items()}
    assert parts == {"two": (160.0, 80, {}), "five": (200.0, 40, {})} and sums[:2] == (360.0, 120)
    assert {name: part.targets for name, part in measure(Counting(), samples, 4, 6, Mesh(), cpu()).parts.items()} == {
        "two": 16, "five": 8,
    }  # fmt: skip


# ---- what names it


def test_shares_are_decimals():
    """As floats the sum of the first is not 1."""
    loaded = config.load(None, ['data.mixture=["a","b","c"]', "data.weights=[0.1, 0.2, 0.7]"]).data
    assert loaded.parts == (100_000_000, 200_000_000, 700_000_000)
    assert config.load(None, ['data.mixture=["a","b","c"]', "data.weights=[0.333, 0.333, 0.333]"]).data.parts
    alone = config.load(None, ['data.mixture=["a"]', "data.weights=[1]"])
    assert config.from_table(config.to_table(alone), "it") == alone and config.to_table(alone)["data"]["weights"] == [1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (['data.mixture=["a","b"]', "data.weights=[0.7, 0.2]"], r"weights = \[0\.7, 0\.2\] sum to 0\.9, must .* 1"),
        (['data.mixture=["a","b"]', "data.weights=[0.7]"], r"weights has 1 numbers, data\.mixture 2 folders: give"),
        (['data.mixture=["a"]'], "data.weights has 0 numbers"),
        (["data.weights=[1.0]"], "data.mixture 0 folders"),
        (['data.mixture=["a","b","./a"]', "data.weights=[0.5,0.2,0.3]"], r"names '\./a', which is 'a', twice: name it"),
        (['data.mixture=["a","a"]', "data.weights=[0.5,0.5]"], "names 'a' twice: name it once"),
        (['data.mixture=["a","b"]', "data.weights=[1.0,0.0]"], r"--set: data\.weights = 0\.0 must be in \[1e-09, 1\]"),
        (['data.mixture=["a","b"]', "data.weights=[nan,0.5]"], "data.weights = nan must be a finite number"),
        (["data.mixture=a"], r"data\.mixture = \"a\" must be an array of strings, not a string: write \[\"a\"\]"),
        (["data.mixture=[1]"], r"data\.mixture = 1 must be a string, not a whole number"),
        (['data.mixture=["a"]', "data.weights=[true]"], "data.weights = true must be a number"),
    ],
)  # fmt: skip
def test_weights_that_are_none_are_one_line(settings, said):
    with pytest.raises(ConfigError, match=said) as caught:
        config.load(None, settings)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two corpora with a tokenizer, and one with another."""
    root = tmp_path_factory.mktemp("mixture")
    write_texts(root / "in", count=12)
    first = ("--tokenizer", "bytes", "--heldout", "0.2")
    run_prepare(root / "in", "--out", root / "a", *first)
    run_prepare(root / "in", "--out", root / "b", *first, "--seed", "5")
    run_prepare(root / "in", "--out", root / "c", "--vocab", "300", "--heldout", "0.2")
    run_prepare(root / "in", "--out", root / "d", "--heldout", "0.2", "--tokenizer", *(root / "c").glob("tok*.json"))
    return root


def opened(root, *names, weights=None):
    return Corpora.open(Data(mixture=tuple(str(root / name) for name in names), weights=weights or (0.5, 0.5)))


def test_corpora_are_named_by_all_of_them_in_their_order(folders):
    both, turned, alone = opened(folders, "a", "b"), opened(folders, "b", "a"), opened(folders, "a")
    assert alone.digest == Catalog.open(folders / "a").digest
    assert len({both.digest, turned.digest, alone.digest}) == 3 and both.content != turned.content
    assert both.tokens("train") == sum(Catalog.open(folders / name).tokens("train") for name in "ab")
    assert both.weights == (500_000_000, 500_000_000)


def test_the_tokenizer_is_shared(folders):
    with pytest.raises(DataError, match=r"/c has another tokenizer than .*/a: prepare it again with --tokenizer .*/a/"):
        opened(folders, "a", "c")
    assert opened(folders, "c", "d").tokenizer().hash == Catalog.open(folders / "c").tokenizer().hash


def test_a_folder_that_is_no_corpus(folders):
    with pytest.raises(DataError, match=r"no corpus at .*/nowhere: .* run mlm-mpi prepare, or set data\.mixture"):
        opened(folders, "a", "nowhere")


def test_a_key_of_an_array_is_printed_and_has_no_list_of_values():
    from mlm_mpi.config import reference
    from mlm_mpi.plug import Plugins

    assert reference.completions("data.mixture=", "=", Plugins()) == {}
    text = reference.explain("data.weights", Plugins())
    assert text.startswith("data.weights = []\n") and "an array of numbers" in text


def test_only_kinds_that_say_so_are_given_a_mixture(tmp_path):
    from mlm_mpi.plug import Plugins

    (tmp_path / "tasks").mkdir()
    text = "from mlm_mpi.tasks.language_model import *\nfrom mlm_mpi.tasks.language_model import Settings, build\n"
    (tmp_path / "tasks/mine.py").write_text(f"{text}HEEDS = ()\n")
    wanted = ["task.kind=mine", 'data.mixture=["a"]', "data.weights=[1]"]
    with pytest.raises(ConfigError, match=r'task\.kind = "mine" does not heed data\.mixture: take that out'):
        config.load(None, wanted, Plugins(tmp_path))
    assert replace(config.load(None, wanted[:1], Plugins(tmp_path)).data) == Data()
