"""Questions: files of SQuAD's, what `prepare --squad` stores, windows, the head, figures worked by hand, refusals."""

import gzip
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from corpora import contents, run_prepare

from mlm_mpi.__main__ import main
from mlm_mpi.commands.predict import _answer_line
from mlm_mpi.data import builtin, squad, templates
from mlm_mpi.data.labelled import Labelled
from mlm_mpi.data.questions import Cut, Question, Span, Window, best_span
from mlm_mpi.data.squad import Answer
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.data.tokenizing import bounds_of, characters_of, tokens_of
from mlm_mpi.data.windows import Windows, batch_of, seen
from mlm_mpi.errors import DataError
from mlm_mpi.figures import answers
from mlm_mpi.layers.base import Context
from mlm_mpi.layers.spans import SpanHead

ROME = "Rome was not built in a day. Rome burnt for six days."


def asked(context: str, *qas: dict) -> dict:
    return {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(qas)}]}]}


def qa(question: str, *given: tuple[str, int], **more: object) -> dict:
    found = [{"text": text, "answer_start": start} for text, start in given]
    return {"id": question[:3], "question": question, "answers": found} | more


def write(path: Path, table: object) -> Path:
    path.write_text(json.dumps(table))
    return path


# Files


def test_answers_are_found_where_they_stand(tmp_path: Path) -> None:
    file = asked(
        ROME, qa("Where?", ("Rome", 0)), qa("Nearest?", ("Rome", 25)), qa("Blanks?", (" day. ", 23)),
        qa("Lost?", ("Paris", 3)), qa("Never?", is_impossible=True), qa("Far?", ("six days", 10**9), ("days", -5)),
    )  # fmt: skip
    found = {one.id: one for one in squad.read(write(tmp_path / "x.json", file))}
    assert found["Whe"].answers == (Answer(0, "Rome"),) and found["Whe"].moved == 0
    assert found["Nea"].answers == (Answer(29, "Rome"),) and found["Nea"].moved == 1
    assert found["Bla"].answers == (Answer(24, "day."),) and found["Bla"].moved == 0
    assert found["Los"].answers == () and found["Los"].lost == 1
    assert found["Nev"].answers == () and found["Nev"].impossible
    assert found["Far"].answers == (Answer(44, "six days"), Answer(48, "days")) and found["Far"].moved == 2


OFFICIAL_LAYOUT = {  # of SQuAD 2.0's files, all of their fields
    "version": "v2.0",
    "data": [
        {
            "title": "Rome",
            "paragraphs": [
                {
                    "qas": [
                        {
                            "question": "How long did Rome burn?",
                            "id": "56be85543aeaaa14008c9063",
                            "answers": [
                                {"text": "six days", "answer_start": 44}, {"text": "for six days", "answer_start": 40},
                            ],
                            "is_impossible": False,
                        },
                        {
                            "plausible_answers": [{"text": "a day", "answer_start": 22}],
                            "question": "Who built Rome?",
                            "id": "5a8d7bf7df8bba001a0f9ab1",
                            "answers": [],
                            "is_impossible": True,
                        },
                    ],
                    "context": ROME,
                },
            ],
        },
    ],
}  # fmt: skip


def test_the_layout_of_squad_2_is_read(tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "train-v2.0.json", OFFICIAL_LAYOUT)
    found = {one.id: one for one in squad.read(path)}
    assert found["56be85543aeaaa14008c9063"].answers == (Answer(44, "six days"), Answer(40, "for six days"))
    nobody = found["5a8d7bf7df8bba001a0f9ab1"]
    assert nobody.impossible and nobody.answers == (), "a plausible answer is none"
    run_prepare(path, "--out", tmp_path / "out", "--squad", "--tokenizer", "bytes", "--heldout", 0, "--test", 0)
    train = Labelled.open(tmp_path / "out", kind="questions").questions("train")
    assert train.starts.tolist() == [44, 0] and train.stops.tolist() == [52, 0]
    assert "questions   2 read, 2 kept, 1 have no answer on purpose" in capsys.readouterr().out


