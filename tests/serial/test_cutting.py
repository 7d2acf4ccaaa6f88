"""One long text becomes documents, its tail is held out; a corpus that has enough documents stays as it is."""

import functools
import gzip
import json
import random
import unicodedata
from itertools import pairwise

import pytest
from corpora import contents, run_prepare, sentences
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import documents, refused

from mlm_mpi.data import cutting
from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.cutting import Side, cut

TEXT = ("--tokenizer", "bytes")


WORDS = sentences(1, 2000).split()


@functools.cache
def paragraphs(seed, count, words=80):
    draw = random.Random(seed)
    return "\n\n".join(" ".join(draw.choices(WORDS, k=words)) for _ in range(count))


@functools.cache
def novel(chapters=20, heading="CHAPTER {}.\n\nIn which it goes on", seed=0):
    contents = "\n\n".join(f"CHAPTER {n}." for n in range(chapters))
    parts = (f"{heading.format(n)}\n\n{paragraphs(100 * seed + n, 6)}\n\n\n\n" for n in range(chapters))
    return f"A Title\n\nby Nobody\n\nContents\n\n{contents}\n\n" + "".join(parts)


def pieces(text, fraction=0.05):
    """The pieces of a text, of which nothing but space at borders may be missing; what they were cut at."""
    found = cut(text, fraction)
    assert "".join("".join(text[p.start : p.stop] for p in found).split()) == "".join(text.split())
    assert all(a.stop <= b.start and a.side <= b.side for a, b in pairwise(found))
    return [text[p.start : p.stop] for p in found], {cutting.border_names()[p.border] for p in found[1:]}


def tail(text, fraction=0.05):
    return [text[p.start : p.stop] for p in cut(text, fraction) if p.side == Side.TAIL]


@pytest.mark.parametrize(
    "heading",
    [
        "CHAPTER {}.\n\nIn which it goes on", "Chapter {}: The Sea", "# Part {}", "{}.", "Kapitel {}", "  ACTE {}  ",
        "第{}章 风起", "BOOK TWO\n\nCHAPTER {}", "Глава {}",
    ],
)  # fmt: skip
def test_a_text_with_headings_is_cut_at_chapters(heading):
    found, borders = pieces(novel(heading=heading))
    assert borders == {"chapters"} and len(found) == 20
    first = heading.split("{")[0].strip()
    assert all(piece.lstrip().startswith(first) and piece.endswith("\n") for piece in found[2:])
    assert "Contents" in found[0]


def test_a_table_of_contents_alone_makes_no_chapters():
    found, borders = pieces(novel(heading=""))
    assert borders == {"blank lines"} and all(2000 < len(piece) < 7000 for piece in found)


@pytest.mark.parametrize(
    "heading", ["{}", "# a comment\ncode = {}", "In chapter {} he goes on", "x" * 70 + " Chapter {}"]
)
def test_page_numbers_comments_and_sentences_are_no_headings(heading):
    assert pieces("".join(f"{heading.format(n)}\n\n{paragraphs(n, 15)}\n\n" for n in range(9)))[1] == {"blank lines"}


def test_a_long_chapter_is_cut_at_blank_lines():
    text = "CHAPTER I\n\n" + paragraphs(1, 200) + "\n\nCHAPTER II\n\n" + paragraphs(2, 10) + "\n"
    found, borders = pieces(text)
    assert borders == {"chapters", "blank lines"} and max(map(len, found)) < 65_000


@pytest.mark.parametrize(
    ("text", "border", "end"),
    [
        ("\n".join(sentences(n, 8).strip() for n in range(2000)), "line ends", "\n"),
        (sentences(1, 20_000).replace("ba ", "ba. "), "sentence ends", "."),
        ("他说：“这是一句话。”" * 3000, "sentence ends", "”"),
        (sentences(2, 20_000), "spaces", ""),
        ("e\u0300\u0301\u0302" * 20_000, "fixed lengths", "\u0302"),
        ("\U0001f469\u200d\U0001f680" * 20_000, "fixed lengths", "\U0001f680"),
    ],
)
def test_a_text_without_blank_lines_is_cut_where_it_harms_least(text, border, end):
    found, borders = pieces(text)
    assert borders == {border} and all(piece.endswith(end) for piece in found[:-1]) and max(map(len, found)) < 7000
    assert not any(unicodedata.combining(piece[0]) for piece in found)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(["word ", "A sentence. ", "\n", "\n\n", " \n", "CHAPTER I\n", "\u0301", "。", "x" * 999])),
    st.sampled_from([0, 0.01, 0.3, 0.5, 0.99]),
    st.integers(1, 300),
)
def test_no_text_loses_anything(parts, fraction, times):
    pieces("".join(parts) * times, fraction)


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.3, 0.5])
@pytest.mark.parametrize("text", [novel(), novel(heading=""), sentences(3, 30_000)])
def test_the_tail_has_the_fraction(text, fraction):
    assert 0.74 < sum(map(len, tail(text, fraction))) / len(text) / fraction < 1.26
    assert text.rstrip().endswith(tail(text, fraction)[-1].rstrip())


def test_the_licence_of_project_gutenberg_is_not_what_a_model_is_measured_with():
    licence = "*** END OF THE PROJECT GUTENBERG EBOOK X ***\n\n" + paragraphs(99, 40)
    text = novel() + licence
    assert tail(text) == tail(novel()) and cut(text, 0.05)[-1].side == Side.LICENCE


