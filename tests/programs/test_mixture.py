"""A mixture whose micro-batches grow, as a user meets it: any number of ranks, killed within a stage, other weights."""

import json
from pathlib import Path

import pytest
from programs import make_text, prepare

KILL = """
import signal
def before_step(rank, step):
    if rank == 1 and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
"""
GROWING = (
    "train.rows=4", "train.rows_warmup_steps=3", "model.context=32", "train.first_context=8",
    "train.context_warmup_steps=5", "eval.windows=10",
)  # fmt: skip
SAVED = ("checkpoint.every=1", "checkpoint.background=false")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second corpus of bytes."""
    folder = tmp_path_factory.mktemp("second")
    return prepare(make_text(folder / "text", 2), folder / "corpus", "--tokenizer", "bytes", "--heldout", "0.2")


@pytest.fixture
def mixture(place, other) -> tuple[str, str]:
    return f'data.mixture=["{place.corpus}", "{other}"]', "data.weights=[0.7, 0.3]"


def test_the_weights_are_those_of_one_rank(place, other, mixture):
    straight = place.train("straight", None, *mixture, *GROWING)
    for line in (
        f"mixture           70.0% {place.corpus}, 0.", f"mixture           30.0% {other}, 0.1 epochs of its ",
        "warm-up           rows 1, 2 from step 2, 4 from step 4", "context 8, 16 from step 3, 32 from step 6",
        f"held-out  {place.corpus} ",
    ):  # fmt: skip
        assert line in straight.out
    assert place.train("run", 3, *mixture, *GROWING).weights == straight.weights
    assert place.proven("run").steps == 6
    lines = [json.loads(line) for line in (place.folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [512 * rows for rows in (1, 3, 5, 9, 13, 17)]


@pytest.mark.slow
def test_killed_within_a_stage_and_resumed_on_fewer_ranks(place, other, mixture):
    straight = place.train("straight", None, *mixture, *GROWING)
    killed = place.faulty(KILL, "run", 3, *mixture, *GROWING, *SAVED)
    assert killed.code != 0 and place.checkpoints("run")[-1] in ("step-00000002", "step-00000003")
    place.train("run", None, mixture[0], "data.weights=[0.5, 0.5]", *GROWING).refused(
        "was saved with other settings (data.weights: [0.7, 0.3] → [0.5, 0.5]): restore them"
    )
    place.train("run", None, *GROWING).refused(f"another catalog than {place.corpus} holds", "(0.7 of ", "; 0.3 of ")
    assert place.train("run", 2, *mixture, *GROWING).weights == straight.weights
    assert place.losses("run") == place.losses("straight") and place.proven("run").steps == 6
    told = json.loads(place.program("evaluate", "run", "--json").out)
    assert list(told["loss_by_corpus"]) == [str(place.corpus), str(other)]
    place.program("evaluate", "run", "--baselines").refused("--baselines are of one corpus", "give one by --data DIR")
