"""`mlm-mpi verify` of real runs: whole, killed, of before. Each test of a death or a resume asks for the proof too."""

import json

from programs import EVERY_TWO


def test_a_run_of_one_rank(home, straight):
    found = home.program("verify", "straight", "--json")
    told = json.loads(found.out)
    assert found.code == 0 and told["proven"] and (told["steps"], told["ranks"]) == (6, {"0": 96}), found.err
    assert told["checkpoints"] == ["step-00000006", "step-00000004", "step-00000002"]


MEASURING = """
from mlm_mpi.train.run import Run

def before_step(rank, step):
    pass

Run._measure = lambda self: os._exit(9)
"""


def test_a_kill_behind_the_last_save_leaves_no_gap(place, straight):
    """All are killed while they measure what they have saved: no later start makes that step again."""
    killed = place.faulty(MEASURING, "run", 1, "--max-steps", "3")
    assert killed.code != 0 and place.checkpoints("run") == ["step-00000003"]
    assert place.train("run", None).weights == straight.weights
    assert place.proven("run").steps == 6


def test_a_run_of_before(place, home, straight):
    (place.copy_of(home, "straight") / "ledger.jsonl").unlink()
    assert place.train("straight", None, "train.steps=7", *EVERY_TWO).code == 0
    found = place.program("verify", "straight")
    assert found.code == 0 and "from step 7 on each sample was used exactly once\n" in found.out, found.out
