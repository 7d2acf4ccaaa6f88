"""Six steps are three steps, a checkpoint, three steps: exactly, on any number of ranks, past torn checkpoints."""

import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from whole import blocks_of

from mlm_mpi import config as configuration
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.data.catalog import Catalog
from mlm_mpi.params.store import FlatStore
from mlm_mpi.train import checkpoint


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("checkpoint.every=2",),
        pytest.param(("checkpoint.every=2", "checkpoint.background=false"), marks=pytest.mark.slow),
    ],
)
def test_three_steps_and_three_steps_are_six(place, home, straight, settings):
    first = place.train("run", 2, "--max-steps", "3", *settings)
    assert first.said_weights != straight.weights
    assert first.out.splitlines()[-3].startswith("stopped after step 3 of 6 ")
    assert not (place.folder / "run" / "DONE").exists()
    assert place.proven("run").ranks == {0: 24, 1: 24}
    second = place.train("run", 3, *settings)
    assert second.weights == straight.weights
    assert place.losses("run") == home.losses("straight")
    assert (place.folder / "run" / "DONE").exists()
    assert place.proven("run").ranks == {0: 24 + 18, 1: 24 + 18, 2: 12}
    # the newest two stay
    assert place.checkpoints("run") == (
        ["step-00000004", "step-00000006"] if settings else ["step-00000003", "step-00000006"]
    )


def test_a_finished_run_does_no_step_and_says_the_same(place, home, straight):
    run = place.copy_of(home, "straight")
    files = [path for path in run.rglob("*") if path.is_file() and path.name != "run.lock"]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files if path.name != "DONE"}
    done = (run / "DONE").read_text()
    os.utime(run / "DONE", (0, 0))
    again = place.train("straight", 2, "checkpoint.every=2", "checkpoint.keep=3")
    assert again.weights == straight.weights
    said = again.out.splitlines()
    assert said[0].startswith("straight is complete: all 6 steps are made (ended 20")
    assert said[1].startswith("to go on, raise train.steps above 6; to train anew, give another --run")
    assert [line.split()[0] for line in said[2:]] == ["fingerprint", "weights"]
    assert said[-2:] == straight.out.splitlines()[-2:]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert (run / "DONE").read_text() == done
    assert (run / "DONE").stat().st_mtime > 0, "the job script sees that this start found the run complete"
    longer = place.train("straight", None, "train.steps=7")
    assert "run               steps 7 to 7," in longer.out and json.loads((run / "DONE").read_text())["step"] == 7
    assert len(place.losses("straight")) == 7


def test_resume_never_and_must(place, home, straight):
    place.train("new", None, "--resume", "must").refused("new/checkpoints holds no checkpoint and --resume is must")
    assert not (place.folder / "new").exists()
    place.copy_of(home, "straight")
    place.train("straight", None, "--resume", "never").refused("straight holds step-00000006 and --resume is never")


def test_the_index_opens_in_plain_h5py(place):
    """Two writers: each array lies in two parts, the index joins them."""
    run = place.train("run", 2, "train.steps=2")
    assert run.code == 0, run.err
    folder = place.folder / "run" / "checkpoints" / "step-00000002"
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.h5",
        "manifest.json",
        "part-0000.h5",
        "part-0001.h5",
        "tokenizer.json",
    ]
    assert (folder / "tokenizer.json").read_bytes() == Catalog.open(place.corpus).tokenizer().content
    manifest = checkpoint.read_manifest(folder)
    store = FlatStore(blocks_of(configuration.load(place.config).model, manifest.vocabulary), Mesh(), "f4")
    buffers = {name: store.new_buffer() for name in manifest.buffers} | {"weights": store.data}
    checkpoint.restore(folder, manifest, store, buffers)
    assert store.weights_sha256() == run.weights
    with h5py.File(folder / "index.h5") as file:
        assert file.attrs["step"] == 2
        for kind, flat in buffers.items():
            for name, value in store.named(flat).items():
                assert np.array_equal(file[f"{kind}/{name}"][...], value)


def flip_a_bit(folder: Path) -> str:
    path = folder / "part-0000.h5"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "part-0000.h5 does not match the SHA-256 in its manifest"


def flip_a_bit_of_the_tokenizer(folder: Path) -> str:
    path = folder / "tokenizer.json"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "tokenizer.json does not match the SHA-256 in its manifest"


def truncate(folder: Path) -> str:
    path = folder / "part-0000.h5"
    path.write_bytes(path.read_bytes()[:-7])
    return "its manifest says"


