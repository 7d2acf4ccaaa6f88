"""The third case as whole programs: pairs of texts, an encoder-decoder that learns to reverse, one hash on any mesh."""

import itertools
import json
from pathlib import Path

import pytest
from programs import Place, make_text, prepare

from mlm_mpi.backend.cpu import library

pytestmark = pytest.mark.slow  # tests/parallel and tests/serial say it sooner

CONFIG = """
[model]
kind = "encoder_decoder"
layers = 1
decoder_layers = 2
width = 32
heads = 2
context = 8
dropout = 0.1
init_std = 0.1
[task]
kind = "translation"
[data]
dir = "pairs"
[train]
steps = 6
micro_batches = 4
rows = 8
[optim]
learning_rate = 5e-3
warmup_steps = 3
[checkpoint]
every = 3
[eval]
every = 3
[log]
curve = false
"""
LEARNS = ("model.dropout=0.0", "train.steps=150", "train.rows=16", "checkpoint.every=0", "eval.every=0")
WORDS = ("red", "green", "blue", "black")


def table() -> str:
    """All texts of one to five words, and each from its end to its beginning."""
    every = (some for count in range(1, 5) for some in itertools.product(WORDS, repeat=count))
    return "text\treversed\n" + "".join(f"{' '.join(some)}\t{' '.join(some[::-1])}\n" for some in every)


def keys(*words: str) -> list[str]:
    return [part for word in words for part in ("--set", word)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Place:
    """Pairs and a configuration in a folder, and a run of one rank."""
    home = Place(tmp_path_factory.mktemp("pairs"), corpus)
    (home.folder / "pairs.tsv").write_text(table())
    (home.folder / "pairs.toml").write_text(CONFIG)
    columns = ("--text", "text", "--target", "reversed", "--vocab", "272")
    made = home.program("prepare", "pairs.tsv", "--out", "pairs", *columns)
    assert made.code == 0, made.err
    alone = home.program("train", "pairs.toml", "--run", "alone")
    assert alone.code == 0, alone.err
    home.weights = alone.weights
    return home


@pytest.fixture(scope="module")
def learns(pairs: Place) -> Place:
    """A longer run beside them."""
    assert pairs.program("train", "pairs.toml", "--run", "learns", *keys(*LEARNS)).code == 0
    return pairs


def test_it_learns_to_reverse(learns: Place) -> None:
    """By chance a token costs about 1.4 nats, of texts whose lengths are known; who is certain pays 0.1 for it."""
    told = json.loads(learns.program("evaluate", "learns", "--split", "test", "--json").out)
    assert told["loss"] < 0.3 and 1 < told["perplexity"] < 1.35


def test_one_hash_on_a_mesh_of_stages_and_tensor_parallel_ranks(pairs: Place) -> None:
    words = keys("mesh.pp=2", "mesh.tp=2", "train.schedule=one_f_one_b")
    assert (
        pairs.program("run", "-n", "4", "--", "train", "pairs.toml", "--run", "four", *words).weights == pairs.weights
    )


MESHES = {
    "three": (3, ()), "tp": (2, ("mesh.tp=2",)), "sequence": (2, ("mesh.tp=2", "mesh.sequence=true")),
    "pp": (2, ("mesh.pp=2", "train.schedule=one_f_one_b")), "zero": (2, ("mesh.zero=3",)),
    "halves": (3, ("mesh.pp=3", "train.schedule=zero_bubble", "train.recompute=true")),
    "chunks": (2, ("mesh.pp=2", "mesh.chunks=2", "train.schedule=interleaved")),
}  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES)
def test_one_hash_on_meshes(pairs: Place, mesh: str) -> None:
    ranks, words = MESHES[mesh]
    run = ("run", "-n", str(ranks), "--", "train", "pairs.toml", "--run", mesh, *keys(*words))
    assert pairs.program(*run).weights == pairs.weights


@pytest.mark.skipif(not library.runs("base"), reason="no compiled library")
def test_one_hash_in_bf16_on_two_ranks(pairs: Place) -> None:
    words = ("train", "pairs.toml", *keys("numerics.products=bf16"), "--run")
    alone = pairs.program(*words, "bf16", MLM_MPI_BF16="portable")
    two = pairs.program("run", "-n", "2", "--", *words, "bf16-two", MLM_MPI_BF16="portable")
    assert two.weights == alone.weights and "bf16 products in plain C" in alone.out


def test_a_run_that_stopped_goes_on_to_the_same_weights(pairs: Place) -> None:
    assert pairs.program("train", "pairs.toml", "--run", "stopped", "--max-steps", "4").code == 0
    again = pairs.program("run", "-n", "2", "--", "train", "pairs.toml", "--run", "stopped")
    assert again.weights == pairs.weights


