"""Questions as whole programs: a made language, an encoder that finds answers, figures, new questions, one hash."""

import json
import re
import subprocess
import sys

import pytest
from programs import RANK_DIES, Place

from mlm_mpi.__main__ import main

CONFIG = """
[model]
kind = "bert"
layers = 1
width = 32
heads = 2
context = 28
norm = "pre"
init_std = 0.2
dropout = 0.0
[task]
kind = "question_answering"
[data]
dir = "asked"
[train]
steps = 20
micro_batches = 3
rows = 6
[optim]
learning_rate = 2e-2
warmup_steps = 3
[eval]
every = 10
best = true
figure = "f1"
[log]
curve = false
"""
NAMES = ["anna", "bert", "carl", "dora", "emil", "frida"]
TRAIN = ("train", "asked.toml", "--run")


def file(count: int) -> dict:
    """Of a text that says who came and where: both questions; some texts are longer than the context."""
    paragraphs = []
    for number in range(count):
        who, where = NAMES[number % 6], f"in {('rome', 'paris', 'oslo')[number // 6 % 3]}"
        context = f"note {number} then " * (1 + 4 * (number % 10 == 0)) + f"came {who} {where} ."
        qas = [
            {"id": f"{number}-{question}", "question": question}
            | {"answers": [{"text": text, "answer_start": context.index(text)}]}
            for question, text in (("who ?", who), ("where ?", where))
        ]  # fmt: skip
        paragraphs.append({"context": context, "qas": qas})
    return {"data": [{"paragraphs": paragraphs}]}


@pytest.fixture(scope="module")
def asked(home: Place) -> Place:
    """Questions and a configuration in a folder, and a run of one rank, whose hash is `weights`."""
    (home.folder / "asked.json").write_text(json.dumps(file(120)))
    (home.folder / "asked.toml").write_text(CONFIG)
    words = (str(home.folder / "asked.json"), "--out", str(home.folder / "asked"), "--squad", "--vocab", "300")
    assert main(["prepare", *words]) == 0
    whole = home.program(*TRAIN, "answers")
    home.weights = whole.weights
    assert whole.code == 0 and "windows/s" in whole.out and "held-out  f1 " in whole.out, whole.err
    assert re.search(r"questions +186 for training; \d+ contexts do not fit, in \d+ windows\n", whole.out), whole.out
    return home


def test_a_made_language_is_learned(asked: Place, say, monkeypatch) -> None:
    monkeypatch.chdir(asked.folder)
    told = json.loads(say("evaluate", "answers", "--split", "test", "--baselines", "--json").out)
    assert told["exact"] > 0.9 and told["f1"] >= told["exact"] > told["beside_exact"] + 0.3
    lines = say("evaluate", "answers", "--best").out
    assert "windows; checkpoint of step" in lines and "\nexact match         " in lines and "\nF1   " in lines


def test_one_hash_on_three_ranks(asked: Place) -> None:
    assert asked.program("run", "-n", "3", "--", *TRAIN, "answers-three").weights == asked.weights


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        ("mesh.tp=2",), ("mesh.tp=2", "mesh.sequence=true"), ("mesh.pp=2", "train.schedule=one_f_one_b"),
        ("mesh.pp=2", "train.schedule=zero_bubble", "train.recompute=true"), ("mesh.zero=3",),
    ],
)  # fmt: skip
def test_one_hash_on_meshes(asked: Place, mesh: tuple[str, ...]) -> None:
    words = [word for key in mesh for word in ("--set", key)]
    run = "answers-" + "-".join(mesh).replace("=", "")
    assert asked.program("run", "-n", "2", "--", *TRAIN, run, *words).weights == asked.weights


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_to_the_same_weights(asked: Place) -> None:
    words = (*TRAIN, "answers-stopped")
    assert asked.program(*words, "--max-steps", "7").code == 0
    assert asked.program("run", "-n", "2", "--", *words).weights == asked.weights


@pytest.mark.slow
def test_a_run_of_which_a_rank_was_killed_goes_on_to_the_same_weights(asked: Place) -> None:
    words = (*TRAIN, "answers-killed", "--set", "checkpoint.every=4")
    killed = asked.faulty_program(RANK_DIES.format(step=9), 3, *words)
    assert killed.code != 0 and "step-00000004" in asked.checkpoints("answers-killed"), "the next may be under way"
    assert asked.program("run", "-n", "2", "--", *words).weights == asked.weights


