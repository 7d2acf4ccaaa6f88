"""Labelled texts: tables read row by row, sides, what `prepare --label` stores and reports, and what it refuses."""

import bz2
import csv
import gzip
import hashlib
import json
import math
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpora import contents, run_prepare, write_texts
from hypothesis import given, settings
from hypothesis import strategies as some

from mlm_mpi.data import labelled, rows, shards
from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.labelled import Example, Labelled
from mlm_mpi.data.rows import Columns
from mlm_mpi.data.sides import SPLITS, side_of, split_digest
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.errors import ConfigError, DataError

WORDS = {"pos": ("good", "fine", "warm"), "neg": ("bad", "dull", "grim")}


def review(number: int) -> tuple[str, str]:
    """(text, label), three of four with "pos"; all texts differ."""
    label = "neg" if number % 4 == 0 else "pos"
    return f"{WORDS[label][number % 3]} work, number {number}", label


def write_csv(path: Path, table: list[tuple], header: tuple = ("text", "label")) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *table])
    return path


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "reviews.csv", [review(number) for number in range(120)])


def prepared(tmp_path: Path, *words: object) -> Labelled:
    run_prepare(*words, "--out", tmp_path / "out", "--label", "label", "--tokenizer", "bytes")
    return Labelled.open(tmp_path / "out")


def texts(found: Labelled, split: str) -> list[tuple[str, str, str]]:
    """(text, second text, label) of a split's examples."""
    tokenizer, examples = found.tokenizer(), found.examples(split)
    out = []
    for number in range(len(examples)):
        ids, second, label = examples.read(number)
        first = ids[: second or len(ids)]
        tail = ids[second:] if second else ids[:0]
        out.append((tokenizer.decode(first.tolist()), tokenizer.decode(tail.tolist()), found.labels[label]))
    return out


def refused(action, *words: str, error: type[Exception] = DataError) -> None:
    with pytest.raises(error) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


# Rows


def read(path: Path, *names: str, **more: object) -> list[tuple]:
    """(place, text, second, label) of each row; the columns are text, label and pair unless named."""
    columns = Columns(*names, **more) if names or more else Columns("text", "pair", "label")
    return [(row.place.rpartition("/")[2], row.text, row.second, row.label) for row in rows.read(path, columns)]


