"""Whole programs on the stand-in's GPUs: the same promises as on the CPU."""

import json

import pytest

pytest.importorskip("msgspec", reason="whole programs read their configuration with msgspec")

from conftest import ON_GPU
from programs import Place, make_text, prepare

from mlm_mpi.train.checkpoint import read_manifest

GPU = "backend.device=gpu"
needs_standin = pytest.mark.skipif(ON_GPU, reason="asks the stand-in for other GPUs or libraries than there are")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return prepare(make_text(folder / "text"), folder / "corpus", "--tokenizer", "bytes", "--heldout", "0.04")


@pytest.fixture(scope="module")
def home(tmp_path_factory, corpus):
    return Place(tmp_path_factory.mktemp("home"), corpus)


@pytest.fixture(scope="module")
def straight(home):
    """Six steps on one rank and one GPU."""
    return home.train("straight", None, GPU, "checkpoint.every=3", "checkpoint.keep=3")


def losses(home, run):
    lines = (home.folder / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, ("comm.gpu_aware=no",)),
        (3, ("comm.gpu_aware=no",)),
        pytest.param(3, ("comm.gpu_aware=yes",), marks=needs_standin),  # PyPI's MPI reads no real GPU's memory
        (2, ("comm.gpu_aware=no", "comm.overlap=false")),
    ],
)
def test_any_number_of_ranks_gives_the_same_bits(home, straight, ranks, options):
    run = f"ranks{ranks}{len(options)}{options[0][-3:]}"
    assert home.train(run, ranks, GPU, *options).weights == straight.weights


def test_resume_on_another_number_of_ranks_gives_the_same_bits(home, straight):
    first = home.program(*home.words("resumed", 3, GPU), "--max-steps", "3")
    assert first.code == 0, first.err
    assert home.train("resumed", 2, GPU).weights == straight.weights


def test_losses_are_those_of_the_cpu(home, straight):
    assert straight.code == 0, straight.err
    home.train("cpu", None)
    assert losses(home, "straight") == pytest.approx(losses(home, "cpu"), rel=1e-5)


def test_bf16_is_close_to_float32(home, straight):
    assert straight.code == 0, straight.err
    ended = home.train("bf16", None, GPU, "numerics.products=bf16")
    assert ended.code == 0, ended.err
    assert losses(home, "bf16") == pytest.approx(losses(home, "straight"), rel=2e-2)


def test_bf16_has_the_same_bits_on_two_ranks(home):
    one = home.train("bf16one", None, GPU, "numerics.products=bf16")
    assert home.train("bf16two", 2, GPU, "numerics.products=bf16").weights == one.weights


def test_a_bf16_run_can_be_evaluated_on_any_cpu(home):
    home.train("bf16eval", None, GPU, "numerics.products=bf16")
    gpu, cpu = (
        json.loads(home.program("evaluate", "bf16eval", "--json", "--device", device).out) for device in ("gpu", "cpu")
    )
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=1e-2)


@pytest.fixture(scope="module")
def texts(home):
    """Labelled texts of different lengths."""
    rows = [f"{'the ' * (n % 7)}{'cat' if n % 2 else 'saw'} {n}\t{'ab'[n % 2]}\n" for n in range(120)]
    (home.folder / "texts.tsv").write_text("text\tlabel\n" + "".join(rows))
    made = home.program("prepare", "texts.tsv", "--out", "texts", "--label", "label", "--tokenizer", "bytes")
    assert made.code == 0, made.err


@pytest.mark.slow
@pytest.mark.parametrize("task", ["masked_language_model", "classification"])
@pytest.mark.parametrize("products", ["float32", "bf16"])
@pytest.mark.usefixtures("texts")
def test_an_encoder_has_the_same_bits_on_two_ranks_and_the_losses_of_the_cpu(home, task, products):
    """Hidden tokens, or texts in a row: micro-batches differ in shape."""
    encoder = ["model.kind=bert", "model.context=32", f"task.kind={task}", "train.steps=2"]
    encoder += ["data.dir=texts", "task.pooling=mean"] if task == "classification" else []
    words, run = [GPU, f"numerics.products={products}"], f"{task}-{products}"
    one, two = (home.train(f"{run}-{ranks}", ranks, *encoder, *words) for ranks in (None, 2))
    assert two.weights == one.weights
    home.train(f"{run}-cpu", None, *encoder)
    assert losses(home, f"{run}-None") == pytest.approx(
        losses(home, f"{run}-cpu"), rel=1e-5 if products == "float32" else 2e-2
    )