def test_figures_are_one_on_any_mesh(pairs: Place) -> None:
    alone = pairs.program("evaluate", "alone", "--json").out
    for ranks, words in ((3, ()), (2, ("--tp", "2")), (2, ("--pp", "2"))):
        assert pairs.program("run", "-n", str(ranks), "--", "evaluate", "alone", "--json", *words).out == alone
    assert "perplexity" in pairs.program("evaluate", "alone").out


def test_it_continues_no_prompt_and_tells_no_labels(pairs: Place) -> None:
    pairs.program("generate", "alone", "--prompt", "red").refused("translation", "continues no text")
    (pairs.folder / "new.csv").write_text("text\nred blue\n")
    pairs.program("predict", "alone", "new.csv", "--all").refused("--all is for runs that tell labels", "translates")


def test_what_it_writes_is_one_on_any_mesh(learns: Place) -> None:
    texts = ["red blue green", "black", "", "green red red blue"]
    (learns.folder / "new.csv").write_text("text,number\n" + "".join(f"{text},1\n" for text in texts))
    alone = learns.program("predict", "learns", "new.csv", "--out", "o.txt")
    assert alone.code == 0 and "4 rows; 1 have no text and no translation" in alone.err
    out = (learns.folder / "o.txt").read_text()
    assert out.splitlines() == [" ".join(text.split()[::-1]) for text in texts]
    for ranks, words in (("3", ("--rows", "1")), ("4", ("--tp", "2", "--pp", "2"))):
        assert learns.program("run", "-n", ranks, "--", "predict", "learns", "new.csv", *words).out == out
    wide = ("predict", "learns", "new.csv", "--beams", "3", "--length-penalty", "1")
    assert learns.program("run", "-n", "4", "--", *wide, "--tp", "2", "--pp", "2").out == learns.program(*wide).out
    (learns.folder / "new.txt").write_text("".join(f"{text}\n" for text in texts))
    assert learns.program("predict", "learns", "new.txt").out == out, "a text a line"
    lines = ("predict", "learns", "new.txt", "--text", "text")
    learns.program(*lines).refused("--text is of tables, and new.txt has a text a line: leave it out")
    told = learns.program("predict", "learns", "new.csv", "--json").out.splitlines()
    assert [json.loads(line)["text"] for line in told] == out.splitlines()


def test_a_translation_is_explained(learns: Place) -> None:
    explain = ("explain", "learns", "red blue green")
    told = learns.program(*explain, "--at", "2", "--out", "look.html").out.splitlines()
    assert [line.split()[0] for line in told] == [
        "model", "source", "question", "answer", "explained", "attributions", "attention", "written",
    ]  # fmt: skip
    assert told[1].endswith("4 positions") and "number 2 of the translation, of 4 positions" in told[2]
    assert "explained     ' blue'" in told[4] and (learns.folder / "look.png").stat().st_size > 10_000
    other = ("--translation", "green red", "--out", "other.html", "--layer", "1")
    assert "explained     ' blue'" in learns.program(*explain, *other, "--at", "2", "--target", " blue").out
    none = ("--out", "none.html")
    learns.program(*explain, "--at", "5", *none).refused("--at 5 is no token of the translation, which has 4: 1 'green")
    learns.program(*explain, "--pair", "x", *none).refused("--pair is of classifiers", "give --translation")
    assert not (learns.folder / "none.html").exists()


SPANS = (  # context and widths stay those of the translation
    "task.kind=span_corruption", "data.dir=plain", "task.rate=0.3", "task.span=2", "train.steps=4", "train.rows=2",
    "checkpoint.every=2", "eval.every=0",
)  # fmt: skip


def test_what_spans_have_taught_is_fine_tuned_to_translate(pairs: Place) -> None:
    """One hash on any mesh, in both; the rows of sentinels are left out, and said to be."""
    tokenizer = next((pairs.folder / "alone" / "checkpoints").glob("*/tokenizer.json"))
    text = make_text(pairs.folder / "plain-text")
    prepare(text, pairs.folder / "plain", "--tokenizer", str(tokenizer), "--heldout", "0.01")
    train = ("train", "pairs.toml", *keys(*SPANS), "--run")
    spans = pairs.program(*train, "spans")
    assert spans.code == 0 and "sentinels behind the" in spans.out, spans.err
    three = pairs.program("run", "-n", "3", "--", *train, "spans-three")
    both = pairs.program("run", "-n", "2", "--", *train, "spans-two", *keys("mesh.tp=2"))
    pairs.program(*train, "spans-stopped", "--max-steps", "3")
    again = pairs.program("run", "-n", "2", "--", *train, "spans-stopped")
    assert spans.weights == three.weights == both.weights == again.weights
    told = json.loads(pairs.program("evaluate", "spans", "--baselines", "--json").out)
    assert 0 < told["unigram_loss"] < 6 and told["loss"] > 0
    pairs.program("explain", "spans", "red", "--out", "none.html").refused("span_corruption", "fine-tuned from it")
    tuned = ("pairs.toml", *keys("train.steps=3"), "--run")
    alone = pairs.program("finetune", "spans", *tuned, "tuned")
    assert "of embed.tokens the first" in alone.out and "left out: 8 of sentinels" in alone.out, alone.err
    assert pairs.program("run", "-n", "2", "--", "finetune", "spans", *tuned, "two", *keys("mesh.tp=2")).weights == (
        alone.weights
    )