def delete(folder: Path) -> str:
    (folder / "part-0000.h5").unlink()
    return "part-0000.h5 cannot be read"


def corrupt_manifest(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"step":', b'"step":1'))
    return "manifest.json does not match its own SHA-256"


def empty_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_bytes(b"")
    return "manifest.json cannot be read"


DAMAGES = [flip_a_bit, truncate, delete, corrupt_manifest, empty_manifest, flip_a_bit_of_the_tokenizer]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(place, home, straight, say, damage):
    run = place.copy_of(home, "straight")
    reason = damage(run / "checkpoints" / "step-00000006")
    leftover = run / "checkpoints" / ".writing-step-00000005"
    shutil.copytree(run / "checkpoints" / "step-00000004", leftover)
    evaluated = say("evaluate", run, "--json")
    assert json.loads(evaluated.out)["step"] == 4
    assert evaluated.err.startswith("ALARM checkpoint step-00000006 is damaged") and reason in evaluated.err
    again = place.train("straight", 2 if damage is flip_a_bit else None, "checkpoint.keep=3")
    assert again.weights == straight.weights
    (alarm,) = [line for line in again.out.splitlines() if line.startswith("ALARM")]
    assert "step-00000006 is damaged" in alarm and reason in alarm
    assert place.losses("straight") == home.losses("straight")
    # the damaged one was replaced by a sound one
    assert place.checkpoints("straight") == ["step-00000002", "step-00000004", "step-00000006"]
    assert say("evaluate", run, "--json").err == ""


def test_a_damaged_checkpoint_does_not_push_out_a_sound_one(place, home, straight):
    """Keep one: step 5 is saved beside the damaged step 6, and must be what stays."""
    run = place.copy_of(home, "straight")
    flip_a_bit(run / "checkpoints" / "step-00000006")
    place.train("straight", None, "checkpoint.keep=1", "--max-steps", "1")
    assert place.checkpoints("straight") == ["step-00000005", "step-00000006"]
    assert place.train("straight", None, "checkpoint.keep=1").weights == straight.weights
    assert place.checkpoints("straight") == ["step-00000006"]


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_left_alone(place, home, straight):
    run = place.copy_of(home, "straight")
    for folder, damage in zip(sorted((run / "checkpoints").iterdir()), DAMAGES, strict=False):
        damage(folder)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.lock"}
    again = place.train("straight", 2)
    again.refused("every checkpoint in straight/checkpoints is damaged", "part-0000.h5", "start another --run")
    assert again.out.count("ALARM") == 3
    assert {path: path.read_bytes() for path in before} == before
    generated = place.program("generate", "straight")
    assert generated.code == 2
    assert [line.split()[0] for line in generated.err.splitlines()] == ["ALARM"] * 3 + ["mlm-mpi:"]


def limited(steps: str) -> str:
    """Rank 1 cannot write files of more than 4 KiB in these steps, as if its disk were full."""
    return f"""
import resource
def before_step(rank, step):
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if step in {steps} else -1, -1))
"""


def test_a_save_that_fails_is_an_alarm_and_training_goes_on(place, straight):
    run = place.faulty(limited("range(1, 3)"), "run", 2, "checkpoint.every=2", "checkpoint.background=false")
    assert run.weights == straight.weights
    (alarm,) = [line for line in run.out.splitlines() if line.startswith("ALARM")]
    assert "checkpoint not saved, training goes on: rank 1: cannot write" in alarm
    assert "File too large" in alarm and "part-0001.h5" in alarm
    assert place.checkpoints("run") == ["step-00000004", "step-00000006"]


def test_a_final_save_that_fails_is_an_error_and_what_was_saved_stands(place, straight):
    run = place.faulty(limited("range(3, 9)"), "run", 2, "checkpoint.every=2", "checkpoint.background=false")
    run.refused("the final checkpoint (step 6) was not saved: rank 1: cannot write", "part-0001.h5")
    assert run.out.count("ALARM checkpoint not saved") == 1
    assert place.checkpoints("run") == ["step-00000002"]
    assert not (place.folder / "run" / "DONE").exists()
    assert place.train("run", None).weights == straight.weights


def test_what_cannot_be_compared_is_never_forgotten(place):
    """Another dispatch level on the way gives other bits; every later hash says so."""
    hashes = [
        place.train("run", None, f"numerics.level={level}", "--max-steps", "1").out.splitlines()[-1]
        for level in ("auto", "base", "base")
    ]
    assert "not comparable" not in hashes[0]
    for line in hashes[1:]:
        assert "not comparable: the run was resumed with another" in line
