"""Spans that are taken out of windows: how much, that nothing is lost, that order decides nothing, a table with rows
for sentinels."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_mpi.config.reader import load
from mlm_mpi.cut import Box
from mlm_mpi.data.corruption import Corrupted, Spans, corrupted, cut
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.errors import ConfigError
from mlm_mpi.layers.base import Sizes
from mlm_mpi.params.sources import Arrays, Drawn, Over
from mlm_mpi.plug import Plugins
from mlm_mpi.rng import words
from mlm_mpi.tasks import span_corruption
from mlm_mpi.train import Start
from mlm_mpi.train.start import Origin, sha256_of_vectors, words_of

VOCABULARY, EOT, T5 = 90, 0, Spans(0.15, 3.0)


class Tokens:
    """A stream of so many tokens, which are told from their place."""

    def __init__(self, tokens: int, split: str = "train") -> None:
        self.tokens, self.split = tokens, split

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self.tokens
        return (np.arange(start, stop) * 7 % VOCABULARY).astype(np.uint8)


def samples(
    tokens: int = 4000, context: int = 64, training: bool = True, spans: Spans = T5, seed: int = 1
) -> Corrupted:
    return Corrupted(Tokens(tokens), context, training, VOCABULARY, EOT, spans, seed)  # type: ignore[arg-type]


def restored(source: np.ndarray, target: np.ndarray) -> list[int]:
    """The window, of both sides without ends of text."""
    marks = np.flatnonzero(target >= VOCABULARY)
    spans = {int(target[a]): target[a + 1 : b] for a, b in pairwise(marks)}
    assert marks[0] == 0 and marks[-1] == len(target) - 1 and (np.diff(marks) > 1).all()
    return [one for token in source.tolist() for one in (spans[token] if token >= VOCABULARY else [token])]


def sides(made) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each window what an encoder reads and a decoder writes, without ends, which have to be there."""
    pairs = []
    for source, target in zip(made.source.spans(), made.spans(), strict=True):
        read, written = made.source.inputs["ids"][0, slice(*source)], made.targets["ids"][0, slice(*target)]
        assert read[-1] == written[-1] == EOT == made.inputs["ids"][0, target[0]]
        assert np.array_equal(made.inputs["ids"][0, target[0] + 1 : target[1]], written[:-1])
        pairs.append((read[:-1], written[:-1]))
    return pairs


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 200), st.floats(0.01, 0.99), st.floats(1, 9), st.integers(0, 2**31), st.integers(0, 9))
def test_both_sides_make_the_text_again(context: int, rate: float, length: float, seed: int, step: int) -> None:
    """With as many spans and tokens as are to be taken out, in any window that fits both sides."""
    spans = Spans(rate, length)
    some = samples(3 * context, context, False, spans, seed)
    window, first = some.tokens, VOCABULARY
    out, count = spans.counts(window)
    assert max(spans.sides(window)) <= context < max(spans.sides(window + 1))
    assert count + 1 <= spans.sentinels(context) and spans.sentinels(context) % 8 == 0
    for number in range(len(some)):
        ((source, target),) = sides(some.batch([number], step, 0))
        text = some.stream.read(number * window, min((number + 1) * window, some.stream.tokens))
        assert restored(source, target) == text.tolist()
        marks = source[source >= first]
        assert np.array_equal(marks, first + np.arange(len(marks))), "each sentinel once, in their order"
        if len(text) == window:
            assert (len(marks), len(target)) == (count, out + count + 1) and len(source) == window - out + count
            assert source[0] < first <= source[-1], "what stays comes first"


def test_how_much_is_taken_out() -> None:
    """T5's own numbers: 568 tokens fit 512 that an encoder reads, 114 are written."""
    assert T5.window(512) == 568 and T5.sides(568) == (512, 115) and T5.counts(568) == (85, 28)
    assert T5.sentinels(512) == 32 and [T5.counts(n) for n in (2, 3, 20)] == [(1, 1), (1, 1), (3, 1)]
    assert T5.window(10**15) > 10**15, "a context that no memory holds costs no time"


def test_every_way_to_cut_is_as_likely() -> None:
    found = [tuple(cut(5, 3, words((1, seed), 0, 4)).tolist()) for seed in range(600)]
    ways = {one: found.count(one) for one in found}
    assert len(ways) == 6 and min(ways.values()) > 60 and all(sum(one) == 5 for one in ways)
    ids = np.arange(8, dtype=np.int32)
    source, target = corrupted(ids, np.array([2, 1]), np.array([1, 4]), 90)
    assert (source.tolist(), target.tolist()) == ([0, 1, 90, 3, 91], [90, 2, 91, 4, 5, 6, 7, 92])