def test_cleaning_moves_answers_along(tmp_path: Path) -> None:
    context = "\ufeffOne\r\ntwo\x07 e\u0301t three"
    file = asked(context, qa("What?", ("three", context.index("three"))))
    [one] = squad.read(write(tmp_path / "x.json", file))
    assert one.second == "One\ntwo \u00e9t three" and one.answers == (Answer(11, "three"),) and one.moved == 0


def test_lone_surrogates_are_repaired_and_counted_once(tmp_path: Path, capsys) -> None:
    """In JSON they are escapes, and no text."""
    context = ROME * 9 + " \ud800five\x07 days"
    file = asked(context, qa("How long?", ("\ud800five", context.index("\ud800"))), qa("Wh\udc00?", ("Rome", 0)))
    path = write(tmp_path / "x.json", file)
    first, second = squad.read(path)
    assert first.second.endswith(" \ufffdfive days") and first.answers == (Answer(len(ROME) * 9 + 1, "\ufffdfive"),)
    assert second.text == "Wh\ufffd?" and (first.replaced, first.controls, second.replaced) == (1, 1, 1)
    run_prepare(path, "--out", tmp_path / "out", "--squad", "--tokenizer", "bytes", "--heldout", 0, "--test", 0)
    assert "repaired    2 invalid UTF-8, 1 control characters" in capsys.readouterr().out
    write(path, asked("x\ud800y", qa("What?", ("x", 0))))
    with pytest.raises(DataError, match="not in the encoding it was read with \\(1 of 8 characters\\)"):
        list(squad.read(path))


def test_equal_ids_are_told(tmp_path: Path, capsys) -> None:
    rows = [qa("Where?", ("Rome", 0), id=name) for name in ("a", "a", "", "", "\ud800b", "a")]
    path = write(tmp_path / "x.json", asked(ROME, *rows))
    assert [one.again for one in squad.read(path)] == [False, True, False, False, False, True]
    assert [one.id for one in squad.read(path)][4:] == ["\ud800b", "a"], "as they came"
    run_prepare(path, "--out", tmp_path / "out", "--squad", "--tokenizer", "bytes", "--heldout", 0, "--test", 0)
    said = f"ids         2 questions have the id of an earlier one, first: {path}: question 2 (a)\n"
    assert said in capsys.readouterr().out


def test_an_id_is_told_back_as_it_came() -> None:
    """To SQuAD's program, which finds a question by it; JSON lines cannot hold a lone surrogate."""
    for name in ("56be4db0", "\ud800b", "b\x01", "ü"):
        one = squad.Question("x:1", "Where?", ROME, id=name)
        line = _answer_line(SimpleNamespace(squad=True, json=False), one, [0.0, 2.0, 0.5], 1)
        assert json.loads("{" + line + "}") == {name: ROME[:2]} and line.encode()
        line = _answer_line(SimpleNamespace(squad=False, json=True), one, [0.0, 2.0, 0.5], 1)
        assert json.loads(line)["id"] == name.replace("\ud800", "?")


def test_new_questions_are_read_from_both_formats(tmp_path: Path) -> None:
    write(tmp_path / "x.json", asked(ROME, {"question": " Where? ", "id": 7}))
    (tmp_path / "y.jsonl").write_text(json.dumps({"question": "Where?", "context": ROME, "id": "7"}) + "\n")
    (tmp_path / "x.json.gz").write_bytes(gzip.compress((tmp_path / "x.json").read_bytes()))
    rows = [[(one.text, one.second, one.id) for one in squad.read_new(tmp_path / name)] for name in
            ("x.json", "y.jsonl", "x.json.gz")]  # fmt: skip
    assert rows == [[("Where?", ROME, "7")]] * 3