def test_blank_lines_without_end_take_no_time():
    for text in ("\n" * 200_000 + "a", "a" + " \n" * 200_000 + "a", "CHAPTER I\n\n" * 20_000):
        pieces(text)


def told(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("cut ")]


def test_one_text_file_makes_a_corpus(tmp_path, capsys):
    path = tmp_path / "input.txt"
    path.write_bytes(b"\xef\xbb\xbf" + novel(heading="").replace("\n", "\r\n").encode())
    run_prepare(path, "--out", tmp_path / "out", *TEXT)
    what = "into 13 documents at blank lines, the last one held out"
    assert told(capsys) == [f"cut         {path} {what}"]
    assert json.loads((tmp_path / "out" / "prepared.json").read_text())["cut"] == {str(path): what}
    train, held = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "heldout")
    assert train + held == pieces(novel(heading=""))[0] and held == tail(novel(heading=""))
    assert Catalog.open(tmp_path / "out").manifest.cleaning.documents == 1
    packed = tmp_path / "input.txt.gz"
    packed.write_bytes(gzip.compress(novel(heading="").encode()))
    run_prepare(packed, "--out", tmp_path / "again", *TEXT)
    assert (tmp_path / "again" / "catalog.json").read_bytes() == (tmp_path / "out" / "catalog.json").read_bytes()


def test_several_novels_lose_their_tails_each(tmp_path, capsys):
    texts = {name: novel(12, seed=number) for number, name in enumerate("abc")}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "README").write_text(sentences(5, 100))
    run_prepare(tmp_path, "--out", tmp_path / "out", *TEXT, "--heldout", 0.1)
    assert len(told(capsys)) == 3
    held = documents(tmp_path / "out", "heldout")
    assert held == [piece for text in texts.values() for piece in tail(text, 0.1)]
    assert sentences(5, 100) in documents(tmp_path / "out", "train")


def test_a_corpus_with_enough_documents_is_not_cut(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for number in range(12):
        (tmp_path / "in" / f"{number}.txt").write_text(paragraphs(number, 24))
    run_prepare(tmp_path / "in", "--out", tmp_path / "auto", *TEXT)
    assert told(capsys) == []
    run_prepare(tmp_path / "in", "--out", tmp_path / "never", *TEXT, "--cut", "never")
    found = contents(tmp_path / "auto"), contents(tmp_path / "never")
    assert b"--cut never" in found[1].pop("prepared.json") and b"cut" not in found[0].pop("prepared.json")
    assert found[0] == found[1]
    run_prepare(tmp_path / "in", "--out", tmp_path / "always", *TEXT, "--cut", "always")
    assert len(told(capsys)) == 6  # 5 and a line for the others
    assert len(documents(tmp_path / "always", "heldout")) == 12


def test_what_is_needed_of_one_text_is_said(tmp_path, capsys):
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text(novel())
    refused(lambda: run_prepare(path, "--out", out, "--cut", "never"), "--cut never", "--heldout 0")
    run_prepare(path, "--out", out, *TEXT, "--heldout", 0)
    assert documents(out, "train") == [novel()] and told(capsys) == []
    run_prepare(path, "--out", out, *TEXT, "--heldout", 0, "--cut", "always")
    assert len(documents(out, "train")) == 20 and "held out" not in told(capsys)[0]
    (out / "catalog.json").unlink()
    (out / "prepared.json").unlink()
    path.write_text("x" * 2000)
    out = tmp_path / "other"
    refused(lambda: run_prepare(path, "--out", out), "2,000 characters", "10,000", "--heldout 0.25", "--heldout 0")
    path.write_text("All work and no play makes Jack a dull boy.\n" * 900)
    refused(lambda: run_prepare(path, "--out", out), "repeats", "--heldout 0")


def test_a_refrain_is_not_held_out(tmp_path, capsys):
    text = "\n\n".join(f"{paragraphs(n, 8)}\n\nCHAPTER {n}\n\n{paragraphs(77, 8)}\n\nBOOK {n}\n" for n in range(20))
    (tmp_path / "a.txt").write_text(text)
    run_prepare(tmp_path / "a.txt", "--out", tmp_path / "out", *TEXT, "--heldout", 0.2)
    sides = [{text.split()[-1] for text in documents(tmp_path / "out", split)} for split in ("train", "heldout")]
    assert paragraphs(77, 8).split()[-1] in sides[0] - sides[1] and len(sides[1]) == 4
    assert told(capsys)[0].endswith("4 of the last 8 held out, the others repeat earlier ones")


def test_near_identical_texts_are_not_cut(tmp_path, capsys):
    """The tail of the shorter one would stand in the body of the longer one."""
    for name, text in (
        ("a", novel()),
        ("b", novel() + paragraphs(50, 7)),
        ("c", novel(heading="", seed=1)),
    ):
        (tmp_path / f"{name}.txt").write_text(text)
    run_prepare(tmp_path, "--out", tmp_path / "out", *TEXT)
    assert [line.split()[1] for line in told(capsys)] == [str(tmp_path / "c.txt")]
    assert {novel()} < set(documents(tmp_path / "out", "train"))


def test_one_long_line_of_json_is_cut_too(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (novel(), novel(heading="", seed=1), "short"))
    )
    run_prepare(path, "--out", tmp_path / "out", *TEXT)
    assert f"cut         2 texts of {path} into " in told(capsys)[0] and told(capsys) == []