def test_figures_of_translations_beside_those_of_simple_methods(learns: Place) -> None:
    pytest.importorskip("sacrebleu")
    words = ("evaluate", "learns", "--split", "test", "--translate", "--beams", "2", "--baselines")
    told = json.loads(learns.program(*words, "--json").out)
    assert told["chrf"] > 90 > told["copy_chrf"] and told["bleu"] > told["copy_bleu"]
    assert told["bleu_signature"].startswith("nrefs:1|case:mixed|") and "nc:6|nw:0" in told["chrf_signature"]
    lines = learns.program("run", "-n", "3", "--", *words).out.splitlines()
    assert [line[:14] for line in lines[2:]] == ["BLEU          ", "chrF          ", "source as it i", "word by word  "]
    assert f"{told['chrf']:.2f}, {told['chrf_signature']}" in lines[3]


def test_options_of_search_go_with_what_is_written(pairs: Place) -> None:
    pairs.program("evaluate", "alone", "--beams", "2").refused("--beams is for what a model writes", "--translate")
    pairs.program("evaluate", "alone", "--translate", "--beams", "0").refused("--beams 0 must be at least 1")
    (pairs.folder / "one.csv").write_text("text\nred blue\n")
    predict = ("predict", "alone", "one.csv")
    pairs.program(*predict, "--length-penalty", "1").refused("compares the texts of several beams: give --beams 4")


def test_hints_go_with_a_model_to_what_it_reads(pairs: Place) -> None:
    """The same weights on two ranks; new texts get hints too; nobody measures a model by texts of the other kind."""
    columns = ("--text", "text", "--target", "reversed", "--tokenizer", "pairs/" + tokenizer_of(pairs, "pairs"))
    made = pairs.program("prepare", "pairs.tsv", "--out", "hinted", *columns, "--hints")
    assert made.code == 0 and "hints       by a dictionary of 4 words of the training side" in made.out
    words = ("train", "pairs.toml", *keys("data.dir=hinted", "model.lexical=true", "model.context=16"), "--run")
    alone = pairs.program(*words, "hints")
    assert "tokens of sources with hints" in alone.out
    assert pairs.program("run", "-n", "2", "--", *words, "two-hints", *keys("mesh.tp=2")).weights == alone.weights
    (pairs.folder / "some.csv").write_text('text\nred blue\n""\n')
    told = pairs.program("predict", "hints", "some.csv")
    assert (
        told.code == 0 and "2 rows; 1 have no text and no translation" in told.err and len(told.out.splitlines()) == 2
    )
    assert pairs.program("explain", "hints", "red blue", "--out", "hints.html").code == 0
    pairs.program("evaluate", "hints", "--data", "pairs").refused("pairs has no hints", "prepare it with --hints")
    pairs.program("evaluate", "alone", "--data", "hinted").refused("hinted has hints", "prepare it without --hints")
    pairs.program("prepare", "pairs.tsv", "--out", "x", "--label", "reversed", "--hints").refused(
        "--hints is for pairs"
    )


def tokenizer_of(place: Place, folder: str) -> str:
    return str(json.loads((place.folder / folder / "catalog.json").read_text())["tokenizer"]["file"])


def test_adapters_of_a_model_with_hints_are_merged_into_one(pairs: Place) -> None:
    columns = ("--text", "text", "--target", "reversed", "--vocab", "272")
    assert pairs.program("prepare", "pairs.tsv", "--out", "own", *columns, "--hints").code == 0
    same = keys("data.dir=own", "model.context=16", "train.steps=3")
    assert pairs.program("train", "pairs.toml", "--run", "base", *same).code == 0
    tuned = pairs.program("finetune", "base", "pairs.toml", "--run", "tuned", *same, *keys("start.lora_rank=2"))
    assert tuned.code == 0, tuned.err
    assert pairs.program("merge", "tuned", "--out", "merged").code == 0
    (pairs.folder / "some.csv").write_text("text\nred blue\n")
    texts = [pairs.program("predict", run, "some.csv").out for run in ("tuned", "merged")]
    assert texts[0] == texts[1] and texts[0]