def test_csv_with_quotes_commas_and_newlines(tmp_path: Path) -> None:
    table = [('a "b", c', "d\ne", " x "), ("", "f", "y"), ("g", "", "")]
    path = write_csv(tmp_path / "a.csv", table, ("text", "pair", "label"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n\n")
    assert read(path) == [
        ("a.csv:2", 'a "b", c', "d\ne", "x"), ("a.csv:4", "", "f", "y"), ("a.csv:5", "g", "", None),
    ]  # fmt: skip


def test_tsv_takes_quotes_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress(b'label\ttext\tpair\r\n1\t"so\tit\r\n\n0\tgoes"\t"\n'))
    assert read(path) == [("a.tsv.gz:2", '"so', "it", "1"), ("a.tsv.gz:4", 'goes"', '"', "0")]


def test_columns_by_number(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("x\t1\nz\t2\n")
    assert read(tmp_path / "a.tsv", "1", label="2", has_header=False) == [
        ("a.tsv:1", "x", "", "1"),
        ("a.tsv:2", "z", "", "2"),
    ]


def test_json_lines_with_numbers_and_null(tmp_path: Path) -> None:
    lines = [
        {"text": "a", "label": True}, {"text": "b", "label": 1}, {"text": "c", "label": 0.5, "pair": "d"},
        {"text": "e", "label": None}, {"label": "f"}, {"text": None, "label": "g"}, {"text": 7, "label": "h"},
    ]  # fmt: skip
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress("\n".join(map(json.dumps, lines)).encode()))
    assert [row[1:] for row in read(tmp_path / "a.jsonl.bz2")] == [
        ("a", "", "true"), ("b", "", "1"), ("c", "d", "0.5"), ("e", "", None), ("", "", "f"), ("", "", "g"),
        ("7", "", "h"),
    ]  # fmt: skip


def test_a_field_that_the_first_thousand_lines_lack_is_refused_before_a_row_is_given(tmp_path: Path) -> None:
    path, early, late = tmp_path / "a.jsonl", 998, 1000
    for place, is_read in ((early, True), (late, False)):
        lines = [{"text": "a"}] * place + [{"text": "b", "pair": "c"}] + [{"text": "d"}] * 500
        path.write_text("\n".join(map(json.dumps, lines)))
        found = rows.read(path, Columns("text", "pair"))
        if is_read:
            assert len(list(found)) == 1499
        else:
            refused(lambda some=found: next(some), "no field 'pair'", "it has 'text'", "--pair")


def test_rows_to_be_labelled_need_no_label(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [("1", " b\r\n"), ("2", "")], ("id", "text"))
    assert read(path, "text") == [("a.csv:2", "b", "", None), ("a.csv:4", "", "", None)]


BAD_TABLES = {
    "missing column": ("x.csv", b"text,lable\na,b\n", ("no column 'label'", "'text, lable'", "mean 'lable'?")),
    "missing field": ("x.jsonl", b'{"txt": "a", "label": 1}\n', ("no field 'text'", "'label, txt'", "--text")),
    "column twice": ("x.csv", b"text,label,label\na,b,c\n", ("x.csv has 2 columns 'label'", "rename")),
    "too few fields": ("x.csv", b'text,label\n"a\nb",c\nd\n', ("x.csv:4 has 1 fields, the first row has 2",)),
    "too many fields": ("x.tsv", b"text\tlabel\na\tb\tc\n", ("x.tsv:2 has 3 fields, the first row has 2",)),
    "open quote": ("x.csv", b'text,label\na,b\n"c,d\n', ("x.csv:3 is not CSV", "quotes")),
    "quote inside": ("x.csv", b'text,label\n"a" b,c\n', ("x.csv:2 is not CSV",)),
    "empty": ("x.csv", b"", ("x.csv has no rows",)),
    "header alone": ("x.tsv", b"text\tlabel\n", ("x.tsv has no rows",)),
    "no table": ("x.md", b"text,label\n", ("x.md is no table by its name", ".jsonl")),
    "NUL": ("x.csv", b"text,label\na\0,b\n", ("x.csv:2 has a NUL byte as character 2", "remove it")),
    "Latin-1": ("x.csv", "text,label\nblé très âgé,b\n".encode("latin-1"), ("not in the encoding", "--encoding")),
    "label in Latin-1": ("x.csv", "text,label\na,âgé\n".encode("latin-1"), ("x.csv:2", "label", "--encoding")),
    "long label": ("x.csv", b"text,label\na," + b"b" * 201 + b"\n", ("x.csv:2 has a label of 201", "at most 200")),
    "label with a control": ("x.csv", b"text,label\na,b\x07c\n", ("x.csv:2 has control characters in its label",)),
    "label of two lines": ("x.csv", b'text,label\na,"b\nc"\n', ("x.csv:2 has control characters in its label",)),
    "list": ("x.jsonl", b'{"text": "a", "label": ["b"]}\n', ("x.jsonl:1 has a list in field 'label'",)),
    "not JSON": ("x.jsonl", b'{"text": "a", "label": 1}\n{\n', ("x.jsonl:2 is not JSON",)),
    "one document": ("x.jsonl", b"[1]\n", ("x.jsonl is one JSON document",)),
    "one label": ("x.csv", b"text,label\na,b\nc,b\n", ("all 2 examples have the label 'b'", "--label")),
    "no label": ("x.csv", b"text,label\na,\n", ("no row has a text and a label",)),
    "nothing held out": ("x.csv", b"text,label\na,b\nc,d\n", ("split heldout has no example", "--seed")),
    "PDF": ("x.csv", b"%PDF-1.7\n", ("x.csv is a PDF",)),
    "damaged": ("x.csv.gz", gzip.compress(b"text,label\n" * 99)[:-9], ("x.csv.gz", "damaged")),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables(tmp_path: Path, case: str) -> None:
    name, content, words = BAD_TABLES[case]
    (tmp_path / name).write_bytes(content)
    refused(lambda: prepared(tmp_path, tmp_path / name), *words)
    assert not (tmp_path / "out").exists()


BAD_WORDS = {
    "builtin": (("--builtin", "--label", "l"), "--builtin has no labels"),
    "field": (("x.csv", "--label", "l", "--field", "t"), "--field does not go with --label"),
    "cut": (("x.csv", "--label", "l", "--cut", "always"), "--cut does not go with --label"),
    "plugins": (("x.csv", "--label", "l", "--plugins", "p"), "--plugins does not go with --label"),
    "pair alone": (("x.csv", "--pair", "p"), "--pair is for labelled texts: give --label COLUMN or --tags too"),
    "test alone": (("x.csv", "--test", 0.1), "--test is for labelled texts"),
    "no header alone": (("x.csv", "--no-header"), "--no-header is for labelled texts"),
    "a name without header": (("x.csv", "--label", "l", "--no-header", "--text", 1), "--label 'l' is no number"),
    "no text's number": (("x.csv", "--label", 1, "--no-header"), "--text 'text' is no number"),
    "empty": (("x.csv", "--label", ""), "--label '' names no column"),
    "some sides": (("train=x.csv", "y.csv", "--label", "l"), "some inputs have a side"),
    "two sides": (("train=x.csv", "--label", "l", "--split", "s"), "say the same twice"),
    "no training": (("test=x.csv", "--label", "l"), "no input is train=FILE"),
    "all": (("x.csv", "--label", "l", "--test", 0.9), "--heldout 0.1 and --test 0.9 leave nothing"),
    "test": (("x.csv", "--label", "l", "--test", 1.5), "--test 1.5 must be in [0, 1)"),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_command_lines(tmp_path: Path, case: str) -> None:
    words, line = BAD_WORDS[case]
    refused(lambda: run_prepare(*words, "--out", tmp_path / "out"), line, error=ConfigError)
    assert not (tmp_path / "out").exists()


# Sides


# who has published a split cuts it again by this function
PINNED = {"a": "heldout", "b": "train", "c": "train", "d": "test", "e": "train", "ü": "train", "two words": "train"}


def test_sides_are_of_the_source_alone_and_meet_their_fractions() -> None:
    names = [f"text {number}" for number in range(4000)]
    counts = Counter(side_of(name, 0, 0.2, 0.1) for name in names)
    for side, share in zip(SPLITS, (0.7, 0.2, 0.1), strict=True):
        assert abs(counts[side] - share * 4000) < 4 * math.sqrt(share * 4000)
    other = [side_of(name, 0, 0.1, 0.1) for name in names]
    assert [side == "test" for side in other] == [side_of(name, 0, 0.2, 0.1) == "test" for name in names]
    assert other != [side_of(name, 1, 0.1, 0.1) for name in names]
    assert [side_of(name, 3, 0.2, 0.2) for name in PINNED] == [*PINNED.values()]


@settings(max_examples=25)
@given(some.text(), some.integers(0, 9), some.floats(0, 0.49), some.floats(0, 0.49))
def test_a_larger_fraction_only_adds(source: str, seed: int, heldout: float, test: float) -> None:
    side = side_of(source, seed, heldout, test)
    assert (side == "test") == (side_of(source, seed, 0.0, test) == "test")
    if side == "heldout":
        assert side_of(source, seed, 0.5, test) == "heldout"


def test_the_digest_of_a_split_is_of_sets() -> None:
    a, b, c = (hashlib.sha256(name).digest() for name in (b"a", b"b", b"c"))
    one = split_digest({"train": [a, b], "heldout": [c], "test": []})
    assert one == split_digest({"train": [b, a, a], "heldout": [c], "test": []})
    assert one != split_digest({"train": [a], "heldout": [c, b], "test": []})
    assert one != split_digest({"train": [a, b], "heldout": [], "test": [c]})


# What is stored


def test_examples_come_back(reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = prepared(tmp_path, reviews)
    found.check_files()
    assert found.labels == ("neg", "pos") and found.splits == SPLITS and not found.has_pairs
    assert found.digest == hashlib.sha256((tmp_path / "out" / "catalog.json").read_bytes()).hexdigest()
    whole = [(text, "", label) for text, label in map(review, range(120))]
    for split in SPLITS:
        expected = [row for row in whole if side_of(row[0], 0, 0.1, 0.1) == split]
        examples = found.examples(split)
        assert texts(found, split) == expected and len(examples) == len(expected)
        assert examples.lengths.tolist() == [len(text) for text, _, _ in expected]
        assert [found.labels[label] for label in examples.targets.tolist()] == [label for _, _, label in expected]
        assert found.manifest.counts[split] == tuple(Counter(row[2] for row in expected)[name] for name in found.labels)
    ids, second, label = first = found.examples("train").read(0)
    assert isinstance(first, Example) and ids.dtype == np.int32 and (second, type(label)) == (0, int)
    with pytest.raises(ValueError):
        found.examples("train").targets[0] = 1


def test_pairs_know_where_their_second_text_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = [(f"is it {n}?", f"it is {n}" if n else "", str(n % 2)) for n in range(40)]
    path = write_csv(tmp_path / "a.csv", table, ("text", "pair", "label"))
    found = prepared(tmp_path, path, "--pair", "pair", "--heldout", 0.2)
    assert found.has_pairs
    assert sorted(row for split in SPLITS for row in texts(found, split)) == sorted(table)


def test_labels_that_are_numbers_are_in_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_csv(tmp_path / "a.csv", [(f"t{n}", str(n % 12)) for n in range(300)])
    assert prepared(tmp_path, path).labels == tuple(map(str, range(12)))
    assert labelled.column_types(256, False)["labels"] == np.uint8
    assert labelled.column_types(257, False)["labels"] == np.uint16


def test_equal_sources_stand_on_one_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = [(f"user{n // 5}", f"text {n}", str(n % 2)) for n in range(300)]
    path = write_csv(tmp_path / "a.csv", table, ("user", "text", "label"))
    found = prepared(tmp_path, path, "--source", "user", "--test", 0.2)
    users = {text: user for user, text, _ in table}
    sides = [{users[text] for text, _, _ in texts(found, split)} for split in SPLITS]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2] and all(sides)
    report = capsys.readouterr().out
    assert "leak" not in report and "cut by column 'user' with seed 0, digest" in report


def test_sides_by_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("train", "dev", "Test", "training", "validation", "valid")
    table = [(f"text {n}", str(n // 6 % 2), names[n % 6]) for n in range(60)]
    path = write_csv(tmp_path / "a.csv", table, ("text", "label", "fold"))
    found = prepared(tmp_path, path, "--split", "fold")
    assert [len(found.examples(split)) for split in SPLITS] == [20, 30, 10]
    assert "split       as given, digest" in capsys.readouterr().out
    write_csv(path, [*table, ("x", "0", "rest")], ("text", "label", "fold"))
    refused(lambda: prepared(tmp_path, path, "--split", "fold"), "a.csv:62 has 'rest' in column 'fold'", "heldout, ")


def test_sides_by_files_and_what_stands_on_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = tmp_path / "a.csv", tmp_path / "b.csv"
    write_csv(train, [review(n) for n in range(40)])
    write_csv(test, [review(n) for n in (3, 4, *range(50, 60))])
    found = prepared(tmp_path, f"train={train}", f"test={test}")
    assert found.splits == ("train", "test") and len(found.examples("test")) == 12, "nothing is moved"
    assert f"leak        2 texts stand on two sides, not moved: {train}:5 and {test}:2\n" in capsys.readouterr().out
    refused(lambda: found.examples("heldout"), "no split 'heldout', it has train, test")
    found = prepared(tmp_path, f"train={train}", f"test={test}", "--heldout", 0.3)
    held = {text for text, _, _ in texts(found, "heldout")}
    assert held == {text for text, _ in map(review, range(40)) if side_of(text, 0, 0.3, 0.0) == "heldout"}
    assert "as given, heldout cut by text with seed 0" in capsys.readouterr().out
    refused(
        lambda: prepared(tmp_path, f"train={train}", f"test={test}", "--test", 0.1), "--test 0.1", "rows of test are"
    )


def test_labels_that_training_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = tmp_path / "a.csv", tmp_path / "b.csv"
    write_csv(train, [review(n) for n in range(40)])
    write_csv(test, [review(50), ("so so", "mixed"), ("hm", "none")])
    given = (f"train={train}", f"heldout={test}")
    refused(lambda: prepared(tmp_path, *given), f"label 'mixed' of {test}:3, which is on side heldout", "1 more labels")
    write_csv(test, [("so so", "")])
    refused(lambda: prepared(tmp_path, *given), "split heldout has no row with a text and a label", "leave it out")


def test_too_many_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlm_mpi.data.labelling.MOST_LABELS", 3)
    path = write_csv(tmp_path / "a.csv", [(f"t{n}", f"l{n}") for n in range(9)])
    refused(lambda: prepared(tmp_path, path), "a.csv:5 has label number 4, at most 3")


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = [review(n) for n in range(100)]
    table += [review(5), review(6), (" good work, number 5 ", "pos"), ("good work\x07, number 9", "pos")]
    table += [("", "pos"), ("\n", "neg"), ("who knows", ""), (review(9)[0], "neg")]
    path = write_csv(tmp_path / "a.csv", table)
    run_prepare(path, "--out", tmp_path / "out", "--label", "label", "--vocab", 300)
    found, report = Labelled.open(tmp_path / "out"), capsys.readouterr().out.splitlines()
    rest = found.manifest.cleaning
    assert (rest.rows, rest.duplicates, rest.empty, rest.unlabelled, rest.conflicts) == (108, 3, 2, 1, 1)
    assert (rest.control_characters, rest.leaks, rest.leaking_sources) == (1, 0, 0)
    kept = sum(map(sum, found.manifest.counts.values()))
    assert report[0] == f"rows        108 read, {kept} kept" and kept == 102
    assert report[1:4] == [
        "removed     3 exact duplicates (text and label), 2 empty texts",
        f"skipped     1 rows without a label, first: {path}:109",
        "repaired    0 invalid UTF-8, 1 control characters",
    ]
    assert report[4].startswith("conflicts   1 texts have several labels, all kept: ")
    few, many = found.manifest.counts["train"]
    assert report[5] == f"labels      2, largest : smallest is {many / few:.1f} : 1 in train"
    assert report[6].startswith(f"  pos       train {many}, heldout ")
    lengths = np.concatenate([found.examples(split).lengths for split in SPLITS])
    stated = found.manifest.lengths
    assert (stated.median, stated.longest) == (np.quantile(lengths, 0.5, method="inverted_cdf"), lengths.max())
    assert stated.most == np.quantile(lengths, 0.95, method="inverted_cdf")
    assert report[8].startswith(f"lengths     median {stated.median} tokens, 95 % at most {stated.most}, longest ")
    assert report[9].startswith("tokenizer   bpe, vocabulary ") and report[9].endswith(", trained on the training side")
    assert report[-2] == f"split       heldout and test cut by text with seed 0, digest {found.split_digest[:12]}"
    assert report[-1].endswith(f" s, content {found.content[:12]}")


def test_many_labels_are_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_csv(tmp_path / "a.csv", [(f"t{n}", f"l{n % 25}") for n in range(1000)])
    prepared(tmp_path, path)
    report = capsys.readouterr().out
    assert report.count("\n  l") == 20 and "\n  5 more labels with at most " in report


def test_the_tokenizer_learns_from_training_rows_alone(reviews: Path, tmp_path: Path, capsys) -> None:
    run_prepare(reviews, "--out", tmp_path / "out", "--label", "label", "--vocab", 280)
    found = Labelled.open(tmp_path / "out")
    train = [text for text, _ in map(review, range(120)) if side_of(text, 0, 0.1, 0.1) == "train"]
    assert found.tokenizer().hash == Tokenizer.train(train, 280).hash


def test_content_is_of_examples_however_they_are_stored(reviews: Path, tmp_path: Path, capsys) -> None:
    one = prepared(tmp_path, reviews)
    whole = hashlib.sha256(one.tokenizer().hash.encode() + b'["neg","pos"]')
    for split in SPLITS:
        part = hashlib.sha256()
        for text, _, label in texts(one, split):
            part.update(hashlib.sha256(np.array([label == "pos", 0, *text.encode()], "<u4").tobytes()).digest())
        whole.update(part.digest())
    assert one.content == whole.hexdigest()
    many = prepared(tmp_path, reviews, "--shard-mib", 0.0005)
    assert len(many.manifest.shards) > 5 and one.digest != many.digest
    assert (one.content, one.split_digest) == (many.content, many.split_digest)
    for split in SPLITS:
        assert texts(many, split) == [
            (text, "", label) for text, label in map(review, range(120)) if side_of(text, 0, 0.1, 0.1) == split
        ]
    seeded = prepared(tmp_path, reviews, "--seed", 1)
    assert seeded.content != one.content and seeded.split_digest != one.split_digest


def test_the_command_is_written_down_and_makes_the_same_again(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.tsv").write_text("".join(f"{n % 2}\ttext {n}\tmore {n}\n" for n in range(80)))
    given = f"{tmp_path}/a.tsv --out {tmp_path}/out --vocab 300 --heldout 0.05 --label 1 --text 2 --pair 3 --test 0.2"
    run_prepare(*given.split(), "--no-header")
    first = contents(tmp_path / "out")
    command = json.loads(first["prepared.json"])["command"]
    assert command == f"mlm-mpi prepare {given.replace(' --out', ' --no-header --out')}"
    run_prepare(*shlex.split(command)[2:])
    assert contents(tmp_path / "out") == first


def test_folders_of_both_kinds_replace_each_other_and_name_each_other(
    reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prepared(tmp_path, reviews)
    refused(lambda: Catalog.open(out), "catalog.json is of labelled texts", "set task.kind")
    write_texts(tmp_path / "in", 30)
    run_prepare(tmp_path / "in", "--out", out, "--tokenizer", "bytes")
    refused(lambda: Labelled.open(out), "catalog.json is of a corpus without labels", "--label COLUMN", "data.dir")
    assert "replaced" in capsys.readouterr().out and not list(out.glob("test-*"))
    prepared(tmp_path, reviews)
    assert len(list(out.iterdir())) == 6
    refused(lambda: Labelled.open(tmp_path / "none"), "no labels of texts at", "--label COLUMN")
    refused(lambda: Labelled.open("", "x.y"), "x.y is empty")


def test_what_fails_leaves_the_earlier_texts(reviews: Path, tmp_path: Path, capsys) -> None:
    prepared(tmp_path, reviews)
    before = contents(tmp_path / "out")
    (tmp_path / "x.csv").write_text("text,label\na,b\n")
    refused(lambda: prepared(tmp_path, tmp_path / "x.csv"), "all 1 examples")
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "mine.txt").write_text("mine")
    refused(lambda: prepared(tmp_path, reviews), "'mine.txt'")


def test_a_damaged_shard_is_refused(reviews: Path, tmp_path: Path, capsys) -> None:
    found = prepared(tmp_path, reviews)
    path = next((tmp_path / "out").glob("train-*"))
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    refused(lambda: found.examples("train"), f"shard {path} is damaged")
    path.write_bytes(content[:-1])
    refused(found.check_files, f"shard {path} has", "bytes, the catalog says")
    path.unlink()
    refused(found.check_files, f"shard {path}", "is missing")


ODD = {
    "content": "digest 'x'", "split": "digest 'x'", "labels": "2 labels, 1 of them", "counts": "its counts of 'train'",
    "file": "no plain file name", "heldout": "heldout 1.5", "format": "has format labelled-9",
}  # fmt: skip
CHANGES = {
    "content": {"content": "x"}, "split": {"split": "x"}, "labels": {"labels": ["a", "a"]}, "heldout": {"heldout": 1.5},
    "format": {"format": "labelled-9"}, "counts": {"counts": {"train": [1, 1]}},
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_a_catalog_that_lies_is_refused(reviews: Path, tmp_path: Path, case: str, capsys) -> None:
    prepared(tmp_path, reviews)
    path = tmp_path / "out" / "catalog.json"
    table = json.loads(path.read_text()) | CHANGES.get(case, {})
    if case == "file":
        table["tokenizer"]["file"] = "../x"
    path.write_text(json.dumps(table))
    refused(lambda: Labelled.open(tmp_path / "out"), ODD[case])


@pytest.mark.parametrize(
    ("labels", "seconds", "line"), [([0, 2], [0, 0], "has label 2 of 2"), ([0, 1], [0, 3], "behind")]
)
def test_a_shard_that_lies_is_refused(reviews: Path, tmp_path: Path, labels, seconds, line, capsys) -> None:
    found = prepared(
        tmp_path,
        write_csv(tmp_path / "p.csv", [(*review(n), "x") for n in range(60)], ("text", "label", "p")),
        "--pair",
        "p",
    )
    columns = {"labels": np.array(labels, "u1"), "seconds": np.array(seconds, "u4")}
    ids = [np.arange(3), np.arange(3)]
    entry = shards.write_shard(
        tmp_path / "out", "train-00009", "train", ids, 6, 6, found.tokenizer().hash, 257, columns
    )
    refused(lambda: found._read(entry), line)
