"""Beam search: equal to a search of all texts, to greedy search where it is narrow; ends, places, penalties, ties."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from whole import Driven

from mlm_mpi.beams import MOST_BEAMS, Beams, _first, written
from mlm_mpi.data.batch import Batch
from mlm_mpi.errors import ConfigError
from mlm_mpi.layers.attention import KeyValueCache
from mlm_mpi.layers.base import Context, Sizes
from mlm_mpi.layers.chain import Chain
from mlm_mpi.layers.head import TokenHead
from mlm_mpi.models import encoder_decoder

END, VOCABULARY, LONGEST = 3, 4, 4
SETTINGS = encoder_decoder.Settings(
    layers=1, decoder_layers=2, width=8, heads=2, context=LONGEST, dropout=0.0, init_std=1.5
)


@pytest.fixture(scope="module")
def toy() -> Driven:
    """A model of few tokens, in float64."""
    trunk = encoder_decoder.build(SETTINGS, Sizes(VOCABULARY))
    whole = Driven([*trunk.parts, TokenHead(trunk, 0.0)], "f8")
    whole.store.initialise(2)
    return whole


def texts() -> list[tuple[int, ...]]:
    """All that can be written: up to an end, or as long as the context."""
    every = (text for length in range(1, LONGEST + 1) for text in itertools.product(range(VOCABULARY), repeat=length))
    return [text for text in every if END not in text[:-1] and (text[-1] == END or len(text) == LONGEST)]


def log_probabilities(whole: Driven, source: np.ndarray, some: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Without a cache: each text is read at once, behind an end of text. Shapes: source (S,) -> (texts,)."""
    rows = np.zeros((len(some), LONGEST), np.int32)
    for row, text in zip(rows, some, strict=True):
        row[: len(text)] = text
    read = np.concatenate([np.full((len(some), 1), END, np.int32), rows[:, :-1]], axis=1)
    there = Batch(0, 0, {"ids": np.tile(source, (len(some), 1))}, {}, 0)
    ctx = Context(batch=Batch(0, 0, {"ids": read}, {}, 0, source=there))
    (hidden,), _ = Chain(whole.chain.parts[:-1]).forward((), ctx)
    z = whole.head.logits(hidden, ctx)
    z = np.take_along_axis(z - np.log(np.exp(z).sum(axis=2, keepdims=True)), rows[..., None], axis=2)[..., 0]
    return np.array([row[: len(text)].sum() for row, text in zip(z, some, strict=True)])


@pytest.mark.parametrize("penalty", [0.0, 0.6, 3.0])
def test_a_wide_beam_finds_what_a_search_of_all_texts_finds(toy: Driven, penalty: float) -> None:
    sources = np.random.default_rng(0).integers(0, VOCABULARY, (4, 3)).astype(np.int32)
    every, found = texts(), written(toy.chain, sources, LONGEST, END, Beams(len(texts()), penalty))
    assert len(every) == 121
    for source, text in zip(sources, found, strict=True):
        lengths = np.array([len(text) for text in every])
        best = every[(log_probabilities(toy, source, every) / ((5 + lengths) / 6) ** penalty).argmax()]
        assert tuple(text) == (best[:-1] if best[-1] == END else best)


def test_a_text_does_not_depend_on_those_beside_it(toy: Driven) -> None:
    sources = np.random.default_rng(1).integers(0, VOCABULARY, (9, 2)).astype(np.int32)
    found = written(toy.chain, sources, LONGEST, END, Beams(3))
    assert found == [written(toy.chain, row[None], LONGEST, END, Beams(3))[0] for row in sources]
    assert len({len(text) for text in found}) > 1, "some end before others"


def test_a_text_does_not_depend_on_longer_and_shorter_ones_beside_it(toy: Driven) -> None:
    random = np.random.default_rng(3)
    sources = [random.integers(0, VOCABULARY, size).astype(np.int32) for size in (3, 1, 4, 2, 3, 4, 1, 3)]
    found = written(toy.chain, sources, LONGEST, END, Beams(3))
    assert found == [written(toy.chain, [one], LONGEST, END, Beams(3))[0] for one in sources]
    assert written(toy.chain, [], LONGEST, END) == []


class Table:
    """A chain whose next token depends on the last one alone. Shapes: probabilities (V, V)."""

    def __init__(self, probabilities: Sequence[Sequence[float]]) -> None:
        with np.errstate(divide="ignore"):
            self.table = np.log(np.array(probabilities)).astype(np.float32)
        self.parts, self.rows = [self], list[int]()

    def without_last_part(self) -> "Table":
        return self

    def forward(self, x: tuple, ctx: Context) -> tuple[tuple[np.ndarray], None]:
        self.rows.append(len(ctx.batch.inputs["ids"]))
        return (ctx.batch.inputs["ids"],), None

    def logits(self, ids: np.ndarray, ctx: Context) -> np.ndarray:
        return self.table[ids]


