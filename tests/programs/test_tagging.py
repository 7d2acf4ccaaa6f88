"""Labels of words as whole programs: sentences of a made language, an encoder, figures of spans, new words."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from programs import Place

from mlm_mpi.__main__ import main

CONFIG = """
[model]
kind = "bert"
layers = 1
width = 32
heads = 2
context = 24
norm = "pre"
init_std = 0.2
[task]
kind = "tagging"
hide = 0.02
[data]
dir = "names"
[train]
steps = 30
micro_batches = 3
rows = 6
[optim]
learning_rate = 1e-2
warmup_steps = 3
[log]
curve = false
"""
NAMES = ["anna", "bert", "carl", "dora", "emil", "frida"]


FIRST = ("train", "tags.toml", "--max-steps", "6", "--run")


def sentences(count: int) -> str:
    """The first word of a sentence tells what its names are of, and "young" belongs to the name before it."""
    every = []
    for number in range(count):
        cue, kind = (("who", "PER"), ("where", "LOC"))[number % 2]
        lines = [f"{cue} O"]
        for k in range(1, 2 + number % 3):
            lines += ["the O"] * ((number // 3 + k) % 2)
            lines += [f"{NAMES[(number // 2 * k + k) % 6]} B-{kind}"]
            lines += [f"young I-{kind}"] * ((number // 5 + k) % 2)
        every.append("\n".join([*lines, f"{number} O"]) + "\n")
    return "\n".join(every)


@pytest.fixture(scope="module")
def names(home: Place) -> Place:
    """Labelled words and a configuration in a folder, and a run of one rank, `weights` after its first six steps."""
    (home.folder / "names.conll").write_text(sentences(240))
    (home.folder / "tags.toml").write_text(CONFIG)
    words = (str(home.folder / "names.conll"), "--out", str(home.folder / "names"), "--tags", "--vocab", "300")
    assert main(["prepare", *words]) == 0
    home.weights = home.program(*FIRST, "tags").weights
    whole = home.program("train", "tags.toml", "--run", "tags")
    assert whole.code == 0 and "words/s" in whole.out, whole.err
    return home


def test_a_made_language_is_learned(names: Place, say, monkeypatch) -> None:
    monkeypatch.chdir(names.folder)
    told = json.loads(say("evaluate", "tags", "--split", "test", "--baselines", "--json").out)
    assert told["accuracy"] > 0.98 and told["macro_f1"] > 0.95 and told["span_f1"] > 0.95 and told["tokens"] == 167
    assert 0.6 < told["lookup_accuracy"] < 0.8 and told["lookup_span_f1"] < 0.5, "a name alone does not tell"
    assert [row["kind"] for row in told["spans"]] == ["LOC", "PER"] and sum(row["spans"] for row in told["spans"]) == 55
    lines = say("evaluate", "tags", "--baselines").out
    assert "words; checkpoint of step 30" in lines and "\nspans               F1 " in lines
    assert re.search(r"\ntable of words      0\.\d{4} accuracy, 0\.\d{4} F1, 0\.\d{4} of spans\n", lines)


@pytest.mark.slow
def test_figures_and_predictions_are_one_on_any_number_of_ranks(names: Place) -> None:
    for words in (
        ("evaluate", "tags", "--split", "test", "--baselines", "--json"),
        ("predict", "tags", "names.conll", "--rows", "7"),
    ):
        alone = names.program(*words)
        assert alone.code == 0 and names.program("run", "-n", "3", "--", *words).out == alone.out


def test_steps_count_the_tokens_of_sentences(names: Place, say, monkeypatch) -> None:
    monkeypatch.chdir(names.folder)
    last = json.loads((names.folder / "tags" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tokens"] == round(30 * 18 * 1413 / 187), "not as if each filled the context"


@pytest.mark.slow
def test_one_hash_on_three_ranks(names: Place) -> None:
    assert names.program("run", "-n", "3", "--", *FIRST, "tags-three").weights == names.weights


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        ("mesh.tp=2",), ("mesh.tp=2", "mesh.sequence=true"), ("mesh.pp=2", "train.schedule=one_f_one_b"),
        ("mesh.pp=2", "train.schedule=zero_bubble", "train.recompute=true"), ("mesh.zero=3",),
    ],
)  # fmt: skip
def test_one_hash_on_meshes(names: Place, mesh: tuple[str, ...]) -> None:
    words = [word for key in mesh for word in ("--set", key)]
    run = "tags-" + "-".join(mesh).replace("=", "")
    assert names.program("run", "-n", "2", "--", *FIRST, run, *words).weights == names.weights


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_to_the_same_weights(names: Place) -> None:
    words = ("train", "tags.toml", "--run", "tags-stopped")
    assert names.program(*words, "--max-steps", "3").code == 0
    assert names.program("run", "-n", "2", "--", *words, "--max-steps", "3").weights == names.weights


def test_predictions_keep_order_and_empty_lines(names: Place, say, monkeypatch) -> None:
    monkeypatch.chdir(names.folder)
    text = "\n\nwho\nanna\nyoung\n\n\n\nwhere\nbert\n7\n" + "\n" + "a\n" * 30 + "\n"
    (names.folder / "new.txt").write_text(text)
    alone = say("predict", "tags", "new.txt", "--rows", "2")
    rows = [line.split("\t") for line in alone.out.splitlines()]
    assert [row[0] for row in rows] == text.splitlines(), "paste FILE OUT fits"
    labels = [row[1] for row in rows if len(row) == 3]
    assert labels[:6] == ["O", "B-PER", "I-PER", "O", "B-LOC", "O"] and labels[-1] == "", "behind the context"
    assert "3 sentences, 36 words; 1 are longer than the context of 24" in alone.err
    (names.folder / "new.jsonl").write_text('{"w": ["who", "anna"]}\n{"w": []}\n{"w": ["where", "bert"]}\n')
    lines = say("predict", "tags", "new.jsonl", "--text", "w", "--json", "--all").out.splitlines()
    told = [json.loads(line) for line in lines]
    assert [one["labels"] for one in told] == [["O", "B-PER"], [], ["O", "B-LOC"]]
    assert told[0]["all"][1]["B-PER"] == told[0]["probabilities"][1] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["--tp", "--pp"])
def test_predictions_of_ranks_that_share_a_model(names: Place, axis: str) -> None:
    words = ("predict", "tags", "names.conll")
    alone = names.program(*words)
    assert alone.code == 0 and alone.out == names.program("run", "-n", "2", "--", *words, axis, "2").out


@pytest.mark.slow
def test_words_of_other_labels_have_another_head(names: Place) -> None:
    (names.folder / "kinds.conll").write_text(sentences(240).replace("PER", "X").replace("LOC", "Y"))
    tokenizer = next((names.folder / "names").glob("tokenizer-*.json"))
    made = names.program("prepare", "kinds.conll", "--out", "kinds", "--tags", "--tokenizer", str(tokenizer))
    assert made.code == 0, made.err
    tuned = names.program("finetune", "tags", "tags.toml", "--run", "kinds-run", "--set", "data.dir=kinds")
    assert "drawn: classes.dense" in tuned.out or "drawn:" in tuned.out, tuned.out + tuned.err
    names.program("evaluate", "tags", "--data", "kinds").refused("kinds has other labels than the model")


@pytest.mark.parametrize(
    ("words", "texts_of_it"),
    [
        (("predict", "tags", "names.conll", "--text", "3"), ("names.conll:1 has 2 columns, and --text is 3",)),
        (("predict", "tags", "names.conll", "--no-header", "--text", "1"), ("labels of words, --no-header",)),
        (("predict", "tags", "names.conll", "--pair", "2"), ("labels of words, --pair",)),
        (("predict", "tags", "names.conll", "--all"), ("--all has no header", "--json")),
        (("predict", "tags", "short.jsonl"), ("short.jsonl:1 has no field 'tokens'", "'text'")),
        (
            ("evaluate", "tags", "--data", "corpus"),
            ("without labels of words", "prepare FILES --tags", "--data"),
        ),
        (("generate", "tags"), ("tagging",)),
        (("train", "tags.toml", "--run", "x", "--set", "model.context=2"), ("model.context = 2", "3 is the least")),
        (
            ("train", "tags.toml", "--run", "x", "--set", "model.context=6", "--set", "task.too_long=refuse"),
            ("sentences of train in names do not fit model.context = 6", "task.too_long"),
        ),
        (
            ("train", "tags.toml", "--run", "x", "--set", "task.kind=classification"),
            ("has labels of words, not labels of texts", 'task.kind = "tagging"'),
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(
    names: Place, words: tuple[str, ...], texts_of_it: tuple[str, ...], say, monkeypatch
) -> None:
    monkeypatch.chdir(names.folder)
    (names.folder / "short.jsonl").write_text('{"text": "who"}\n')
    say(*(str(names.corpus) if word == "corpus" else word for word in words)).refused(*texts_of_it)
    assert not (names.folder / "x").exists()


@pytest.mark.slow
def test_what_is_cut_is_counted(names: Place) -> None:
    run = ("--run", "tags-cut", "--set", "model.context=6", "--set", "train.steps=4")
    begun = names.program("train", "tags.toml", *run)
    assert re.search(r"sentences +187 for training, 1,097 words.*; \d+ are cut and lose \d+ words", begun.out)
    told = names.program("evaluate", "tags-cut").out
    assert re.search(r"\ncut off             \d+ words behind the context of 6: not measured\n", told), told


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("ranks", [None, 2])
def test_a_prediction_that_is_interrupted_leaves_no_file(names: Place, number: int, ranks: int | None) -> None:
    (names.folder / "much.txt").write_text("who\nanna\nyoung\n\n" * 30_000)
    folder = names.folder / f"out-{number}-{ranks}"
    folder.mkdir()
    launcher = [] if ranks is None else ["run", "-n", str(ranks), "--"]
    words = [*launcher, "predict", "tags", "much.txt", "--rows", "1", "--out", f"{folder}/o.conll"]
    process = subprocess.Popen([sys.executable, "-P", "-m", "mlm_mpi", *words], cwd=names.folder)
    time.sleep(4)
    assert process.poll() is None, "it is still at it"
    process.send_signal(number)
    assert process.wait(30) != 0
    time.sleep(1)
    assert not list(folder.iterdir())