@pytest.mark.parametrize("reduction", ["allreduce", pytest.param("nccl", marks=needs_standin)])
def test_other_reductions_agree_within_rounding(home, straight, reduction):
    assert straight.code == 0, straight.err
    words = home.words(reduction, 2, GPU, f"comm.reduction={reduction}", "comm.gpu_aware=no")
    ended = home.program(*words, MLM_MPI_STANDIN_GPUS="2")
    assert ended.code == 0, ended.err
    assert losses(home, reduction) == pytest.approx(losses(home, "straight"), rel=1e-5)


@needs_standin
def test_nccl_is_refused_where_ranks_share_a_gpu(home):
    home.train("shared", 2, GPU, "comm.reduction=nccl").refused("2 ranks share 1")


@needs_standin
def test_nccl_is_refused_without_its_library(home):
    words = home.words("library", 2, GPU, "comm.reduction=nccl")
    ended = home.program(*words, MLM_MPI_STANDIN_GPUS="2", MLM_MPI_STANDIN_NCCL="0")
    ended.refused("CuPy finds no NCCL", "pip install nvidia-nccl-cu13", "canonical")


def test_a_run_that_changes_device_says_so(home):
    first = home.program(*home.words("moved", None, GPU), "--max-steps", "3")
    assert first.code == 0, first.err
    ended = home.train("moved", None)
    assert ended.code == 0, ended.err
    assert "not comparable" in ended.out.splitlines()[-1]
    manifest = read_manifest(home.folder / "moved" / "checkpoints" / "step-00000006")
    assert manifest.incomparable.startswith("the run was resumed with another")


def test_evaluate_and_generate_on_either_device(home, straight):
    assert straight.code == 0, straight.err
    gpu, cpu = (
        json.loads(home.program("evaluate", "straight", "--json", "--device", device).out) for device in ("gpu", "cpu")
    )
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=1e-6)
    words = ("generate", "straight", "--prompt", "ab", "--tokens", "8", "--temperature", "0", "--device")
    assert home.program(*words, "gpu").out == home.program(*words, "cpu").out


def test_a_model_too_large_for_the_gpu_is_refused(home):
    ended = home.train("large", None, GPU, "model.width=16384", "model.layers=48")
    ended.refused("a rank needs at least 2,304.3 GiB (parameters 2,304.2", "its GPU has ", "lower model.width")


@needs_standin
def test_without_a_gpu_one_line_says_what_to_do(home):
    words = home.words("none", 2, GPU)
    home.program(*words, MLM_MPI_STANDIN_GPUS="0").refused("backend.device = gpu", "--device cpu")


@needs_standin
@pytest.mark.parametrize(
    ("found", "words"), [("", ("no NVRTC", "cupy-cuda13x[ctk]")), ("12.8", ("NVRTC 12.8", "sm_90a", "12.9 or newer"))]
)
def test_without_a_compiler_one_line_says_what_to_install(home, found, words):
    home.program(*home.words("nvrtc", 2, GPU), MLM_MPI_STANDIN_NVRTC=found).refused(*words)


@needs_standin
def test_without_cupy_one_line_says_what_to_install(home):
    ended = home.program(*home.words("nocupy", None, GPU), PYTHONPATH="")
    if "CUDA finds no GPU" not in ended.err:  # this Python has a real CuPy
        ended.refused("pip install 'cupy-cuda13x[ctk]'")


def test_graphs_give_the_same_bits(home):
    """Lanes of two micro-batches: a buffer is written first and added to then, which are two graphs."""
    plain = home.train("plain", None, GPU, "model.dropout=0.0")
    for ranks in (None, 2):
        graphs = home.train(f"graphs{ranks}", ranks, GPU, "model.dropout=0.0", "backend.graphs=true")
        assert graphs.weights == plain.weights


def test_graphs_are_refused_with_dropout(home):
    home.train("graphs", None, GPU, "backend.graphs=true").refused("backend.graphs", "model.dropout = 0.1")


@needs_standin
def test_doctor_names_gpus_and_their_kernels(home):
    said = home.program("doctor", MLM_MPI_STANDIN_GPUS="2").out
    assert "gpu 1" in said and "stand-in, sm_90, 1.0 GiB" in said and "CUDA kernel (hopper, mma, plain, sm_90a)" in said
    assert "CUDA finds no GPU" in home.program("doctor", MLM_MPI_STANDIN_GPUS="0").out