def made(chain: Table, width: int, penalty: float = 0.0, context: int = 6) -> list[int]:
    return written(chain, np.zeros((1, 1), np.int32), context, 0, Beams(width, penalty))[0]


def test_greedy_search_misses_what_two_beams_find() -> None:
    """1 is likelier at first, and then uncertain: 0.6 · 0.4 against 0.4 · 0.9."""
    chain = Table([[0, 0.6, 0.4], [0.4, 0.3, 0.3], [0.9, 0.05, 0.05]])
    assert made(chain, 1) == [1] and made(chain, 2) == [2]


def test_a_hypothesis_that_ends_gives_its_place_up_and_a_search_ends_when_none_can_win() -> None:
    chain = Table([[0.3, 0.6, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2]])
    assert made(chain, 2) == [] and chain.rows == [1, 1, 1, 1, 1], (
        "0.6 · 0.8³ and more are likelier than 0.3, then none"
    )
    chain.rows.clear()
    assert made(chain, 2, penalty=3.0) == [1] * 6 and chain.rows == [1] * 6, "a long one counts less, to the last"
    chain.rows.clear()
    assert made(chain, 1) == [1] * 6, "one beam has no other"


def test_the_penalty_is_that_of_the_formula() -> None:
    """Of a text of one token with its end and one of two, where the shorter is likelier."""
    chain = Table([[0.5, 0.5 - 1e-9, 1e-9], [0.98, 0.01, 0.01], [1, 0, 0]])
    turn = math.log(math.log(0.5 * 0.98) / math.log(0.5)) / math.log(7 / 6)
    assert made(chain, 2, turn - 0.01) == [] and made(chain, 2, turn + 0.01) == [1]


@pytest.mark.parametrize("width", [1, 2, 5, 40])
def test_of_equal_tokens_the_lower_ones_come_first(width: int) -> None:
    """More beams than there are tokens too, and tokens that cannot be."""
    assert made(Table(np.full((9, 9), 1 / 9)), width, context=1) == []
    even = np.full((9, 9), 1 / 8)
    even[:, 0] = 0
    assert made(Table(even), width, context=3) == [1, 1, 1]


@pytest.mark.parametrize(("width", "penalty"), [(0, 0.6), (MOST_BEAMS + 1, 0.6), (4, -0.1), (4, math.nan), (4, 11.0)])
def test_no_such_search(width: int, penalty: float) -> None:
    with pytest.raises(ConfigError, match="--beams" if penalty == 0.6 else "--length-penalty"):
        Beams(width, penalty)


@pytest.mark.parametrize(("vocabulary", "count"), [(1, 4), (5, 5), (130, 3), (1000, 4), (257, 200)])
def test_the_likeliest_are_the_first_of_a_stable_sort(vocabulary: int, count: int) -> None:
    """Of few different numbers, so that many are equal, at the borders of blocks too."""
    rows = np.random.default_rng(4).integers(0, 20, (7, vocabulary)).astype(np.float32)
    wanted = np.argsort(-rows, axis=1, kind="stable")[:, :count]
    assert np.array_equal(_first(rows, count), wanted)


def test_rows_of_a_cache_are_taken_with_all_that_they_hold() -> None:
    cache, random = KeyValueCache(5), np.random.default_rng(0)
    k, v, memory = (random.normal(size=shape) for shape in ((3, 3, 2, 4), (3, 3, 2, 4), (2, 3, 9, 4)))
    cache.extend("a", k, v)
    cache.advance(2)
    cache.remember("a", memory, (2, 3, 4))
    cache.states["b"] = (memory[0, 0, :3],)
    for rows in (np.array([0, 0, 1, 2, 2, 2]), np.array([1, 0, 5, 5])):
        cache.take(rows)
        k, v = k[rows], v[rows]
        for positions in (1, 2):  # there is room for one, and then is made for more
            keys, values = cache.extend("a", k[:, :, :positions], v[:, :, :positions])
            assert np.array_equal(keys[:, :, :2], k) and np.array_equal(values[:, :, :2], v)
            assert np.array_equal(keys[:, :, 2:], k[:, :, :positions]) and keys.shape == (
                len(rows),
                3,
                2 + positions,
                4,
            )
    assert cache.readers == (2, 2) and cache.sources == (2, 4), "nobody reads the second one"
    assert np.array_equal(cache.memory["a"], memory[:, :, [0, 1, 5, 6, 7, 8]])
    assert np.array_equal(cache.states["b"][0], memory[0, 0, [0, 0, 2, 2]])
