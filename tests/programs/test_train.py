"""The first promise, as a user meets it: the same weights on any number of ranks."""

import json
import shlex
from datetime import datetime

import numpy as np
import pytest
from programs import EVERY_TWO, make_text, prepare

from mlm_mpi.backend.cpu import library


@pytest.mark.parametrize("ranks", [*(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 3)), 4])
def test_the_weights_and_losses_are_those_of_one_rank(place, home, straight, ranks):
    run = place.train("run", ranks)
    assert run.weights == straight.weights
    assert place.losses("run") == home.losses("straight")
    assert run.err == ""


@pytest.mark.slow
def test_an_allreduce_comes_close(place, home, straight):
    run = place.train("run", 3, "comm.reduction=allreduce")
    assert run.code == 0, run.err
    np.testing.assert_allclose([a for a, _ in place.losses("run")], [a for a, _ in home.losses("straight")], rtol=1e-4)


def test_what_a_run_leaves_behind(home, straight):
    folder = home.folder / "straight"
    done = json.loads((folder / "DONE").read_text())
    assert (done["step"], done["weights_sha256"]) == (6, straight.weights)
    assert datetime.fromisoformat(done["time"]).tzinfo is not None
    assert not (folder / "loss.png").exists(), "log.curve is off in these tests: it takes a second a run"
    assert "steps = 6" in (folder / "config.toml").read_text()
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["fingerprint"]["lanes"] == 8
    assert environment["command"] == shlex.join(["mlm-mpi", *home.words("straight", None, *EVERY_TWO)])
    assert [heldout is not None for _, heldout in home.losses("straight")] == [False, False, True] * 2
    losses = [loss for loss, _ in home.losses("straight")]
    assert losses[-1] < losses[0]


def test_a_corpus_that_holds_nothing_out_trains_without_held_out_loss(place, tmp_path):
    whole = prepare(make_text(tmp_path / "text"), tmp_path / "whole", "--tokenizer", "bytes", "--heldout", "0")
    run = place.train("run", None, f"data.dir={whole}", "train.steps=2")
    assert run.weights and place.checkpoints("run") == ["step-00000002"]
    assert [heldout for _, heldout in place.losses("run")] == [None, None]


def test_quiet_says_the_last_words_only(place):
    run = place.train("run", None, "train.steps=2", "--quiet")
    assert [line.split()[0] for line in run.out.splitlines()] == ["step", "fingerprint", "weights"]


@pytest.mark.slow
@pytest.mark.skipif(not library.runs("base"), reason="no compiled library")
def test_bf16_learns_as_float32_does(place):
    """Products in the plain C form, which has the instruction's bits: 30 steps from 5.6 nats end within 2 % of float32.

    Any CPU reads what became of it, in float32."""
    words = ("train.steps=30", "train.micro_batches=8", "model.dropout=0", "checkpoint.every=0", "eval.every=0")
    full = place.train("full", None, *words)
    half = place.program(*place.words("half", None, *words, "numerics.products=bf16"), MLM_MPI_BF16="portable")
    assert half.weights != full.weights and "bf16 products in plain C, MLM_MPI_BF16=portable" in half.out
    (*_, (expected, _)), (*_, (loss, _)) = place.losses("full"), place.losses("half")
    assert expected < 4 and loss == pytest.approx(expected, rel=0.02)
    read = place.program("evaluate", "half")
    assert read.code == 0 and "bits per character" in read.out


@pytest.mark.slow
@pytest.mark.skipif(not library.runs("base"), reason="no compiled library")
def test_an_encoder_in_bf16_has_one_hash_on_two_ranks(place):
    words = ("model.kind=bert", "task.kind=masked_language_model", "numerics.products=bf16", "train.steps=3")
    alone, two = (
        place.program(*place.words(f"run{ranks}", ranks, *words), MLM_MPI_BF16="portable") for ranks in (None, 2)
    )
    assert two.weights == alone.weights and "bf16 products in plain C" in alone.out


def test_a_pinned_level_trains(place):
    if not library.runs("base"):
        pytest.skip("no compiled library")
    ended = place.train("run", None, "numerics.level=base", "--max-steps", "1")
    assert ended.code == 0, ended.err
    assert "C kernel (base)" in ended.out


@pytest.mark.skipif(not library.runs("avx2"), reason="no AVX2, or no compiled library")
def test_another_kind_of_cpu_prints_the_same_line(place, straight):
    """This CPU, which may have AVX-512, as if it had AVX2 only: our kernels, BLAS and NumPy; and with two threads."""
    narrow = place.train("narrow", None, "numerics.level=avx2", "numerics.threads=2")
    assert "C kernel (avx2)" in narrow.out
    assert narrow.out.splitlines()[-1] == straight.out.splitlines()[-1]
