"""Preferences as whole programs: planted ones are learnt, one hash on any mesh and past a kill, what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from programs import RANK_DIES, Place

CALLS = {"cat": "meow", "dog": "woof", "cow": "moo", "owl": "hoot"}
TALKS = """
[model]
kind = "llama"
layers = 2
width = 32
heads = 2
context = 48
init_std = 0.2
[task]
kind = "dialogue"
[data]
dir = "talks"
[train]
steps = 120
micro_batches = 3
rows = 4
[optim]
learning_rate = 1e-2
warmup_steps = 3
[eval]
every = 0
[log]
curve = false
"""
PAIRS = """
[task]
kind = "preference"
[data]
dir = "pairs"
[train]
steps = 30
micro_batches = 3
rows = 4
[optim]
learning_rate = 5e-4
warmup_steps = 3
[eval]
every = 0
figure = "accuracy"
[log]
curve = false
"""
FEW = ("--set", "train.steps=4", "--set", "checkpoint.every=1")


def talks() -> tuple[str, str]:
    """Animals say their sounds, the first two of them loudly; and pairs of which the loud one is always chosen."""
    said, pairs = [], []
    for number in range(240):
        name = list(CALLS)[number % 4]
        asked, loud, low = {"role": "user", "content": f"a {name}, {number}"}, f"{CALLS[name]}!", f"{CALLS[name]}."
        answer = loud if number % 4 < 2 else low
        said.append(json.dumps({"messages": [asked, {"role": "assistant", "content": answer}]}))
        pairs.append(json.dumps({"messages": [asked], "chosen": loud, "rejected": low}))
    return "\n".join(said) + "\n", "\n".join(pairs) + "\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Place:
    """A model that answers in the run `first`, and pairs prepared with its tokenizer."""
    home = Place(tmp_path_factory.mktemp("pairs"), corpus)
    for name, content in zip(("talks.jsonl", "pairs.jsonl"), talks(), strict=True):
        (home.folder / name).write_text(content)
    (home.folder / "talks.toml").write_text(TALKS)
    (home.folder / "pairs.toml").write_text(PAIRS)
    assert home.program("prepare", "talks.jsonl", "--out", "talks", "--chat", "--vocab", "264").code == 0
    (tokenizer,) = (home.folder / "talks").glob("tokenizer-*.json")
    made = home.program("prepare", "pairs.jsonl", "--out", "pairs", "--chat", "--tokenizer", str(tokenizer))
    assert made.code == 0 and "240 read, 240 kept" in made.out, made.err
    home.weights = home.program("train", "talks.toml", "--run", "first").weights
    return home


@pytest.fixture(scope="module")
def few(place: Place) -> str:
    """The weights after a few steps on one rank."""
    return place.program("finetune", "first", "pairs.toml", "--run", "few", *FEW).weights


def answers(home: Place, run: str) -> list[str]:
    command = [sys.executable, "-P", "-m", "mlm_mpi", "chat", run, "--temperature", "0"]
    asked = "a dog, 7\n/reset\na cow, 100\n/reset\na cat, 31\n/reset\nan owl, 55\n"
    return subprocess.run(command, cwd=home.folder, input=asked, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.slow
def test_planted_preferences_are_learnt(place: Place) -> None:
    assert answers(place, "first") == ["woof!", "moo.", "meow!", "hoot."]
    tuned = place.program("finetune", "first", "pairs.toml", "--run", "tuned")
    assert tuned.code == 0 and "pairs             " in tuned.out, tuned.err
    told = json.loads(place.program("evaluate", "tuned", "--split", "test", "--baselines", "--json").out)
    assert 0.2 < told["start_accuracy"] < 0.8 and told["accuracy"] >= 0.95 and told["loss"] < 0.35
    assert told["margin"] == pytest.approx(told["chosen_reward"] - told["rejected_reward"]) and told["margin"] > 1
    assert answers(place, "tuned") == ["woof!", "moo!", "meow!", "hoot!"]
    lines = place.program("run", "-n", "2", "--", "evaluate", "tuned").out
    assert "accuracy            100.00% of pairs have a margin above 0" in lines and "(0.6931 at the start)" in lines


MESHES = {
    "two": ("2",), "three": ("3",), "zero": ("2", "mesh.zero=3"), "sequence": ("2", "mesh.tp=2", "mesh.sequence=true"),
    "pp": ("2", "mesh.pp=2", "train.schedule=one_f_one_b"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_one_hash_and_one_reference_on_any_mesh_and_past_a_stop(place: Place, few: str, mesh: str) -> None:
    """The first two steps on one mesh, the others on one rank, without the run that it began with."""
    ranks, *words = MESHES[mesh]
    sets = [part for word in words for part in ("--set", word)]
    begun = ("finetune", "first", "pairs.toml", "--run", mesh, *FEW)
    stopped = place.program("run", "-n", ranks, "--", *begun, *sets, "--max-steps", "2")
    assert stopped.code == 0 and "stopped after step 2" in stopped.out, stopped.err
    kept = [(place.folder / run / "reference.json").read_bytes() for run in ("few", mesh)]
    first, away = place.folder / "first", place.folder / "away"
    first.rename(away)
    again = place.program(*begun)
    away.rename(first)
    assert again.weights == few and kept[0] == kept[1]


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 2])
def test_a_run_of_which_a_rank_was_killed_goes_on_to_the_same_weights(place: Place, few: str, step: int) -> None:
    """Killed before the first checkpoint too, when the reference was measured already."""
    words = ("finetune", "first", "pairs.toml", "--run", f"killed{step}", *FEW)
    killed = place.faulty_program(RANK_DIES.format(step=step), 3, *words)
    assert killed.code != 0 and "weights sha256" not in killed.out
    assert place.program("run", "-n", "2", "--", *words).weights == few
    assert place.proven(f"killed{step}").steps == 4


@pytest.mark.slow
def test_what_it_is_compared_with_is_refused_where_it_is_gone(place: Place, few: str) -> None:
    kept = place.folder / "few" / "reference.json"
    content = kept.read_bytes()
    kept.unlink()
    place.program("evaluate", "few").refused("few/reference.json cannot be read", "put it back as it was")
    more = ("finetune", "first", "pairs.toml", "--run", "few", *FEW, "--set", "train.steps=5")
    three = place.program("run", "-n", "3", "--", *more)
    assert three.code == 2 and "few/reference.json cannot be read" in three.err, three.err
    kept.write_bytes(content)
    place.program("evaluate", "few", "--data", "talks").refused("has dialogues, not preferences")
    place.program("train", "pairs.toml", "--run", "none").refused("set start.checkpoint, or begin by")
