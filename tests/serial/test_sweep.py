"""Successive halving, and what tells runs apart."""

import json
import math
from pathlib import Path

import pytest

from mlm_mpi.commands import compare, sweep
from mlm_mpi.commands.sweep import Rung, candidates, halving, rungs
from mlm_mpi.errors import ConfigError, MlmError
from mlm_mpi.monitor.runs import LAST, told


@pytest.mark.parametrize(
    ("found", "steps", "eta", "wanted"),
    [
        (1, 300, 2, [(1, 300)]),
        (2, 300, 2, [(2, 150), (1, 300)]),
        (8, 300, 2, [(8, 37), (4, 74), (2, 148), (1, 300)]),
        (9, 300, 3, [(9, 33), (3, 99), (1, 300)]),
        (10, 300, 3, [(10, 11), (4, 33), (2, 99), (1, 300)]),
        (8, 3, 2, [(8, 1), (4, 2), (2, 3), (1, 3)]),
    ],
)
def test_rungs_climb_from_all_to_one(found: int, steps: int, eta: int, wanted: list[tuple[int, int]]):
    made = rungs(found, steps, eta)
    assert [(rung.candidates, rung.steps) for rung in made] == wanted
    assert all(rung.steps % made[0].steps == 0 for rung in made[:-1] if rung.steps < steps)  # so all are measured there


def test_candidates_are_all_combinations_in_order():
    made = candidates(["a.b=1,2", "c.d=x/y,z"], Path("out"))
    assert [one.settings for one in made] == [(f"a.b={b}", f"c.d={d}") for b in (1, 2) for d in ("x/y", "z")]
    assert made[0].run == Path("out/a.b=1,c.d=x_y")
    long = candidates([f"a.b={'7' * 300}1,{'7' * 300}2"], Path("out"))
    assert len({one.run for one in long}) == 2 and all(len(one.run.name) < 140 for one in long)


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ([], "nothing to try"),
        (["a.b"], "'a.b' names no values"),
        (["a.b=1,,2"], "names no values"),
        (["a.b=1,1"], "give each value once"),
        ([f"{key}={','.join(map(str, range(11)))}" for key in ("a.b", "c.d", "e.f")], "1,331 combinations are more"),
    ],
)
def test_what_names_no_candidates_is_refused(over: list[str], words: str):
    with pytest.raises(ConfigError, match=words):
        candidates(over, Path("out"))


def test_the_better_half_goes_on_and_a_failure_ends_one_candidate_only():
    found = candidates(["a.b=1,2,3,4"], Path("out"))
    losses = {"1": 5.0, "2": math.nan, "3": 3.0, "4": 3.0}
    asked = []

    def measure(candidate: sweep.Candidate, rung: Rung) -> float:
        asked.append((candidate.name, rung.steps))
        loss = losses[candidate.name[-1]]
        if math.isnan(loss):
            raise MlmError("not finite")
        return loss - rung.steps / 100

    results = halving(found, rungs(4, 8, 2), measure)
    assert asked == [("a.b=1", 2), ("a.b=2", 2), ("a.b=3", 2), ("a.b=4", 2), ("a.b=3", 4), ("a.b=4", 4), ("a.b=3", 8)]
    assert [(r.candidate.name[-1], r.reached, r.failed) for r in results] == [
        ("3", 8, ""), ("4", 4, ""), ("1", 2, ""), ("2", 0, "not finite"),
    ]  # fmt: skip
    assert results[0].heldout == 3.0 - 0.08


def run_folder(folder: Path, losses: list[float], heldout: dict[int, float], rate: float) -> Path:
    folder.mkdir()
    lines = []
    for step, loss in enumerate(losses, 1):
        line = {"step": step, "tokens": 100 * step, "loss": loss, "step_s": 0.5}
        lines.append(line | ({"heldout_loss": heldout[step]} if step in heldout else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.toml").write_text(f"[optim]\nlearning_rate = {rate}\n[train]\nsteps = 40\n")
    return folder


def test_runs_are_compared_by_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one = run_folder(tmp_path / "one", [float(n) for n in range(40, 0, -1)], {20: 3.5, 40: 2.5}, 0.01)
    two = run_folder(tmp_path / "two", [7.0] * 30, {10: 9.0, 20: 3.25}, 0.02)
    (one / "DONE").write_text(json.dumps({"step": 40, "weights_sha256": "abc" * 20}))
    assert told(one).loss == sum(range(1, LAST + 1)) / LAST and told(one).speed == 200.0
    assert compare.main(compare.argparse.Namespace(runs=[str(one), str(two)], plugins=None)) == 0
    head, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == [
        "run",
        "optim.learning_rate",
        "steps",
        "loss",
        "held-out",
        "held-out",
        "at",
        "20",
        "tokens/s",
        "weights",
    ]
    assert lines[0] == [str(one), "0.01", "40", "10.5000", "2.5000", "3.5000", "200", "abcabcabcabc"]
    assert lines[1] == [str(two), "0.02", "30", "7.0000", "3.2500", "3.2500", "200", "-"]


def test_what_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="name two or more"):
        compare.main(compare.argparse.Namespace(runs=["a"], plugins=None))
    with pytest.raises(ConfigError, match="is no run folder"):
        told(tmp_path / "nothing")
