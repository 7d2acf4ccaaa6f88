"""A sweep as a user meets it: trains, halves, goes on where it was stopped, names what failed."""

import shutil

import pytest

OVER = ("--over", "optim.learning_rate=1e-3,4e-3", "--over", "model.dropout=0.0,0.9")


@pytest.mark.slow
def test_a_sweep_halves_and_the_same_command_finds_it_done(place):
    words = ["sweep", str(place.config), "--out", "sweeps", *OVER, "--set", "eval.windows=4"]
    first = place.program(*words)
    assert first.code == 0, first.err
    assert first.out.startswith("rung 1: 4 × 1 steps\nrung 2: 2 × 2 steps\nrung 3: 1 × 6 steps\n")
    *_, best = first.out.splitlines()
    assert best.startswith("best: optim.learning_rate=") and len(list((place.folder / "sweeps").iterdir())) == 4
    again = place.program(*words)
    assert again.out == first.out
    found = sorted((place.folder / "sweeps").iterdir())
    compared = place.program("compare", *map(str, found))
    head, *rows = compared.out.splitlines()
    assert head.split()[:3] == ["run", "model.dropout", "optim.learning_rate"] and len(rows) == 4
    shutil.rmtree(found[0])
    (place.folder / "sweeps" / found[0].name).write_text("no folder")
    broken = place.program(*words)
    assert broken.code == 0 and f"{found[0].name.replace(',', ' ')} failed: " in broken.out
