"""What `mlm-mpi chaos` draws, and what it finds wrong."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mlm_mpi.__main__ import main
from mlm_mpi.chaos.faults import FAULTS, Plan, drawn
from mlm_mpi.chaos.inside import ACTS
from mlm_mpi.chaos.trials import Outcome, Trials, unproven
from mlm_mpi.commands import chaos
from mlm_mpi.errors import ConfigError
from mlm_mpi.train import proof
from mlm_mpi.train.proof import Proof


@pytest.mark.parametrize("fault", FAULTS)
def test_what_happens_follows_from_the_seed(fault):
    plans = [drawn(fault, trial, 7, 4, 12) for trial in range(200)]
    assert plans == [drawn(fault, trial, 7, 4, 12) for trial in range(200)]
    assert plans != [drawn(fault, trial, 8, 4, 12) for trial in range(200)]
    assert {plan.step for plan in plans} == set(range(1, 12)) and all(0 <= plan.delay < 1 for plan in plans)
    counts = {len(plan.victims) for plan in plans}
    assert all(len({*plan.victims}) == len(plan.victims) for plan in plans)
    every = {name: {4} for name in ("kill-all", "poison", "nan-data", "disk")}
    nobody = {name: {0} for name in ("kill-launcher", "usr1", "term")}
    assert counts == {"kill-many": {1, 2, 3}, "kill-twice": {2}, **every, **nobody}.get(fault, {1})


def test_what_is_not_done_from_outside_is_done_inside():
    assert {name for name, fault in FAULTS.items() if fault.act is None} == {*ACTS} - {"left-out"}


def test_somebody_is_left_of_two_ranks():
    for fault in ("kill-many", "kill-twice"):
        assert all(len(drawn(fault, trial, 0, 2, 5).victims) == 1 for trial in range(20))


HASH = f"weights sha256 {'a' * 64}"
LINES = [f'{{"step": {step}, "loss": {step / 2}}}' for step in (1, 2, 3)]


@pytest.mark.parametrize(
    ("said", "lines", "left", "wrong"),
    [
        (HASH, LINES, "", ""),
        (f"weights sha256 {'b' * 64}", LINES, "", "exit code 0, " + "b" * 64),
        ("a word", LINES, "", "exit code 0, no hash: a word"),
        (HASH, LINES[:2], "", "metrics.jsonl has steps [1, 2]"),
        (HASH, [*LINES[:2], *LINES[1:]], "", "metrics.jsonl has steps [1, 2, 2, 3]"),
        (HASH, [*LINES[:2], LINES[2].replace("1.5", "1.25")], "", "losses differ"),
        (HASH, LINES, ".writing-step-00000002", ".writing-step-00000002 was left"),
    ],
)
def test_another_run_than_the_undisturbed_one_is_found_out(tmp_path, monkeypatch, said, lines, left, wrong):
    monkeypatch.setattr(proof, "prove", lambda run: Proof())
    judge, expected = Trials("", [], 2, 3, tmp_path), ("a" * 64, [0.5, 1.0, 1.5])
    (tmp_path / "checkpoints" / left).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    weights = said.split()[2] if said.startswith("weights sha256") else ""
    job = SimpleNamespace(weights=weights, text=said, process=SimpleNamespace(returncode=0))
    found = judge._wrong(job, tmp_path, *expected)
    assert found.startswith(wrong) and bool(found) == bool(wrong)


def test_a_trial_without_proof_has_failed(tmp_path, monkeypatch):
    for found, wrong in (
        (Proof(wrong=["step 2 has no line", "more"]), "verify: step 2 has no line"),
        (Proof(unproven="no corpus"), "verify: no corpus"),
        (Proof(), ""),
    ):
        monkeypatch.setattr(proof, "prove", lambda run, found=found: found)
        assert unproven(tmp_path) == wrong
    monkeypatch.undo()
    assert unproven(tmp_path).startswith(f"verify: {tmp_path} has no ledger.jsonl")
    with pytest.raises(ConfigError):
        proof.prove(tmp_path)


def test_the_table_counts_what_passed():
    plan = Plan("kill", 1, 0.0, (1,))
    outcomes = [Outcome(plan, went_on_s=[0.01 * n]) for n in range(1, 21)] + [Outcome(plan, "it hung")]
    assert chaos.table(outcomes).splitlines()[-1] == "| kill | 21 | 20 | 0 | 105 | 190 | 200 |"
    assert chaos.table([Outcome(plan, again=True)]).splitlines()[-1] == "| kill | 1 | 1 | 1 | – | – | – |"


def test_what_keeps_others_from_going_on_is_named_alone(capsys):
    config = str(Path(__file__).parents[2] / "jobs" / "configs" / "tiny.toml")
    assert main(["chaos", config, "-n", "3", "--set", "mesh.zero=2"]) == 2
    said = "mesh.zero = 2: faults are for ranks that hold all, so that others can go on: set mesh.zero = 0\n"
    assert capsys.readouterr().err == f"mlm-mpi: {said}"