@pytest.mark.parametrize("text", ["Grüße aus Köln \u20ac5 — né", "a  b\tc\n d", "\U0001f600 ok"])
def test_tokens_and_characters_of_an_answer(text: str) -> None:
    for tokenizer in (Tokenizer.bytes(), Tokenizer.train([text * 3, ROME], 300)):
        ids = np.array(tokenizer.encode(text))
        bounds = bounds_of(tokenizer, ids, text)
        for start in range(len(text)):
            for stop in range(start + 1, len(text) + 1):
                first, last = tokens_of(text, bounds, start, stop)
                assert bounds[first] <= len(text[:start].encode()) < bounds[first + 1]
                assert bounds[last - 1] < len(text[:stop].encode()) <= bounds[last]
                begin, end = characters_of(text, bounds, first, last)
                bare = text[start:stop].strip()
                assert bare in text[begin:end] and text[begin:end] == text[begin:end].strip()
    assert (
        tokens_of(text, bounds, 0, 0) == (0, 0) and bounds_of(Tokenizer.train_words([text] * 2, 9), ids, text) is None
    )


# What is stored


@pytest.fixture
def stored(tmp_path: Path, capsys) -> Labelled:
    file = asked(
        ROME, qa("How long did it burn?", ("six days", 44), ("six", 44)), qa("What was built?", ("Rom", 0)),
        qa("What was built?", ("Rom", 0)), qa("Who?", is_impossible=True), qa("Lost?", ("Paris", 3)), qa("No?"),
        qa(" "),
    )  # fmt: skip
    train, dev = write(tmp_path / "train.json", file), write(tmp_path / "dev.json", asked("A b.", qa("B?", ("b", 2))))
    assert run_prepare(f"train={train}", f"heldout={dev}", "--out", tmp_path / "out", "--squad", "--vocab", 280) == 0
    return Labelled.open(tmp_path / "out", kind="questions")


def test_what_is_stored_is_what_was_read(stored: Labelled, capsys) -> None:
    decode, train = stored.tokenizer().decode, stored.questions("train")
    read = [train.read(number) for number in range(len(train))]
    assert [decode(one.ids.tolist()) for one in read] == ["How long did it burn?", "What was built?", "Who?"]
    assert {decode(one.context.tolist()) for one in read} == {ROME}
    assert [[decode(ids.tolist()) for ids in one.answers] for one in read] == [["six days", "six"], ["Rom"], []]
    spans = [decode(one.context[one.start : one.stop].tolist()).strip() for one in read]
    assert spans[0] == "six days" and spans[1] in ("Rom", "Rome") and spans[2] == ""
    found = stored.manifest.cleaning
    assert (found.rows, found.duplicates, found.impossible, found.lost, found.unfound) == (8, 1, 1, 1, 1)
    assert (found.unlabelled, found.unpaired, found.moved) == (1, 1, 0) and stored.manifest.counts["train"] == (3,)
    assert "--squad" in (stored.folder / "prepared.json").read_text()


def test_equal_questions_have_equal_bytes(stored: Labelled, tmp_path: Path, capsys) -> None:
    again = [f"train={tmp_path / 'train.json'}", f"heldout={tmp_path / 'dev.json'}", "--squad", "--vocab", 280]
    run_prepare(*again, "--out", tmp_path / "two")
    first, second = contents(stored.folder), contents(tmp_path / "two")
    assert {k: v for k, v in first.items() if k != "prepared.json"} == {
        k: v for k, v in second.items() if k != "prepared.json"
    }
    assert "questions   8 read, 4 kept, 1 have no answer on purpose" in capsys.readouterr().out


def test_sides_are_cut_by_context(tmp_path: Path, capsys) -> None:
    paragraphs = [
        {"context": f"The name of number {n} is n{n}.", "qas": [qa(f"{w}?", (f"n{n}", 24)) for w in "ab"]}
        for n in range(40)
    ]
    write(tmp_path / "x.json", {"data": [{"paragraphs": paragraphs}]})
    run_prepare(tmp_path / "x.json", "--out", tmp_path / "out", "--squad", "--tokenizer", "bytes", "--heldout", 0.3)
    told = capsys.readouterr().out
    stored = Labelled.open(tmp_path / "out", kind="questions")
    sides = {split: stored.questions(split) for split in stored.splits}
    texts = {split: {some.read(k).context.tobytes() for k in range(len(some))} for split, some in sides.items()}
    assert sum(map(len, texts.values())) == 40 and sum(map(len, sides.values())) == 80, "no context on two sides"
    assert "cut by context with seed 0, digest" in told and "leak" not in told