def test_no_order_and_no_neighbour_decides_a_sample_and_each_epoch_is_another() -> None:
    some = samples()
    together, apart = sides(some.batch([4, 9, 1], 7, 0)), [sides(some.batch([n], 7, 3))[0] for n in (4, 9, 1)]
    for one, other in zip(together, apart, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    for other in (some.batch([4], 8, 0), samples(seed=2).batch([4], 7, 0)):
        assert not np.array_equal(sides(other)[0][0], together[0][0])


def test_the_last_window_of_a_text_that_is_measured_may_be_short() -> None:
    window = T5.window(64)
    counts = [len(samples(tokens, training=False)) for tokens in (0, 1, 2, window, window + 1, window + 2)]
    assert counts == [0, 0, 1, 1, 1, 2] and len(samples(window - 1)) == 0 and len(samples(2 * window)) == 2


def test_a_context_without_room_is_one_line() -> None:
    config = load(None, ("task.kind=span_corruption", "model.kind=encoder_decoder", "model.context=3"))
    with pytest.raises(ConfigError, match=r"^model.context = 3 has no room .*: set model.context = 4 or more$"):
        span_corruption.parts(config, Plugins(), Sizes(VOCABULARY))


def test_a_table_takes_the_rows_of_the_tokens_that_both_models_have() -> None:
    """Fewer rows than there, or more: of these the last are drawn. Any rank reads its own rows and no others."""
    there, here = np.arange(24.0).reshape(8, 3), -np.ones((11, 3))
    for rows, wanted in ((5, there[:5]), (8, there), (11, np.concatenate([there, here[8:]]))):
        both = Over(Arrays({"t": there, "p": there}), Arrays({"t": here[:rows], "p": here[:rows]}), "t")
        for first, stop in ((0, rows), (0, 4), (4, rows), (rows - 1, rows), (9, 11)):
            box = Box((min(first, rows), 1), (min(stop, rows), 3))
            assert np.array_equal(both.read("t", box), wanted[box.slices]) if box.shape[0] else True
        assert (both.read("p", Box.whole((rows, 3))) == (there if rows == 8 else here[:rows])).all()


def test_only_a_table_of_tokens_may_have_other_rows() -> None:
    words = ("model.kind=encoder_decoder", "model.layers=1", "model.width=8", "model.heads=1", "model.context=100")
    config = load(None, ("task.kind=span_corruption", *words))
    more = span_corruption.parts(config, Plugins(), Sizes(VOCABULARY))
    fewer = Plugins().find("models", "encoder_decoder", "model.kind").build(config.model, Sizes(VOCABULARY)).parts
    shapes = {p.name: list(p.layout.shape) for part in more for p in part.parameters()}
    assert shapes["embed.tokens"] == [VOCABULARY + 8, 8]
    origin = Origin(Path("x"), SimpleNamespace(shapes=shapes, vocabulary=VOCABULARY))  # type: ignore[arg-type]
    assert (origin.for_tokens(fewer).table, origin.for_tokens(more).table) == ("embed.tokens", "")
    for shape in ([VOCABULARY - 1, 8], [VOCABULARY + 8, 9], [VOCABULARY + 8], []):
        origin.manifest.shapes["embed.tokens"] = shape
        assert origin.for_tokens(fewer).table == ""


def test_word_vectors_find_the_table_that_has_rows_for_sentinels(tmp_path: Path) -> None:
    """The rows of the sentinels are drawn."""
    path, tokenizer = tmp_path / "a.txt", Tokenizer.bytes()
    path.write_text("a " + " ".join(map(str, range(16))) + "\n")
    config = load(None, ["task.kind=span_corruption", "model.kind=encoder_decoder", "model.width=16", "model.heads=2"])
    parts = span_corruption.parts(config, Plugins(), Sizes(tokenizer.vocab_size))
    start = Start(vectors=str(path), vectors_scale=1.0)
    words = words_of(start, parts, tokenizer.content, sha256_of_vectors(str(path)))
    (table,) = (one for one in parts[0].parameters() if one.name == words.table)
    assert table.layout.shape[0] > tokenizer.vocab_size
    box = Box.whole(table.layout.shape)
    drawn = Drawn(1, {table.name: (table.layout.shape, 0.02)})
    expected, found = drawn.read(table.name, box), words.over(drawn).read(table.name, box)
    expected[[*b"aA"]] = range(16)
    assert np.array_equal(found, expected)
