"""The second case as whole programs: labelled texts, an encoder, its figures, labels of new texts."""

import json
from pathlib import Path

import pytest
from programs import Place

from mlm_mpi.backend.cpu import library

CONFIG = """
[model]
kind = "bert"
layers = 2
width = 32
heads = 2
context = 24
ngrams = 3
ngram_buckets = 512
norm = "pre"
[task]
kind = "classification"
pooling = "mean"
smoothing = 0.1
weights = "balanced"
hide = 0.1
crop = 0.3
[data]
dir = "texts"
[train]
steps = 30
micro_batches = 4
rows = 8
[optim]
learning_rate = 1e-2
warmup_steps = 3
[checkpoint]
every = 10
[log]
curve = false
"""
WORDS = {"fruit": "apple pear plum fig", "tool": "saw axe drill file", "animal": "cat dog cow hen"}


def table(rows: int) -> str:
    """Texts of a few words; which words they are tells the label."""
    lines = ["text\tlabel"]
    for number in range(rows):
        label = list(WORDS)[number % 3]
        words = WORDS[label].split()
        some = " ".join(words[(number * k) % 4] for k in range(1, 2 + number % 5))
        lines.append(f"the {some} number {number}\t{label}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Place:
    """Labelled texts and a configuration in a folder, and a run of one rank."""
    home = Place(tmp_path_factory.mktemp("texts"), corpus)
    (home.folder / "texts.tsv").write_text(table(240))
    (home.folder / "classes.toml").write_text(CONFIG)
    (home.folder / "plain.toml").write_text('[data]\ndir = "texts"\n')
    made = home.program("prepare", "texts.tsv", "--out", "texts", "--label", "label", "--vocab", "300")
    assert made.code == 0, made.err
    alone = home.program("train", "classes.toml", "--run", "alone")
    assert alone.code == 0, alone.err
    home.weights = alone.weights
    return home


def test_one_hash_on_three_ranks(texts: Place) -> None:
    assert texts.program("run", "-n", "3", "--", "train", "classes.toml", "--run", "three").weights == texts.weights


@pytest.mark.slow
@pytest.mark.skipif(not library.runs("base"), reason="no compiled library")
def test_one_hash_in_bf16_on_two_ranks(texts: Place) -> None:
    words = ("train", "classes.toml", "--set", "numerics.products=bf16", "--set", "train.steps=4", "--run")
    alone = texts.program(*words, "bf16", MLM_MPI_BF16="portable")
    two = texts.program("run", "-n", "2", "--", *words, "bf16-two", MLM_MPI_BF16="portable")
    assert two.weights == alone.weights and "bf16 products in plain C" in alone.out


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_one_hash_on_meshes(texts: Place, norm: str, pooling: str) -> None:
    kind = ("--set", f"model.norm={norm}", "--set", f"task.pooling={pooling}")
    alone = texts.program("train", "classes.toml", "--run", f"alone-{norm}-{pooling}", *kind).weights
    for number, mesh in enumerate(
        (
            ("mesh.tp=2",), ("mesh.tp=2", "mesh.sequence=true"), ("mesh.pp=2", "train.schedule=one_f_one_b"),
            ("mesh.pp=2", "train.schedule=zero_bubble", "train.recompute=true"), ("mesh.zero=3",),
        )
    ):  # fmt: skip
        words = [word for key in mesh for word in ("--set", key)]
        run = f"mesh-{norm}-{pooling}-{number}"
        assert (
            texts.program("run", "-n", "2", "--", "train", "classes.toml", "--run", run, *kind, *words).weights == alone
        )


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_to_the_same_weights(texts: Place) -> None:
    stopped = texts.program("train", "classes.toml", "--run", "stopped", "--max-steps", "13")
    assert stopped.code == 0, stopped.err
    assert texts.program("run", "-n", "2", "--", "train", "classes.toml", "--run", "stopped").weights == texts.weights


def test_figures_and_predictions_are_one_on_any_number_of_ranks(texts: Place) -> None:
    alone = texts.program("evaluate", "alone", "--split", "test", "--json", "--confusion", "c.png")
    told = json.loads(alone.out)
    assert told["accuracy"] > 0.9 and (texts.folder / "c.png").read_bytes()[:4] == b"\x89PNG"
    assert texts.program("run", "-n", "2", "--", "evaluate", "alone", "--split", "test", "--json").out == alone.out
    (texts.folder / "new.csv").write_text('text\n"a plum, a fig"\nthe cow\nthe drill\nan axe and a saw\n')
    alone = texts.program("predict", "alone", "new.csv", "--all")
    rows = [line.split("\t") for line in alone.out.splitlines()]
    assert rows[0] == ["label", "probability", "animal", "fruit", "tool"]
    assert [row[0] for row in rows[1:]] == ["fruit", "animal", "tool", "tool"]
    assert all(abs(sum(map(float, row[2:])) - 1) < 1e-5 for row in rows[1:])
    several = texts.program(
        "run", "-n", "2", "--", "predict", "alone", "new.csv", "--all", "--rows", "1", "--out", "o.tsv"
    )
    assert several.code == 0 and (texts.folder / "o.tsv").read_text() == alone.out


def test_rows_without_text_have_no_label_and_a_pipe_stays_one(texts: Place) -> None:
    (texts.folder / "gaps.jsonl").write_text('{"text": "the cow"}\n{"text": " "}\n{"text": null}\n{"text": "a fig"}\n')
    done = texts.program("predict", "alone", "gaps.jsonl", "--json", "--out", "/dev/stdout")
    told = [json.loads(line)["label"] for line in done.out.splitlines()]
    assert told == ["animal", None, None, "fruit"] and "2 have no text" in done.err
    (texts.folder / "gaps.txt").write_text("the cow\n \n\na fig\n")
    assert texts.program("predict", "alone", "gaps.txt", "--json").out == done.out, "a text a line"
    assert texts.program("predict", "alone", "gaps.jsonl", "--out", "/dev/full").code != 0
    assert Path("/dev/full").is_char_device()


@pytest.mark.slow
def test_labels_of_another_kind_have_another_head_and_adapters_are_merged(texts: Place) -> None:
    (texts.folder / "others.tsv").write_text(table(240).replace("fruit", "alpha").replace("tool", "beta"))
    tokenizer = next((texts.folder / "texts").glob("tokenizer-*.json"))
    made = texts.program("prepare", "others.tsv", "--out", "others", "--label", "label", "--tokenizer", str(tokenizer))
    assert made.code == 0, made.err
    words = ("classes.toml", "--set", "train.steps=4", "--set", "start.lora_rank=2")
    tuned = texts.program("finetune", "alone", *words, "--run", "others-run", "--set", "data.dir=others")
    assert "and 11 more" in tuned.out, "adapters of four maps, six of the head: " + tuned.out + tuned.err
    assert texts.program("finetune", "alone", *words, "--run", "lora").code == 0
    assert texts.program("merge", "lora", "--out", "merged").code == 0
    before, after = (texts.program("evaluate", run, "--json") for run in ("lora", "merged"))
    assert json.loads(before.out)["loss"] == pytest.approx(json.loads(after.out)["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "texts_of_it"),
    [
        (("predict", "alone", "none.csv"), ("none.csv", "no file")),
        (("predict", "alone", "texts.tsv", "--text", "txt"), ("no column 'txt'", "text, label")),
        (("predict", "alone", "texts.tsv", "--rows", "0"), ("--rows 0",)),
        (("predict", "alone", "texts.tsv", "--pair", "label"), ("single texts", "leave --pair out")),
        (("predict", "alone", "texts.tsv", "--out", "texts.tsv"), ("whose texts are read",)),
        (("predict", "alone", "texts.tsv", "--out", "nowhere/o.tsv"), ("nowhere/o.tsv",)),
        (("evaluate", "alone", "--confusion", "nowhere/c.png"), ("nowhere/c.png",)),
        (("evaluate", "alone", "--confusion", "texts.tsv"), ("texts.tsv", ".png")),
        (("train", "classes.toml", "--run", "x", "--set", "start.lora_rank=2"), ("start.lora_rank = 2", "finetune")),
        (("train", "plain.toml", "--run", "x", "--set", "task.kind=classification"), ("gpt", "several texts", "bert")),
        (("train", "plain.toml", "--run", "x", "--set", "model.kind=bert"), ("bert", "sees the tokens")),
        (
            ("train", "classes.toml", "--run", "x", "--set", "model.context=5", "--set", "task.too_long=refuse"),
            ("do not fit model.context = 5",),
        ),
        (("generate", "alone"), ("classification",)),
    ],
)
def test_what_cannot_be_done_is_one_line(
    texts: Place, words: tuple[str, ...], texts_of_it: tuple[str, ...], say, monkeypatch
) -> None:
    monkeypatch.chdir(texts.folder)
    say(*words).refused(*texts_of_it)
    assert not (texts.folder / "x").exists()