BAD = {
    "no JSON": ("x.json", "{", "x.json is not as SQuAD's files are"),
    "no data": ("x.json", "[]", "x.json is not as SQuAD's files are (Expected `object`, got `array`)"),
    "no context": ("x.json", '{"data": [{"paragraphs": [{"qas": []}]}]}', "missing required field `context`"),
    "no question": ("x.json", '{"data": [{"paragraphs": [{"context": "a", "qas": [{}]}]}]}', "field `question`"),
    "no start": (
        "x.json", json.dumps(asked("a", {"question": "q", "answers": [{"text": "a"}]})), "field `answer_start`",
    ),
    "nothing asked": ("x.json", '{"data": []}', "x.json has no questions"),
    "no answer in its text": ("x.json", json.dumps(asked("a b", qa("q", ("c", 0)))), "no question has a text and an"),
    "empty context": ("x.json", json.dumps(asked(" ", qa("q", (" ", 0)))), "no question has a text and an"),
    "another name": ("x.txt", "{}", "x.txt is no file of SQuAD's by its name"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line_and_leave_nothing(tmp_path: Path, capsys, case: str) -> None:
    name, content, said = BAD[case]
    (tmp_path / name).write_text(content)
    before = contents(tmp_path)
    assert (
        main(["prepare", str(tmp_path / name), "--out", str(tmp_path / "out"), "--squad", "--tokenizer", "bytes"]) == 2
    )
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1, err
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--text", "x"), "--text does not go with --squad"),
        (("--no-header",), "--no-header does not go with --squad"),
        (("--tokenizer", "words"), "--tokenizer words loses what stands between words"),
        (("--label", "x"), "--label and --squad make different things"),
        (("--ratio", "2"), "--ratio is for pairs of texts"),
    ],
)
def test_bad_arguments(tmp_path: Path, capsys, more: tuple[str, ...], said: str) -> None:
    write(tmp_path / "x.json", asked(ROME, qa("Where?", ("Rome", 0))))
    assert main(["prepare", str(tmp_path / "x.json"), "--out", str(tmp_path / "out"), "--squad", *more]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1, err


def test_templates_ask_what_stands_in_their_text(monkeypatch) -> None:
    text = "Return the sum of both. If one is None, raise a ValueError. The result is a float (exact)."
    monkeypatch.setattr(builtin, "documents", lambda: {3: text})
    found = {one.text: [answer.text for answer in one.answers] for one in templates.questions(0)}
    assert found == {
        "What does it return?": ["the sum of both"], "What happens if one is None?": ["raise a ValueError"],
        "Which exception is named?": ["ValueError"], "What is The result?": ["a float"],
    }  # fmt: skip
    file = json.loads(squad.written(templates.questions(0), "t"))
    [paragraph] = file["data"][0]["paragraphs"]
    for one in paragraph["qas"]:
        for answer in one["answers"]:
            assert text.startswith(answer["text"], answer["answer_start"])


# Windows


def test_windows_cover_a_context_and_overlap() -> None:
    cut = Cut(context=16, question=3, stride=4)
    assert cut.windows(5, 9, 10) == [Window(5, 0, 10)], "3 tokens of the question are kept, 10 remain"
    assert cut.windows(5, 9, 11) == [Window(5, 0, 10), Window(5, 4, 11)]
    assert [window[1:] for window in cut.windows(0, 2, 20)] == [(0, 11), (4, 15), (8, 19), (12, 20)]
    for tokens in range(1, 60):
        for stride in (0, 1, 5, 99):
            some = Cut(16, 3, stride).windows(0, 3, tokens)
            assert some[0].first == 0 and some[-1].stop == tokens
            assert all(0 < one.stop - one.first <= 10 for one in some)
            assert all(b.first <= a.stop for a, b in pairwise(some)), "no token is left out"


def test_targets_are_positions_of_a_text() -> None:
    question = Question(np.array([1, 2]), np.arange(10, 30), 8, 10)
    cut = Cut(16, 3, 4)
    some = [seen(question, window, cut, k) for k, window in enumerate(cut.windows(0, 2, 20))]
    assert [(one.start, one.stop) for one in some] == [(8, 10), (4, 6), (0, 2), (0, 0)]
    made = batch_of(some, cut, 0)
    for (begin, end), (first, last), (start, stop), one in zip(
        made.spans(), made.targets["answers"], made.targets["contexts"], some, strict=True
    ):
        ids, segments = made.inputs["ids"][0, begin:end], made.inputs["segments"][0, begin:end]
        assert ids[start:stop].tolist() == one.context.tolist() and segments.tolist() == [0] * start + [1] * (
            end - begin - start
        )
        assert (first, last) == (0, 0) if one.number == 3 else ids[first : last + 1].tolist() == [18, 19]


def test_what_is_in_the_question_too_may_lie_in_the_third_segment() -> None:
    question, cut = Question(np.array([1, 2]), np.array([5, 2, 9, 1]), 0, 1), Cut(16, 3, 0, matches=True)
    made = batch_of([seen(question, Window(0, 0, 4), cut)] * 2, cut, 0)
    assert made.inputs["segments"][0].tolist() == [0, 0, 0, 0, 1, 2, 1, 2, 1] * 2 + [0] * 6


def test_the_best_span_of_several_windows() -> None:
    found = np.array([[2, 5, -1.0, -3.0], [1, 2, -0.5, -0.9]])
    firsts = np.array([0, 4])
    assert best_span(firsts, found, True) == Span(5, 6, np.exp(-0.5))
    found[1, 2] = -4.0
    assert best_span(firsts, found, True) == Span(2, 5, np.exp(-1.0)), (
        "the surest window does not say that there is none"
    )
    found[0, 2] = -5.0
    assert best_span(firsts, found, True) == Span(0, 0, np.exp(-3.0))
    assert best_span(firsts, found, False) == Span(5, 6, np.exp(-4.0))


# The head


def test_the_heads_loss_gradient_and_best_span() -> None:
    random, width = np.random.default_rng(0), 6
    head = SpanHead(width, None, longest=3, std=0.5)
    for parameter in head.parameters():
        parameter.data = random.normal(size=parameter.layout.shape)
    question = Question(np.arange(1, 3), np.arange(3, 10), 2, 4)
    cut = Cut(32, 8, 0)
    some = [seen(question, Window(0, 0, 7), cut, 4), seen(question, Window(0, 4, 7), cut, 5)]
    made = batch_of(some, cut, 0, side=1)
    hidden = random.normal(size=(1, made.inputs["ids"].shape[1], width))
    gradients = {parameter: np.zeros(parameter.layout.shape) for parameter in head.parameters()}
    ctx = Context(training=True, batch=made, gradients=gradients)
    [dx] = head.backward((), head.forward((hidden,), ctx)[1], ctx)
    told = Context(batch=made)
    head.forward((hidden,), told)
    logits = hidden[0] @ head.out.weight.data + head.out.bias.data
    expected, best = 0.0, []
    for (begin, end), (first, last), (start, stop) in zip(
        made.spans(), made.targets["answers"], made.targets["contexts"], strict=True
    ):
        own = logits[begin:end]
        logp = own - np.log(np.exp(own).sum(axis=0))
        expected -= (logp[first, 0] + logp[last, 1]) / 2
        spans = {(i - start, j + 1 - start): logp[i, 0] + logp[j, 1]
                 for i in range(start, stop) for j in range(i, min(i + 3, stop))}  # fmt: skip
        top = max(spans, key=lambda span: spans[span])
        best.append((*top, spans[top], logp[0].sum()))
    assert float(ctx.tally["loss"]) == pytest.approx(expected) == pytest.approx(float(told.tally["loss"]))
    outcomes = told.tally["outcomes"]
    assert outcomes[:, :2].tolist() == [[1, 4], [1, 5]] and np.allclose(outcomes[:, 2:], best)
    step = np.zeros_like(hidden)
    for place in ((0, 0, 1), (0, 5, 2), (0, 9, 0)):
        step[...] = 0.0
        step[place] = 1e-6
        losses = []
        for moved in (hidden + step, hidden - step):
            at = Context(batch=made)
            head.forward((moved,), at)
            losses.append(float(at.tally["loss"]))
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(dx[place], abs=1e-6)


# Figures


@pytest.mark.parametrize(
    ("found", "wanted", "exact", "f1"),
    [
        ("The  Normans!", "normans", 1, 1),
        ("in the year 1066", "1066", 0, 0.5),  # 1 of 3 words right, 1 of 1 found: 2·1/(3 + 1)
        ("a b b", "b b c", 0, 0.8),  # the article goes: b, b of b, b, c
        ("U.S.", "US", 1, 1),
        ("", "", 1, 1),
        ("", "x", 0, 0),
        ("the", "", 1, 1),
        ("x", "y", 0, 0),
    ],
)
def test_figures_worked_by_hand(found: str, wanted: str, exact: float, f1: float) -> None:
    assert answers.exact(found, wanted) == exact and answers.f1(found, wanted) == pytest.approx(f1)


# (answer, those that are given, exact match, F1) by the functions of SQuAD's evaluate-v2.0.py
# (allennlp-models 2.10.1); answers given of which nothing is left count as none, as its get_raw_scores has it
OFFICIAL = [
    ("The cat.", ("cat",), 1, 1), ("the", ("a",), 1, 1), ("the", (), 1, 1), ("", (), 1, 1), ("...", ("!",), 1, 1),
    ("", ("the", "New York"), 0, 0), ("a-an", ("aan",), 1, 1), ("the-end", ("end",), 0, 0), ("the_end", ("end",), 0, 0),
    ("U.S.A.", ("USA",), 1, 1), ("1,000", ("1000",), 1, 1), ("it\u2019s", ("its",), 0, 0), ("it's", ("its",), 1, 1),
    ("\u201ccat\u201d", ("cat",), 0, 0), ("STRASSE", ("straße",), 0, 0), ("cafe\u0301", ("café",), 0, 0),
    ("a\u00a0cat", ("cat",), 1, 1), ("cat cat cat", ("cat the cat",), 0, 0.8), ("an\u200bd the", ("an d",), 0, 0),
    ("New York City", ("York", "the new york"), 0, 0.8), ("\u0130stanbul", ("istanbul",), 0, 0),
    ("in 1066, at Hastings", ("1066", "at Hastings in 1066"), 0, 1), ("日本、東京", ("日本 東京",), 0, 0),
    ("theatre", ("atre",), 0, 0),
]  # fmt: skip


@pytest.mark.parametrize(("found", "wanted", "exact", "f1"), OFFICIAL)
def test_figures_are_those_of_squads_program(found: str, wanted: tuple[str, ...], exact: float, f1: float) -> None:
    told = answers.figures([(found, wanted)])
    assert told["exact"] == exact and told["f1"] == pytest.approx(f1, abs=1e-12)


def test_the_best_of_several_answers_counts_and_none_may_be_right() -> None:
    told = answers.figures([("six", ("six days", "six")), ("days", ("six days",)), ("", ()), ("Nero", ())])
    assert told["questions"] == 4 and told["exact"] == 0.5 and told["f1"] == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)
    assert told["answered_exact"] == 0.5 and told["unanswered_exact"] == 0.5 and told["unanswered_questions"] == 2
    assert "answered_exact" not in answers.figures([("a", ("b",))])


def test_baselines_look_for_the_words_of_a_question() -> None:
    one = answers.Asked("When did Rome burn?", "It rained. When did Rome burn it was July. Then not.", ("it was July",))
    assert answers.sentence(one, 0) == "When did Rome burn it was July."
    assert answers.beside(one, 3) == "it was July."
    told = answers.baselines([one] * 3, [one])
    assert told["beside_words"] == 3 and told["beside_exact"] == 1 and told["sentence_exact"] == 0


def test_no_window_is_padded(stored: Labelled) -> None:
    samples = Windows(stored.questions("train"), Cut(40, 8, 0), stored.tokenizer().eot, 0)
    made = samples.batch(range(len(samples)), 0, 0)
    assert made.count == len(samples) == len(made.texts) and made.inputs["ids"].shape[1] < made.texts[-1] + 8
    assert sorted(made.targets["names"][:, 1].tolist()) == list(range(len(samples)))
