"""Labelled words: sentences line by line, what `prepare --tags` stores, batches, figures of spans, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from corpora import contents, run_prepare

from mlm_mpi.__main__ import main
from mlm_mpi.config.reader import load
from mlm_mpi.data import words
from mlm_mpi.data.labelled import Labelled
from mlm_mpi.data.sentences import Sentence, Sentences
from mlm_mpi.data.tagged import TaggedTexts, batch_of
from mlm_mpi.data.texts import Noise, balanced
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.data.tokenizing import encode_words
from mlm_mpi.data.words import WordColumns
from mlm_mpi.errors import DataError
from mlm_mpi.figures import spans
from mlm_mpi.figures.lookup import looked_up
from mlm_mpi.figures.spans import Span
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks.tagging import Tagging

CONLL = "EU NNP B-ORG\nrejects VBZ O\n\n-DOCSTART- X O\n\nGerman JJ B-MISC\ncall NN O\n. . O\n"


def read(path: Path, *columns: object) -> list[tuple]:
    return [(s.place.rpartition("/")[2], s.words, s.labels, s.empties) for s in words.read(path, WordColumns(*columns))]


# Sentences


def test_lines_of_columns(tmp_path: Path) -> None:
    path = tmp_path / "eng.train"
    path.write_text("\n\n" + CONLL.replace("\n\n-", "\n \t\n\n-"))
    assert read(path) == [
        ("eng.train:1", (), (), 2),
        ("eng.train:3", ("EU", "rejects"), ("B-ORG", "O"), 2),
        ("eng.train:7", ("-DOCSTART-",), ("O",), 1),
        ("eng.train:9", ("German", "call", "."), ("B-MISC", "O", "O"), 0),
    ]
    assert read(path, "2", "1")[1][1:3] == (("NNP", "VBZ"), ("EU", "rejects"))
    assert read(path, None, None, False)[1][1:3] == (("EU", "rejects"), ())
    path.write_text("New York\tB-LOC\r\n\u00a0a\tO\n")
    assert read(path)[0][1] == ("New York", "a"), "between tabs a word may hold blanks"


def test_treebanks_have_comments_and_ranges(tmp_path: Path) -> None:
    path = tmp_path / "some.conllu"
    path.write_text("# text = zum Haus\n1-2\tzum\t_\n1\tzu\tADP\n2\tdem\tDET\n3\tHaus\tNOUN\n3.1\tx\t_\n\n")
    assert read(path, "2", "3") == [("some.conllu:3", ("zu", "dem", "Haus"), ("ADP", "DET", "NOUN"), 1)]


def test_json_lines_of_lists(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"tokens": ["a\\tb", "\\u0007"], "labels": [1, "x"]}\n{"tokens": [], "labels": []}\n')
    assert read(path) == [("some.jsonl:1", ("a b", "\ufffd"), ("1", "x"), 1), ("some.jsonl:2", (), (), 1)]


BAD = {
    "too few columns": ("x.conll", "a O\nb\n", "x.conll:2 has 1 columns, the first line has 2: mend or remove it"),
    "no labels": ("x.conll", "a\nb\n", "x.conll:1 has 1 column, and a word and its label are two"),
    "comments": ("x.conll", "# text = a\n1 a X\n", "x.conll:2 has 3 columns, the first line has 4"),
    "no words": ("x.conll", "\n\n", "x.conll has no words"),
    "empty": ("x.conll", "", "x.conll has no words"),
    "no label": ("x.conll", "a\tO\nb\t\n", "x.conll:2 has no label for the word 'b'"),
    "unequal lists": ("x.jsonl", '{"tokens": ["a", "b"], "labels": ["O"]}\n', "x.jsonl:1 has 2 words in 'tokens' and"),
    "no field": ("x.jsonl", '{"tokens": ["a"], "tags": ["O"]}\n', "has no field 'labels', it has 'tags, tokens'"),
    "no list": ("x.jsonl", '{"tokens": "a b", "labels": ["O"]}\n', "x.jsonl:1 has no list in field 'tokens'"),
    "null label": ("x.jsonl", '{"tokens": ["a"], "labels": [null]}\n', "x.jsonl:1 has no label for the word 'a'"),
    "nested": ("x.jsonl", '{"tokens": [["a"]], "labels": ["O"]}\n', "x.jsonl:1 has a list in field 'tokens'"),
    "one label": ("x.conll", "a O\n\nb O\n", "words of all 2 examples have the label 'O'"),
    "unseen label": ("heldout=x.conll", "a B-X\n", "label 'B-X' of", "side heldout, has no row on side train"),
    "endless": ("x.conll", "a O\n" * 30, "x.conll:21 is word number 21 of a sentence"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line_and_leave_nothing(tmp_path: Path, capsys, monkeypatch, case: str) -> None:
    monkeypatch.setattr(words, "LONGEST_SENTENCE", 20)
    name, content, *said = BAD[case]
    side, _, file = name.rpartition("=")
    (tmp_path / file).write_text(content)
    (tmp_path / "good.conll").write_text(CONLL)
    given = [f"{side}={tmp_path / file}", f"train={tmp_path / 'good.conll'}"] if side else [str(tmp_path / file)]
    before = contents(tmp_path)
    code = main(["prepare", *given, "--out", str(tmp_path / "out"), "--tags", "--tokenizer", "bytes"])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and all(text in err for text in said), err
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--split", "x"), "--split does not go with --tags"),
        (("--no-header",), "--no-header does not go with --tags"),
        (("--label", "x"), "--label is 'x': give --label 1, 2"),
        (("--label", "7"), "3 columns, and --label is 7"),
        (("--text", "2", "--label", "2"), "--text and --label are both column '2'"),
        (("--builtin",), "leave out --tags"),
    ],
)
def test_bad_arguments(tmp_path: Path, capsys, more: tuple[str, ...], said: str) -> None:
    (tmp_path / "x.conll").write_text(CONLL)
    assert main(["prepare", str(tmp_path / "x.conll"), "--out", str(tmp_path / "out"), "--tags", *more]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1, err


# What is stored


@pytest.fixture
def stored(tmp_path: Path, capsys) -> Labelled:
    (tmp_path / "train").write_text(CONLL + "\n" + CONLL)
    (tmp_path / "test").write_text("German B-MISC\nEU B-ORG\n")
    given = (f"train={tmp_path / 'train'}", f"test={tmp_path / 'test'}")
    run_prepare(*given, "--out", tmp_path / "out", "--tags", "--tokenizer", "bytes")
    return Labelled.open(tmp_path / "out", kind="words")


def test_what_is_stored_is_what_was_read(stored: Labelled, capsys) -> None:
    tokenizer, train, test = stored.tokenizer(), stored.sentences("train"), stored.sentences("test")
    assert stored.labels == ("B-MISC", "B-ORG", "O") and stored.splits == ("train", "test")
    assert stored.manifest.counts == {"train": (2, 2, 6), "test": (1, 1, 0)}
    assert len(train) == 4 and stored.manifest.cleaning.duplicates == 2, "kept: figures are of all sentences"
    assert [tokenizer.decode(ids.tolist()) for ids in test.words()] == ["German", " EU"]
    assert test.begins().tolist() == [True, False] and test.targets.tolist() == [0, 1]
    ids, tags = train.read(0)
    assert tokenizer.decode(ids.tolist()) == "EU rejects"
    assert dict(enumerate(tags.tolist())) | {0: 1, 2: 2} == dict(enumerate(tags.tolist())) and (tags >= 0).sum() == 2
    assert len(test.words()) == len(test.targets) and train.begins().sum() == 4
    again = (stored.folder.parent / "out").joinpath("prepared.json").read_text()
    assert "--tags" in json.loads(again)["command"]


def test_equal_words_have_equal_bytes_and_the_other_kind_is_named(stored: Labelled, tmp_path: Path, capsys) -> None:
    before = {path.name: path.read_bytes() for path in stored.folder.iterdir() if path.name != "prepared.json"}
    lines = [{"w": ["EU", "rejects"], "l": ["B-ORG", "O"]}, {"w": ["German", "call", "."], "l": ["B-MISC", "O", "O"]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines * 2))
    (tmp_path / "test.jsonl").write_text('{"w": ["German", "EU"], "l": ["B-MISC", "B-ORG"]}\n')
    given = (f"train={tmp_path / 'train.jsonl'}", f"test={tmp_path / 'test.jsonl'}", "--text", "w", "--label", "l")
    run_prepare(*given, "--out", stored.folder, "--tags", "--tokenizer", "bytes")
    assert {path.name: path.read_bytes() for path in stored.folder.iterdir() if path.name != "prepared.json"} == before
    with pytest.raises(DataError, match='has labels of words, not labels of texts: set task.kind = "tagging"'):
        Labelled.open(stored.folder)


def test_words_have_the_tokens_that_they_have_in_a_text() -> None:
    text = "the cat sat on the mat , the cat ."
    tokenizer = Tokenizer.train([text] * 20, 300)
    ((ids, begins), (nothing, none)) = encode_words(tokenizer, [text.split(), []])
    assert ids.tolist() == tokenizer.encode(text) and len(begins) == 10 and not len(nothing) and not len(none)
    assert [tokenizer.decode([int(ids[place])]).strip()[:1] for place in begins] == [word[0] for word in text.split()]


# Batches


def three() -> Sentences:
    """Of 4, 1 and 6 tokens; their words begin at 0, 2; 0; 0, 1, 5."""
    tags = np.array([1, 0, 2, 0, 1, 3, 1, 0, 0, 0, 2], np.uint8)
    return Sentences(np.arange(10, 21, dtype=np.uint8), np.array([0, 4, 5, 11]), tags)


def test_a_batch_points_at_the_first_token_of_each_word_within_the_context() -> None:
    made = TaggedTexts(three(), 6, 9).batch([0, 1, 2], 0, 0)
    assert made.inputs["ids"][0].tolist() == [9, 14, 9, 9, 10, 11, 12, 13, 9, 9, 15, 16, 17, 18, 9, 9]
    assert made.texts == (3, 9, 15) and made.count == 5
    assert made.targets["at"].tolist() == [1, 4, 6, 10, 11] and made.targets["classes"].tolist() == [0, 0, 1, 2, 0]
    assert made.targets["begins"].tolist() == [True, True, False, True, False]
    assert three().cut(6) == (1, 1, 8) and three().cut(8) == (0, 0, 8)
    assert "weights" not in made.targets
    weighed = TaggedTexts(three(), 6, 9, weights=balanced(three().targets, 3)).batch([0, 1, 2], 0, 0)
    rare, frequent = 2, 6 / (3 * 3)  # of six words three have label 0, two label 1, one label 2
    assert weighed.targets["weights"].tolist() == pytest.approx([frequent, frequent, 1, rare, frequent])
    hidden = TaggedTexts(three(), 8, 9, Noise(0.0, 0.5, 1)).batch([2, 0], 3, 0)
    assert hidden.inputs["hidden"].any() and not hidden.inputs["hidden"][0, 0]


def test_labels_are_balanced_in_training_alone(tmp_path: Path) -> None:
    path = tmp_path / "some.tsv"
    path.write_text("".join(f"word{number}\tO\nname{number}\tB\nthing{number}\tO\n\n" for number in range(20)))
    run_prepare(path, "--out", tmp_path / "out", "--tags", "--tokenizer", "bytes", "--heldout", 0.3, "--test", 0)
    words = ["task.kind=tagging", "model.kind=bert", "model.context=64", f"data.dir={tmp_path / 'out'}"]
    for kind, expected in (("equal", None), ("balanced", {0: 1.5, 1: 0.75})):  # labels B and O
        task = Tagging(load(None, [*words, f"task.weights={kind}"]), Plugins())
        made = task.samples("train").batch([0, 1], 0, 0).targets
        found = dict(zip(made["classes"].tolist(), made["weights"].tolist(), strict=True)) if expected else None
        assert found == expected and ("weights" in made) == bool(expected)
        assert "weights" not in task.samples("heldout").batch([0], 0, 0).targets


def test_a_sentence_alone_is_what_it_is_among_others() -> None:
    one = batch_of([Sentence(np.array([5, 6], np.int32), np.array([1, -1], np.int32))], 8, 0)
    assert one.targets["at"].tolist() == [1] and one.inputs["ids"][0, :4].tolist() == [0, 5, 6, 0]


# Figures


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ("O B-A I-A O", {Span(1, 3, "A")}),
        ("B-A B-A I-B I-B", {Span(0, 1, "A"), Span(1, 2, "A"), Span(2, 4, "B")}),
        ("I-A I-A O I-A", {Span(0, 2, "A"), Span(3, 4, "A")}),
        ("B-A-x I-A-x", {Span(0, 2, "A-x")}),
        ("O O", set()),
    ],
)
def test_spans_are_those_of_conlleval(labels: str, found: set[Span]) -> None:
    assert spans.spans(labels.split(), [True] + [False] * (len(labels.split()) - 1)) == found


def test_a_span_ends_with_its_sentence_and_figures_are_of_whole_spans() -> None:
    assert spans.spans(["B-A", "I-A"], [True, True]) == {Span(0, 1, "A"), Span(1, 2, "A")}
    labels = ["B-A", "B-B", "I-A", "O"]
    assert spans.mark_spans(labels) and not spans.mark_spans(["O"]) and not spans.mark_spans(["NOUN", "O"])
    wanted, found = [0, 2, 3, 1, 3], [0, 3, 3, 1, 1]  # A of two words, B; A of one, B, B
    outcomes = np.stack([wanted, found, *np.ones((2, 5)), [1, 0, 0, 1, 0]], axis=1)
    told = spans.figures(outcomes, labels)
    assert (told["span_precision"], told["span_recall"], told["span_f1"]) == (1 / 3, 1 / 2, 2 / 5)
    assert [(row["kind"], row["spans"], row["f1"]) for row in told["spans"]] == [("A", 1, 0.0), ("B", 1, 2 / 3)]
    assert spans.lines(told)[0] == "spans               F1 0.4000, precision 0.3333, recall 0.5000, 2 spans"


def test_a_table_of_words() -> None:
    found = looked_up(["a", "a", "b", "b", "c"], np.array([1, 1, 2, 0, 2]), ["a", "b", "c", "new"])
    assert found.tolist() == [1, 0, 2, 1]