def test_answers_to_new_questions(asked: Place, say, monkeypatch) -> None:
    monkeypatch.chdir(asked.folder)
    context = "note 7 then came dora in oslo ."
    rows = [
        {"question": "who ?", "context": context, "id": "a"}, {"question": "", "context": context},
        {"question": "where ?", "context": context}, {"question": "who ?", "context": " "},
        {"question": "where ?", "context": "note 7 then " * 9 + context},
    ]  # fmt: skip
    (asked.folder / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = say("predict", "answers", "new.jsonl", "--rows", "2")
    table = [line.split("\t") for line in plain.out.splitlines()]
    assert table[0] == ["answer", "probability", "start", "end"]
    assert [row[0] for row in table[1:]] == ["dora", "", "in oslo", "", "in oslo"]
    for row, line in zip(rows, table[1:], strict=True):
        assert line[0] == "" or (row["context"][int(line[2]) : int(line[3])] == line[0] and 0 < float(line[1]) <= 1)
    assert "5 questions; 2 have no question or no context, and no answer" in plain.err
    told = [json.loads(line) for line in say("predict", "answers", "new.jsonl", "--json").out.splitlines()]
    assert told[0]["id"] == "a" and told[0]["answer"] == "dora" and told[1]["answer"] is None
    squad = json.loads(say("predict", "answers", "new.jsonl", "--squad").out)
    assert squad == {"a": "dora", "2": "", "3": "in oslo", "4": "", "5": "in oslo"}
    (asked.folder / "same.jsonl").write_text(2 * (json.dumps(rows[0]) + "\n"))
    assert "1 have the id of an earlier one" in say("predict", "answers", "same.jsonl", "--squad").err
    assert "the id" not in say("predict", "answers", "same.jsonl", "--json").err


def test_answers_to_a_file_in_the_layout_of_squad_2(asked: Place, say, monkeypatch) -> None:
    """As its own program takes predictions: one object by id."""
    monkeypatch.chdir(asked.folder)
    context = "note 7 then came dora in oslo ."
    qas = [
        {"question": "who ?", "id": "56be85543aeaaa14008c9063", "answers": [{"text": "dora", "answer_start": 17}]}
        | {"is_impossible": False},
        {"plausible_answers": [{"text": "oslo", "answer_start": 25}], "question": "where ?"}
        | {"id": "5a8d7bf7df8bba001a0f9ab1", "answers": [], "is_impossible": True},
    ]  # fmt: skip
    table = {"version": "v2.0", "data": [{"title": "Notes", "paragraphs": [{"qas": qas, "context": context}]}]}
    (asked.folder / "dev-v2.0.json").write_text(json.dumps(table))
    found = json.loads(say("predict", "answers", "dev-v2.0.json", "--squad").out)
    assert found == {"56be85543aeaaa14008c9063": "dora", "5a8d7bf7df8bba001a0f9ab1": "in oslo"}


@pytest.mark.slow
def test_figures_and_predictions_are_one_on_any_number_of_ranks(asked: Place) -> None:
    for words in (
        ("evaluate", "answers", "--split", "test", "--baselines", "--json"),
        ("predict", "answers", "asked.json", "--rows", "7"),
    ):
        alone = asked.program(*words)
        assert alone.code == 0 and asked.program("run", "-n", "3", "--", *words).out == alone.out


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["--tp", "--pp"])
def test_predictions_of_ranks_that_share_a_model(asked: Place, axis: str) -> None:
    words = ("predict", "answers", "asked.json")
    alone = asked.program(*words)
    assert alone.code == 0 and alone.out == asked.program("run", "-n", "2", "--", *words, axis, "2").out


@pytest.mark.slow
def test_questions_without_an_answer(asked: Place) -> None:
    table = file(60)
    for number, paragraph in enumerate(table["data"][0]["paragraphs"]):
        if number % 2:
            paragraph["context"] = paragraph["context"].replace("came", "went").replace(" in ", " on ")
            for one in paragraph["qas"]:
                one.update(answers=[], is_impossible=True)
    (asked.folder / "two.json").write_text(json.dumps(table))
    tokenizer = str(next((asked.folder / "asked").glob("tokenizer-*.json")))
    made = asked.program("prepare", "two.json", "--out", "two", "--squad", "--tokenizer", tokenizer)
    assert "60 have no answer on purpose" in made.out, made.err
    words = (*TRAIN, "two-run", "--set", "data.dir=two")
    asked.program(*words).refused("questions of train in two have no answer: set task.unanswerable = true")
    assert asked.program(*words, "--set", "task.unanswerable=true", "--set", "train.steps=40").code == 0
    told = json.loads(asked.program("evaluate", "two-run", "--split", "test", "--json").out)
    assert told["unanswered_exact"] > 0.8 and told["answered_f1"] > 0.4
    assert "have no answer" in asked.program("predict", "two-run", "two.json").err


@pytest.mark.parametrize(
    ("words", "texts_of_it"),
    [
        (("predict", "answers", "new.csv"), ("new.csv is no file of SQuAD's by its name",)),
        (("predict", "answers", "bad.jsonl"), ("bad.jsonl:1 has no field 'context'",)),
        (("predict", "answers", "asked.json", "--all"), ("--all is not for questions",)),
        (("predict", "answers", "asked.json", "--json", "--squad"), ("--squad is one JSON object",)),
        (("evaluate", "answers", "--data", "corpus"), ("without questions", "prepare FILES --squad", "--data")),
        (("train", "asked.toml", "--run", "x", "--set", "model.context=4"), ("model.context = 4", "5 is the least")),
        (("train", "asked.toml", "--run", "x", "--set", "model.segments=1"), ("model.segments = 1",)),
        (("train", "asked.toml", "--run", "x", "--set", "task.matches=true"), ("set model.segments = 3",)),
        (
            ("train", "asked.toml", "--run", "x", "--set", "task.kind=classification"),
            ("has questions, not labels of texts", 'task.kind = "question_answering"'),
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(
    asked: Place, words: tuple[str, ...], texts_of_it: tuple[str, ...], say, monkeypatch
) -> None:
    monkeypatch.chdir(asked.folder)
    (asked.folder / "new.csv").write_text("question,context\n")
    (asked.folder / "bad.jsonl").write_text('{"question": "who"}\n')
    say(*(str(asked.corpus) if word == "corpus" else word for word in words)).refused(*texts_of_it)
    assert not (asked.folder / "x").exists()


@pytest.mark.slow
def test_the_templates_are_a_file_of_squads(asked: Place) -> None:
    subprocess.run([sys.executable, "-P", "-m", "mlm_mpi.data.templates", "python.json"], cwd=asked.folder, check=True)
    [article] = json.loads((asked.folder / "python.json").read_text())["data"]
    assert sum(len(paragraph["qas"]) for paragraph in article["paragraphs"]) > 3_000
