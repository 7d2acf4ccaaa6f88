"""`mlm-mpi verify`: what a ledger proves, and each thing that may be wrong with one is found and named."""

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import Corpus, Saved

from mlm_mpi import config as configuration
from mlm_mpi.__main__ import main
from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.mixture import Mixture
from mlm_mpi.data.sampler import Sampler, digest
from mlm_mpi.data.warmup import Ramp
from mlm_mpi.errors import ConfigError, MlmError
from mlm_mpi.monitor.progress import Silent
from mlm_mpi.train import proof
from mlm_mpi.train.engine import StepResult
from mlm_mpi.train.evidence import Evidence
from mlm_mpi.train.guard import Verdict
from mlm_mpi.train.ledger import Ledger
from mlm_mpi.train.proof import prove

STEPS, MICRO_BATCHES, ROWS, SEED = 50, 4, 2, 3
WINDOWS = 20_505 // 128
CONFIG = f"[model]\ncontext = 128\n[train]\nsteps = {STEPS}\nmicro_batches = 4\nrows = 2\nseed = {SEED}\n"
RANKS = ((0, 2), (2, 1), (3, 1))


def sampler(*windows: int, weights: tuple[int, ...] = (1,), rows: Ramp | None = None) -> Sampler:
    names = tuple(f"c{number}" for number in range(len(windows)))
    return Sampler(SEED, Mixture(windows, weights, names), MICRO_BATCHES, rows or Ramp(ROWS))


