"""Files of word vectors: what others write is read, what nobody should write is one line; tokens and their words."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from corpora import sentences

from mlm_mpi.__main__ import main
from mlm_mpi.cut import Box
from mlm_mpi.data.tokenizer import END_OF_TEXT, Tokenizer
from mlm_mpi.errors import ConfigError, DataError
from mlm_mpi.formats import vectors
from mlm_mpi.formats.vectors import Vectors
from mlm_mpi.params.sources import Drawn
from mlm_mpi.wordspace import WordSpace, questions

WORDS = ["the", "Größe", ". .", "東京"]
ROWS = np.array([[0.5, -1.25, 3e-5], [1, 2, 3], [-7.5, 0, 1e10], [0.1, 0.2, 0.3]], np.float32)


def lines(words=WORDS, rows=ROWS) -> bytes:
    return b"".join(
        f"{word} {' '.join(map(str, row))}\n".encode() for word, row in zip(words, rows.tolist(), strict=True)
    )


def binary(words=WORDS, rows=ROWS, end=b"\n") -> bytes:
    packed = (word.encode() + b" " + struct.pack("<3f", *row) + end for word, row in zip(words, rows, strict=True))
    return b"4 3\n" + b"".join(packed)


PLAIN = ["the", "Größe", "dot", "東京"]  # a binary word ends with its space
KINDS = {
    "word2vec text": (b"4 3\n" + lines(), WORDS),
    "fastText, with a space at each end": (b"4 3\n" + lines().replace(b"\n", b" \n"), WORDS),
    "GloVe": (lines(), WORDS),
    "GloVe, no last line end": (lines()[:-1], WORDS),
    "Windows": ((b"4 3\n" + lines()).replace(b"\n", b"\r\n"), WORDS),
    "word2vec binary": (binary(PLAIN), PLAIN),
    "gensim's binary": (binary(PLAIN, end=b""), PLAIN),
}


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_told_by_its_content(tmp_path: Path, kind: str, compress) -> None:  # type: ignore[no-untyped-def]
    content, words = KINDS[kind]
    (tmp_path / "some").write_bytes(compress(content))
    found = vectors.read(tmp_path / "some")
    assert found.words == words and found.rows.dtype == np.float32
    assert np.array_equal(found.rows, ROWS)
    assert vectors.read(tmp_path / "some", 2).words == words[:2]


def test_what_is_written_is_read_with_the_same_bits(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((50, 7)).astype("f4") * np.float32(1e-3)
    vectors.write(tmp_path / "a.vec", Vectors([f"w{n}" for n in range(50)], rows))
    assert (tmp_path / "a.vec").read_bytes().startswith(b"50 7\nw0 ")
    assert vectors.read(tmp_path / "a.vec").rows.tobytes() == rows.tobytes()
    with pytest.raises(DataError, match="cannot write .*choose another folder"):
        vectors.write(tmp_path / "none" / "a.vec", Vectors(["a"], rows[:1]))


def test_of_a_word_that_comes_again_the_first_vector_is_taken(tmp_path: Path) -> None:
    (tmp_path / "some").write_bytes(b"6 3\n" + lines() + "Größe 1 2 3\nGröße 4 5 6\n".encode())
    found = vectors.read(tmp_path / "some")
    assert found.repeated == 2 and len(found.words) == 4 and found.rows.tobytes() == ROWS[:4].astype("f4").tobytes()
    known = vectors.Known(np.arange(3), ROWS[:3], 9, 2)
    assert str(known) == "vectors of 3 of 9 tokens (the first of each word: 2 come again)"


HOSTILE = {
    "nothing": (b"", "some has no word: give a file of word vectors"),
    "a header alone": (b"4 3\n", "some ends after 0 words, and its first line says 4"),
    "a novel": (b"Call me Ishmael. Some years\nago\n", "some:1 is neither a word with its numbers nor how many"),
    "too few lines": (b"5 3\n" + lines(), "some ends after 4 words, and its first line says 5: mend it, or get the"),
    "too many lines": (b"3 3\n" + lines(), "some:5 is word 4, and the first line says 3"),
    "another width in the header": (b"4 2\n" + lines(PLAIN), "some:2 has 3 numbers, and the vectors of this file 2"),
    "a wide lie": (b"4 300\n" + lines(), "some:2 has 3 numbers, and the vectors of this file 300"),
    "a huge header": (b"9999999999999 3\n" + lines(), "some:1 says 9999999999999 words of 3 numbers, at most"),
    "a short line": (lines() + b"cat 1 2\n", "some:5 has 2 numbers, and the vectors of this file 3: leave the"),
    "a long line": (lines() + b"cat 1 2 3 4\n", "some:5 has 4 numbers, and the vectors of this file 3"),
    "no number": (lines() + b"cat 1 x 3\n", "some:5 has 'x' where a number belongs"),
    "Python's number": (lines() + b"cat 1 1_0 3\n", "some:5 has '1_0' where a number belongs"),
    "NaN": (lines() + b"cat 1 nan 3\n", "some:5 has nan in the vector of 'cat', not a number: leave the word out"),
    "too large for float32": (lines() + b"cat 1 1e39 3\n", "some:5 has inf in the vector of 'cat'"),
    "Latin-1": (lines() + b"Gr\xf6\xdfe 1 2 3\n", r"some:5 has the word 'Gr\\xf6\\xdfe', which is not UTF-8: convert"),
    "Latin-1 first": (b"1 3\nGr\xf6\xdfe 1 2 3\n", r"some:2 has the word 'Gr\\xf6\\xdfe', which is not UTF-8"),
    "a cut binary": (binary(PLAIN)[:-9], "some:word 4 ends after 4 of the 12 bytes of its vector"),
    "a binary of fewer": (binary(PLAIN)[:-20], "some ends after 3 words, and its first line says 4"),
    "a binary of more": (binary(PLAIN) + b"cat " + bytes(12), "some:word 5 is word 5, and the first line says 4"),
    "NaN in a binary": (binary(PLAIN, ROWS * np.float32(np.nan)), "some:word 1 has nan in the vector of 'the'"),
    "an endless word": (b"4 3\n" + bytes(5000), "some:word 1 has no end within 4,096 bytes"),
    "an endless line": (b"a" * (1 << 21), "some:1 has 2,097,152 bytes or more, which no word's line has"),
    "a fastText model": (b"\xba\x16\x4f\x2f" + bytes(99), "some is a model of fastText (.bin): give the .vec"),
    "damaged gz": (gzip.compress(lines())[:-20], "its compressed content is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_nobody_should_write_is_one_line(tmp_path: Path, kind: str) -> None:
    content, said = HOSTILE[kind]
    (tmp_path / "some").write_bytes(content)
    with pytest.raises(DataError) as caught:
        vectors.read(tmp_path / "some")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["word2vec text", "GloVe", "word2vec binary"])
def test_a_file_with_any_byte_changed_is_read_or_refused(tmp_path: Path, kind: str) -> None:
    content, r = KINDS[kind][0], np.random.default_rng(1)
    for _ in range(60):
        changed = bytearray(content)
        changed[r.integers(len(content))] = r.integers(256)
        (tmp_path / "some").write_bytes(changed[: r.integers(1, len(content) + 1)])
        try:
            found = vectors.read(tmp_path / "some")
        except DataError:
            continue
        assert np.isfinite(found.rows).all() and len(found.words) == len(set(found.words)) == len(found.rows)


# ---- tokens


TEXTS = [sentences(seed, 200).replace(" ba", " The") for seed in range(20)]


def test_words_are_tokens_and_rare_ones_unknown() -> None:
    texts = ["The cat, the dog; the cat's tail.", "A cat once"]
    plain, small = Tokenizer.train_words(texts, 100), Tokenizer.train_words(iter(texts), 100, lowercase=True)
    assert plain.content == Tokenizer.train_words(texts, 100).content != small.content
    assert [plain.word(n) for n in range(plain.vocab_size)] == ["", "", "cat", "the"]
    assert (plain.eot, plain.unknown, small.vocab_size) == (0, 1, 4)
    assert plain.encode("The cat, the dog") == [1, 2, 1, 3, 1] and small.encode("The cat") == [3, 2]
    assert plain.decode([3, 2, 0]) == "the cat" and Tokenizer.bytes().unknown is None
    assert Tokenizer.train_words(texts, 3).vocab_size == 3
    assert plain.eot not in plain.encode(f"{END_OF_TEXT} <unk>")
    with pytest.raises(ConfigError, match="--vocab 2 is below 3"):
        Tokenizer.train_words(texts, 2)


def test_a_token_is_a_bare_word() -> None:
    tokenizer = Tokenizer.train(TEXTS, 400)
    ids = tokenizer.encode(" The The")
    assert len(ids) == 2 and {tokenizer.word(number) for number in ids} == {"The"}
    assert tokenizer.word(tokenizer.eot) == tokenizer.word(10**6) == ""
    newline, half = tokenizer.encode("\n")[0], tokenizer.encode("ö")[0]
    assert tokenizer.word(newline) == tokenizer.word(half) == ""
    found = vectors.tokens_by_word(tokenizer)
    assert found["The"] == ids[0] and list(found.values()) == sorted(found.values())


def test_a_files_vectors_are_the_first_rows_of_a_table(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["the The the The dog dog"] * 3, 300)
    inside = {word: tokenizer.encode(word)[0] for word in (" the", " The", " dog")}
    (tmp_path / "a.txt").write_text("cat 9 9\nthe 1 2\ndog 3 4\n")
    known = vectors.known(tmp_path / "a.txt", tokenizer)
    rows = dict(zip(known.ids.tolist(), known.rows.tolist(), strict=True))
    assert rows[inside[" the"]] == rows[inside[" The"]] == [1, 2] and rows[inside[" dog"]] == [3, 4]
    assert str(known).endswith(f" of {tokenizer.vocab_size} tokens")
    drawn = Drawn(1, {"embed.tokens": ((tokenizer.vocab_size, 2), 0.02), "other": ((4,), "ones")})
    source = vectors.initial(tmp_path / "a.txt", known, drawn, "embed.tokens")
    whole = source.read("embed.tokens", Box.whole((tokenizer.vocab_size, 2)))
    expected = drawn.read("embed.tokens", Box.whole((tokenizer.vocab_size, 2)))
    expected[known.ids] = known.rows
    assert np.array_equal(whole, expected) and source.shape("none") is None
    for box in (
        Box((3, 1), (tokenizer.vocab_size, 2)),
        Box((inside[" dog"], 0), (inside[" dog"] + 1, 2)),
        Box((0, 0), (0, 2)),
    ):
        assert np.array_equal(source.read("embed.tokens", box), expected[box.slices])
    assert source.read("other", Box((0,), (4,))).tolist() == [1, 1, 1, 1]
    (tmp_path / "a.txt").write_text("cat 9 9\nThe 5 6\nthe 1 2\n")
    rows = dict(zip(*(part.tolist() for part in vectors.known(tmp_path / "a.txt", tokenizer)[:2]), strict=True))
    assert rows[inside[" The"]] == [5, 6] and rows[inside[" the"]] == [1, 2]


def test_vectors_of_another_width_or_language_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes()
    (tmp_path / "a.txt").write_text("a 1 2 3\n")
    known = vectors.known(tmp_path / "a.txt", tokenizer)
    table = Drawn(1, {"embed.tokens": ((257, 2), 0.02)})
    with pytest.raises(DataError) as caught:
        vectors.initial(tmp_path / "a.txt", known, table, "embed.tokens")
    assert str(caught.value) == (
        f"{tmp_path / 'a.txt'} has vectors of 3 numbers, and embed.tokens rows of 2: set model.width = 3, or give "
        "vectors of 2"
    )
    (tmp_path / "a.txt").write_text("whole 1 2 3\n")
    with pytest.raises(DataError, match="has none of the 257 tokens of the tokenizer as a word"):
        vectors.known(tmp_path / "a.txt", tokenizer)


def test_vectors_have_one_size_whatever_adds_their_squares() -> None:
    rows = np.random.default_rng(2).normal(size=(50, 7)).astype("f4") * 100
    found = vectors.Known(np.arange(50), rows, 60)
    again = vectors.Known(np.arange(50), rows[::-1, ::-1], 60)
    assert found.root_mean_square() == again.root_mean_square() == pytest.approx(100, rel=0.1)
    scaled = found.times(0.02 / found.root_mean_square())
    assert scaled.rows.dtype == np.float32 and scaled.root_mean_square() == pytest.approx(0.02, rel=1e-6)
    assert np.array_equal(found.times(1.0).rows, rows) and np.isinf(found.times(1e38).rows).any()


# ---- neighbours and analogies


def test_neighbours_and_analogies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, rows = ["man", "woman", "king", "queen", "dog", "none"], np.zeros((6, 3))
    rows[:5] = [[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1], [-1, 0.2, 0]]
    vectors.write(tmp_path / "a.vec", Vectors(words, rows))
    asked = tmp_path / "questions.txt"
    asked.write_text(": family\nman woman king queen\nMan Woman King dog\nman woman king duke\n\n: two words\n"
                     "king queen man woman\n")  # fmt: skip
    space = WordSpace(words, rows)
    assert [word for word, _ in space.near("King", 2)] == ["queen", "man"]
    assert space.near("none", 9)[0][1] == 0.0 and len(space.near("man", 99)) == 5
    scores = [(s.name, s.asked, s.right, s.unknown) for s in space.answer(questions(asked))]
    assert scores == [("family", 2, 1, 1), ("two words", 1, 1, 0)]
    assert main(["vectors", str(tmp_path / "a.vec"), "king", "--analogies", str(asked), "--top", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "6 words, vectors of 3 numbers" and out[1:3] == ["king", "   0.816  queen"]
    assert out[3] == "family       1 of 2 right (50.0%), 1 with unknown words"
    assert out[-1].startswith("all of them  2 of 3 right (66.7%), 1 with")
    copy = tmp_path / "b.vec"
    assert main(["vectors", str(tmp_path / "a.vec"), "king", "--json", "--limit", "4", "--export", str(copy)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["words"] == 4 and told["neighbours"]["king"][0][0] == "queen" and vectors.read(copy).words == words[:4]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.vec", "kin"], "'kin' is none of the 2 words; did you mean 'king'?"),
        (["a.vec", "--analogies", "b.txt"], "b.txt:2 has 3 words, not four, nor is it a section"),
        (["a.vec", "--analogies", "none.txt"], "cannot read none.txt: No such file or directory"),
        (["a.vec", "--export", "no/a.vec"], "cannot write"),
        (["folder", "king"], "folder is no run folder"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, monkeypatch, capsys, words: list[str], said: str) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.vec").write_text("2 2\nking 1 2\nqueen 2 3\n")
    (tmp_path / "b.txt").write_text("a b c d\na b c\n")
    assert main(["vectors", *words]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("mlm-mpi: ") and err.count("\n") == 1 and said in err, out + err
