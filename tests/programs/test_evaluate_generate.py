"""`mlm-mpi evaluate` and `generate`: the run's own numbers, texts that repeat, and no MPI anywhere."""

import json
import math
import os
from pathlib import Path

import pytest
from programs import SOON_S

from mlm_mpi.tasks import language_model as lm


@pytest.fixture(scope="module")
def without_mpi(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `import mpi4py` fails and no program can be found."""
    package = tmp_path_factory.mktemp("no_mpi") / "mpi4py"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('there is no MPI here')\n")
    return {"PYTHONPATH": str(package.parent), "PATH": "/nowhere"}


def test_evaluate_says_what_the_run_said(home, straight, without_mpi):
    done = home.program("evaluate", "straight", "--json", "--baselines", **without_mpi)
    assert done.code == 0, done.err
    numbers = json.loads(done.out)
    last = home.losses("straight")[-1][1]
    assert abs(numbers["loss"] - last) < 1e-6
    assert numbers["step"] == 6
    assert math.isclose(numbers["perplexity"], math.exp(last), rel_tol=1e-6)
    assert numbers["tokens"] == numbers["characters"]  # one document: its end is a target, its first token is none
    assert math.isclose(
        numbers["bits_per_character"], last / math.log(2) * numbers["tokens"] / numbers["characters"], rel_tol=1e-6
    )
    assert 1 < numbers["unigram_bits_per_character"] < 4
    assert 1 < numbers["xz_bits_per_character"] < 4


def test_evaluate_in_words(home, straight):
    done = home.program("evaluate", "straight", "--baselines")
    assert (done.code, done.err) == (0, "")
    assert f"loss                {home.losses('straight')[-1][1]:.4f} nats per token" in done.out
    assert "unigram" in done.out and "xz" in done.out


def test_generate_repeats_by_seed_and_needs_no_mpi(home, straight, without_mpi):
    words = ("generate", "straight", "--prompt", "abc ", "--tokens", "60")
    first = home.program(*words, "--seed", "5", **without_mpi)
    assert (first.code, first.err) == (0, "")
    assert first.out.startswith("abc ")
    assert home.program(*words, "--seed", "5").out == first.out
    assert home.program(*words, "--seed", "6").out != first.out
    greedy = home.program(*words, "--temperature", "0", "--seed", "1")
    assert home.program(*words, "--temperature", "0", "--seed", "2").out == greedy.out
    assert home.program(*words, "--top-k", "1").out == greedy.out


def test_generate_takes_any_bytes_and_a_reader_that_leaves(home, straight):
    done = home.program("generate", "straight", "--prompt", os.fsdecode(b"ab\xff"), "--tokens", "3")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("ab\ufffd")
    process = home.start("generate", "straight", "--prompt", "abc", "--tokens", "100000")
    assert process.stdout is not None
    assert process.stdout.read(3) == "abc"
    process.stdout.close()
    assert process.wait(timeout=SOON_S) == 141
    assert process.stderr is not None and process.stderr.read() == ""


def test_train_alone_needs_no_mpi(place, without_mpi):
    run = place.program(*place.words("run", None, "train.steps=2"), **without_mpi)
    assert run.weights


@pytest.mark.parametrize("prompt", ["", "a", "abcde fgh", "a prompt that is longer than the sixteen tokens of context"])
def test_the_cache_changes_no_text_past_the_end_of_the_context(home, straight, prompt):
    trained = lm.load(Path(home.folder, "straight"))
    ids = [trained.tokenizer.eot, *trained.tokenizer.encode(prompt)]
    greedy = lm.Sampling(temperature=0)
    texts = []
    for cached in (True, False):
        continuation = lm.continue_prompt(trained.stack, trained.config.model.context, ids, greedy, cached)
        texts.append([next(continuation) for _ in range(50)])
    assert texts[0] == texts[1]