def done(source: Sampler, step: int, **more: Any) -> StepResult:
    """What step number `step` did."""
    windows = tuple(digest(source.positions(step - 1, index)) for index in range(MICRO_BATCHES))
    return StepResult(2.5, 100, 1.0, 1e-3, 0.5, 0.01, np.zeros((3, 2)), windows, **({"ranks": RANKS} | more))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and a run of 50 steps over it: two and a half epochs."""
    folder = tmp_path_factory.mktemp("home")
    Corpus.make(folder / "corpus")
    (folder / "run").mkdir()
    (folder / "run" / "config.toml").write_text(f'{CONFIG}[data]\ndir = "{folder}/corpus"\n')
    source = sampler(WINDOWS)
    evidence = Evidence(folder / "run" / "ledger.jsonl", 0, source.samples)
    for step in range(1, STEPS + 1):
        evidence.write(step, done(source, step))
    evidence.close()
    return folder


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(home / "run", tmp_path / "run"))


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def write(run: Path, lines: list[Any]) -> None:
    (run / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def said(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    assert main(["verify", *words]) == code
    out, err = capsys.readouterr()
    assert err.count("\n") == (code == 2)
    return out + err


def test_a_sound_run_is_proven(run, home, capsys):
    found = prove(run)
    assert found.holds and found.steps == STEPS and found.samples == STEPS * MICRO_BATCHES * ROWS
    assert found.epochs == (found.samples / WINDOWS,) and found.ranks == {0: 100, 2: 50, 3: 50}
    assert said(capsys, 0, str(run)).splitlines() == [
        f"{run}: 50 steps, 400 samples, 2.5 epochs of corpus 000000000000: each sample was used exactly once",
        "ranks 0, 2-3 took part, with 50 to 100 micro-batches each",
        "nothing is saved yet",
    ]
    table = json.loads(said(capsys, 0, str(run), "--json"))
    assert table["proven"] and table["ranks"] == {"0": 100, "2": 50, "3": 50} and table["wrong"] == []


def other_windows(lines):
    lines[6]["windows"] = lines[6]["windows"][:24] + "0000beef"


def swapped(lines):
    """Micro-batches 0 and 1 of step 7 were exchanged."""
    text = lines[6]["windows"]
    lines[6]["windows"] = text[8:16] + text[:8] + text[16:]


def change(**values):
    return lambda lines: lines[6].update(values)


AGAIN = "step 7 has another line, which comes after that of step"
WRONG = {
    "missing": (lambda lines: lines.pop(6), "step 7 has no line"),
    "several": (lambda lines: lines.__delitem__(slice(6, 9)), "steps 7 to 9 have no line"),
    "first": (lambda lines: lines.pop(0), "step 1 has no line"),
    "twice": (lambda lines: lines.insert(7, lines[6]), f"{AGAIN} 7"),
    "later": (lambda lines: lines.insert(9, lines.pop(6)), f"{AGAIN} 10"),
    "another": (other_windows, "step 7, micro-batch 3 read windows of digest 0000beef, its own have "),
    "swapped": (swapped, "step 7, micro-batch 1 read windows of digest "),
    "of another step": (lambda lines: lines[6].update(windows=lines[7]["windows"]), "step 7, micro-batch 0 read"),
    "samples": (change(samples=[48, 55]), "step 7 lists samples 48-54, its own are 48-55"),
    "nobody": (change(ranks=[[0, 2], [2, 1]]), "step 7 lists ranks that ran 3 of its 4 micro-batches: [2, 1]"),
    "both": (change(ranks=[[0, 2], [2, 2], [3, 1]]), "step 7 lists ranks that ran 5 of its 4 micro-batches"),
    "idle": (change(ranks=[[0, 4], [2, 0]]), "step 7 lists ranks that ran 4 of its 4 micro-batches: [4, 0]"),
    "rank twice": (change(ranks=[[0, 2], [0, 2]]), "step 7 lists a rank twice: [0, 0]"),
    "short": (change(windows="00" * 12), "step 7 has no 8 hex digits for each of its 4 micro-batches in windows"),
    "no hex": (change(windows="xy" * 16), "step 7 has no 8 hex digits"),
    "blanks": (change(windows=" " * 32), "step 7 has no 8 hex digits"),
    "other letters": (change(windows="٣" * 32), "step 7 has no 8 hex digits"),
    "skips none": (change(skipped={"4": "why"}), "step 7 skips micro-batch '4' of 4"),
    "skips what": (change(skipped={"²": "why"}), "step 7 skips micro-batch '²' of 4"),
    "skips many": (change(skipped={"9" * 5000: "why"}), "step 7 skips micro-batch '99999999999999999999' of 4"),
    "skipped and run": (change(skipped={"3": "why"}), "step 7 skips a micro-batch of which it has a digest"),
    "undoes": (change(undone=[5, 8]), "step 7 undoes steps 5 to 8"),
    "undoes none": (change(undone=[8, 7]), "step 7 undoes steps 8 to 7"),
}  # fmt: skip


def test_what_was_undone_is_named(run, capsys):
    lines = lines_of(run)
    lines[3]["undone"], lines[6]["undone"], lines[7]["undone"] = [4, 4], [6, 7], [6, 8]
    write(run, lines)
    text = said(capsys, 0, str(run))
    assert "\nundone: step 4, by a roll-back: their samples are in no weight\nundone: steps 6 to 8, by a " in text
    assert "each sample was used exactly once, but for 32 whose steps were undone\n" in text


def test_lines_that_are_none_are_counted(run, capsys):
    text = (run / "ledger.jsonl").read_text().replace("\n", "\njunk\n", 2)
    (run / "ledger.jsonl").write_text(text)
    assert "\nleft out: 2 lines of the ledger, torn or not of mlm-mpi\n" in said(capsys, 0, str(run))


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(run, capsys, name):
    lines = lines_of(run)
    alter, text = WRONG[name]
    alter(lines)
    write(run, lines)
    assert f"\nWRONG {text}" in said(capsys, 1, str(run))


ODD = [
    {"step": 7}, {"samples": None}, {"samples": ["48", "56"]}, {"samples": [48]}, {"samples": [48, 56, 64]},
    {"samples": [48.5, 56]}, {"samples": [-8, 56]}, {"samples": [48, 10**30]}, {"samples": {"a": 1}}, {"ranks": 4},
    {"ranks": [[0]]}, {"ranks": [[[0], 4]]}, {"ranks": [[10**9, 4]]}, {"ranks": [[0, 10**400]]}, {"ranks": [[-1, 4]]},
    {"windows": 7}, {"windows": ["00"]}, {"windows": None}, {"skipped": ["why"]}, {"skipped": {"3": 7}},
    {"undone": 3}, {"undone": [1]}, {"begins": "later"}, {"begins": 7},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_a_line_of_other_types_is_a_finding(run, odd):
    lines = lines_of(run)
    lines[6] = {"step": 7} if odd == {"step": 7} else lines[6] | odd
    write(run, lines)
    assert prove(run).wrong == ["the line of step 7 is not as mlm-mpi writes them"]


JUNK = [b"", b"junk", b"\xff\xfe", b"[1]", b"7", b'{"step": "7"}', b"[" * 9999, b'{"step": 1e9}', b"\0" * 999]


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_junk_between_lines_and_a_torn_end_are_passed_over(run, junk):
    path = run / "ledger.jsonl"
    content = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(content[:5]) + junk + b"\n" + b"".join(content[5:]) + content[-1][:40])
    assert prove(run).holds


def test_a_torn_line_proves_nothing(run):
    path = run / "ledger.jsonl"
    content = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(content[:6]) + content[6][:40] + b"\n" + b"".join(content[7:]))
    assert prove(run).wrong == ["step 7 has no line"]


def test_a_step_beyond_all_numbers_ends_in_findings(run):
    lines = lines_of(run)
    write(run, [*lines, lines[-1] | {"step": 1 << 32}, lines[-1] | {"step": (1 << 32) + 1}])
    found = prove(run)
    assert found.wrong[0] == f"steps 51 to {(1 << 32) - 1} have no line" and len(found.wrong) > 2


def test_findings_are_bounded(run, capsys, monkeypatch):
    monkeypatch.setattr(proof, "_ENOUGH", 100)
    write(run, [line | {"windows": "00" * 16} for line in lines_of(run)])
    text = said(capsys, 1, str(run))
    assert text.count("\nWRONG ") == proof.MOST and "… and 180 more findings\n" in text
    assert ": 200 findings\n" in text


def test_what_was_skipped_is_named(run, capsys):
    lines = lines_of(run)
    lines[11]["skipped"] = {"3": "its gradient was \x1b[2J not finite"}
    lines[11]["windows"] = lines[11]["windows"][:24] + "00000000"  # nobody read it
    write(run, lines)
    text = said(capsys, 0, str(run))
    assert "each sample was used exactly once, but for 2 that were skipped\n" in text
    assert "\nskipped: step 12, micro-batch 3 (samples 94-95): its gradient was \ufffd[2J not finite\n" in text
    for line in lines[:30]:
        line["skipped"] = line.get("skipped", {}) | {"0": "why", "1": "why"}
        line["windows"] = "00" * 8 + line["windows"][16:]
    write(run, lines)
    text = said(capsys, 0, str(run))
    assert text.count("\nskipped: ") == proof.MOST and "\n… and 41 more skipped micro-batches\n" in text


def test_a_run_of_before_is_proven_from_its_first_line_on(run, capsys):
    source, path = sampler(WINDOWS), run / "ledger.jsonl"
    path.unlink()
    evidence = Evidence(path, 30, source.samples)
    for step in range(31, STEPS + 1):
        evidence.write(step, done(source, step))
    text = said(capsys, 0, str(run))
    assert "from step 31 on each sample was used exactly once\n" in text
    assert "\nsteps 1 to 30 were made before this run had a ledger: nothing is said of them\n" in text
    assert json.loads(path.read_text().splitlines()[0])["begins"]
    before = path.read_bytes()
    Evidence(path, STEPS, source.samples).close()
    assert path.read_bytes() == before, "it begins once"


def test_a_run_that_goes_on_drops_what_is_made_again(run):
    source, path = sampler(WINDOWS), run / "ledger.jsonl"
    evidence = Evidence(path, 20, source.samples)
    for step in range(21, STEPS + 1):
        evidence.write(step, done(source, step, ranks=((5, 4),)))
    found = prove(run)
    assert found.holds and found.ranks == {0: 40, 2: 20, 3: 20, 5: 120}


def test_a_step_is_testified_once(tmp_path):
    source = sampler(WINDOWS)
    ledger = Ledger([], Silent(), evidence=Evidence(tmp_path / "ledger.jsonl", 0, source.samples))
    for step in (1, 1, 2):
        ledger.testify(step, done(source, step, verdict=Verdict({1: "why " * 999})))
    ledger.finish()
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2] and len(lines[0]["skipped"]["1"]) == 500
    Ledger([], Silent()).testify(1, done(source, 1))  # not rank 0


def test_a_step_of_many_micro_batches_is_no_junk(tmp_path):
    """130,000 fit; a line of metrics.jsonl may have 64 KiB."""
    path, result = tmp_path / "ledger.jsonl", done(sampler(WINDOWS), 1)
    many = StepResult(*list(vars(result).values())[:7], windows=(7,) * 100_000, ranks=((0, 100_000),))
    Evidence(path, 0, lambda steps: steps).write(1, many)
    Evidence(path, 1, lambda steps: steps).close()
    assert len(lines_of(tmp_path)[0]["windows"]) == 800_000


# where the run is compared with: checkpoints and DONE


@pytest.fixture
def saved(run: Path, home: Path) -> Path:
    """The same with a checkpoint of step 3 and a ledger that ends there."""
    config = configuration.load(run / "config.toml")
    corpus = Catalog.open(home / "corpus")
    made = Saved.make(run / "checkpoints" / "step-00000003")
    content = corpus.tokenizer().content
    (made.folder / "tokenizer.json").write_bytes(content)
    about = {"config": configuration.to_table(config), "catalog": corpus.digest, "corpus": "made by hand"}
    made.seal(made.table | about | {"tokenizer": hashlib.sha256(content).hexdigest()})
    write(run, lines_of(run)[:3])
    return run


def test_the_ledger_ends_where_the_run_is_saved(saved, capsys):
    (saved / "DONE").write_text('{"step": 3}')
    assert said(capsys, 0, str(saved)).endswith("\nsound checkpoints: step-00000003\n")
    (saved / "DONE").write_text('{"step": 4}')
    assert prove(saved).wrong == [
        "the ledger ends after step 3, DONE says step 4", "DONE says step 4, the newest checkpoint is of step 3"
    ]  # fmt: skip
    (saved / "DONE").unlink()
    write(saved, lines_of(saved)[:1])
    assert prove(saved).wrong == ["steps 2 to 3 have no line, checkpoint step-00000003 has made them"]


def test_steps_that_are_not_saved_yet_are_told(saved, home, capsys):
    shutil.copy(home / "run" / "ledger.jsonl", saved / "ledger.jsonl")
    assert said(capsys, 0, str(saved)).endswith(
        "\nsteps after 3 are not saved: if this run does not live, a start makes them again\n"
    )


def test_a_damaged_checkpoint_is_a_finding(saved):
    path = saved / "checkpoints" / "step-00000003" / "part-0001.h5"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (found,) = prove(saved).wrong
    assert found == f"checkpoint step-00000003 is damaged: {path} does not match the SHA-256 in its manifest"


def test_the_sealed_settings_count(saved):
    path = saved / "config.toml"
    path.write_text(path.read_text().replace("seed = 3", "seed = 4"))
    assert prove(saved).holds
    shutil.rmtree(saved / "checkpoints")
    assert prove(saved).wrong[0].startswith("step 1, micro-batch 0 read windows of digest")


def test_without_its_corpus_the_windows_are_not_proven(saved, home, tmp_path, capsys):
    moved = Corpus(home / "corpus").copy(tmp_path / "moved")
    (saved / "config.toml").write_text(CONFIG + '[data]\ndir = "gone"\n')
    text = said(capsys, 2, str(saved))
    assert ": each micro-batch of each step was run by one rank\n" in text
    assert "mlm-mpi: which samples were used is not proven: no corpus at gone: " in text
    assert "; the run was trained on corpus " in text and "(made by hand): make it again there, or give its" in text
    assert said(capsys, 0, str(saved), "--data", str(moved.folder))
    table = copy.deepcopy(moved.table) | {"seed": 7}
    moved.write(table)
    assert f"not proven: {moved.folder} holds another corpus, " in said(
        capsys, 2, str(saved), "--data", str(moved.folder)
    )
    assert "--data names 2 folders, the run has 1 corpora" in said(capsys, 2, str(saved), "--data", "a", "b")


def test_what_is_no_run_is_one_line(tmp_path, run, capsys):
    assert f"{tmp_path}/no is no run folder: give the --run folder" in said(capsys, 2, f"{tmp_path}/no")
    assert f"{tmp_path} has no ledger.jsonl: it is no run folder, has made no step yet, or comes of a " in said(
        capsys, 2, str(tmp_path)
    )
    assert "RUN is empty: give a folder" in said(capsys, 2, "")
    (run / "ledger.jsonl").unlink()
    os.mkfifo(run / "ledger.jsonl")
    with pytest.raises(MlmError, match="ledger.jsonl: it is a FIFO, not a regular file"):
        prove(run)
    (run / "ledger.jsonl").unlink()
    (run / "ledger.jsonl").symlink_to(run / "ledger.jsonl")
    with pytest.raises(MlmError, match=r"ledger.jsonl"):
        prove(run)
    (run / "ledger.jsonl").unlink()
    (run / "ledger.jsonl").touch()
    with pytest.raises(ConfigError, match="has no line of a step: verify the run when it has made one"):
        prove(run)
    (run / "config.toml").unlink()
    with pytest.raises(ConfigError, match=r"config.toml: No such file"):
        prove(run)


# how windows are counted


def test_mixtures_and_rows_that_grow_are_counted_too():
    source = sampler(37, 80, weights=(3, 7), rows=Ramp(8, 1, 5))
    found = proof.Proof()
    windows = proof._Windows(source, found)
    for step in range(1, 60):
        digests = np.array(done(source, step).windows, np.uint32)
        windows.take(step, (source.samples(step - 1), source.samples(step)), digests, frozenset())
    windows.compare()
    assert found.holds


def test_a_window_that_comes_twice_is_seen():
    census = proof._Census(Mixture((4, 3), (1, 1), ("a", "b")))
    assert census.take(0, np.array([3, 4, 1, 6])) is None
    assert census.take(4, np.array([0, 5, 2, 4, 2])) is None, "b has begun its second epoch, and a"
    assert census.take(9, np.array([4])) == "a window of b comes twice in epoch 2"
    assert proof._Census(Mixture((4,))).take(0, np.array([1, 2, 1])) == "a window of the corpus comes twice in epoch 1"
    census = proof._Census(Mixture((4,)))
    assert census.take(6, np.array([1, 2, 1, 0, 3, 2])) is None, "samples 6, 7 are the last of epoch 2"
    assert census.take(99, np.array([1, 1])) is None, "what was missing is told elsewhere"
