"""Preferences: what is prepared and refused, pairs as rows, the loss and its slope, the reference of a run."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from corpora import contents, run_prepare
from numerics import directional
from whole import Driven

from mlm_mpi.__main__ import main
from mlm_mpi.config.reader import load
from mlm_mpi.data.labelled import PREFERRED, Labelled
from mlm_mpi.data.preferences import Pairs
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.errors import CheckpointError, DataError
from mlm_mpi.layers.base import Context, Sizes
from mlm_mpi.layers.preference import PreferenceHead
from mlm_mpi.models import llama
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks.preference import Preference
from mlm_mpi.train import reference
from mlm_mpi.train.measure import Sums

BYTES = Tokenizer.bytes()
HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def said(content: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def line(messages: object, chosen: object, rejected: object) -> str:
    return json.dumps({"messages": messages, "chosen": chosen, "rejected": rejected}) + "\n"


def pairs(path: Path, count: int = 20) -> Path:
    path.write_text("".join(line(said(f"Number {n}?", "user"), f"It is {n}!", f"{n}.") for n in range(count)))
    return path


def prepared(folder: Path, *words: object) -> Labelled:
    run_prepare(*words, "--out", folder, "--chat", "--tokenizer", "bytes")
    return Labelled.open(folder, kind="preferences")


def told(found: Labelled, number: int) -> list[tuple[str, str]]:
    """(dialogue, its marked answer) of the two of a pair."""
    every = [found.dialogues("train").read(2 * number + which) for which in (0, 1)]
    return [(BYTES.decode(one.ids.tolist()), BYTES.decode(one.ids[one.answers].tolist())) for one in every]


# What is prepared


def test_all_layouts_say_the_same(tmp_path: Path) -> None:
    layouts = (
        {"messages": [HI, HELLO, HI], "chosen": "Yes", "rejected": "No"},
        {"messages": [HI, HELLO, HI], "chosen": said("Yes"), "rejected": said("No")},
        {"chosen": [HI, HELLO, HI, *said("Yes")], "rejected": [HI, HELLO, HI, *said("No")]},
    )
    folders = []
    for number, layout in enumerate(layouts):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(layout) + "\n")
        folders.append(prepared(tmp_path / f"out{number}", path, "--heldout", 0, "--test", 0))
    assert folders[0].manifest.format == PREFERRED and len({found.content for found in folders}) == 1
    talk = "user\nHiassistant\nHellouser\nHiassistant\n"
    assert told(folders[0], 0) == [(f"{talk}Yes", "Yes"), (f"{talk}No", "No")], "only the last answer is marked"
    asked = {"prompt": [HI, HELLO, HI], "chosen": said("Yes"), "rejected": said("No")}
    (tmp_path / "prompt.jsonl").write_text(json.dumps(asked) + "\n")
    found = prepared(tmp_path / "named", tmp_path / "prompt.jsonl", "--heldout", 0, "--test", 0, "--text", "prompt")
    assert found.content == folders[0].content
    (tmp_path / "text.jsonl").write_text(line("Hi", "Yes", "No"))
    found = prepared(tmp_path / "text", tmp_path / "text.jsonl", "--heldout", 0, "--test", 0)
    assert told(found, 0)[1] == ("user\nHiassistant\nNo", "No")


def test_what_is_left_out_is_counted_with_its_first_place(tmp_path: Path, capsys) -> None:
    path = pairs(tmp_path / "a.jsonl", 10)
    odd = [
        line([HI], "a", "a"), line([HI], "a", None), json.dumps({"messages": [HI], "rejected": "a"}) + "\n",
        line([HI], "a", " "), line([HI, HELLO], "a", "b"), line([HI], said("a", "user"), "b"), line([HI], "It", "x"),
        line([HI], "It", "x"), line([HI], [], "b"),
    ]  # fmt: skip
    path.write_text(path.read_text() + "".join(odd))
    found = prepared(tmp_path / "out", path, "--heldout", 0, "--test", 0)
    assert capsys.readouterr().out.splitlines()[:5] == [
        "dialogues   19 read, 11 kept",
        f"removed     1 exact duplicates, 1 with an empty message or no answer, first: {path}:14",
        "skipped     2 dialogues with a role other than system, user, assistant, or with system behind the first "
        f"message, first: {path}:15",
        f"skipped     3 dialogues with a chosen or a rejected answer alone, first: {path}:12",
        f"skipped     1 pairs of equal answers, first: {path}:11",
    ]
    assert found.manifest.counts == {"train": (11,)} and len(found.dialogues("train")) == 22
    again = prepared(tmp_path / "again", path, "--heldout", 0, "--test", 0)
    assert contents(found.folder).keys() == contents(again.folder).keys() and found.digest == again.digest


BAD = {
    "no answers": (line([HI], "a", "a"), "no dialogue has an answer and no empty message; 1 have no two different"),
    "no question": (json.dumps({"chosen": "a", "rejected": "b"}), "a.jsonl:1 has no field 'messages', it has "),
    "no text": (line([HI], 1, "b"), "a.jsonl:1: 'chosen' is no text and no list of messages"),
    "no role": (line([HI], [{"content": "b"}], "b"), "'role' of message 1 is missing, it has 'content'"),
    "other talks": (line([], [HI, HELLO], [*said("Ho", "user"), HELLO]), "differ in more than their last message"),
    "mixed": (line([HI], "a", "b") + json.dumps({"messages": [HI, HELLO]}), "a.jsonl:2 has none: prepare them"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line_and_leave_nothing(tmp_path: Path, capsys, case: str) -> None:
    content, said = BAD[case]
    (tmp_path / "a.jsonl").write_text(content)
    code = main(
        ["prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--chat", "--tokenizer", "bytes"]
    )
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and said in err and not (tmp_path / "out").exists(), err


def task_of(found: Labelled, *words: str) -> Preference:
    own = ("task.kind=preference", f"data.dir={found.folder}", "model.context=48", *words)
    return Preference(load(None, own, Plugins()), Plugins())


def test_what_cannot_be_learnt_from_is_refused(tmp_path: Path) -> None:
    path = pairs(tmp_path / "a.jsonl")
    path.write_text(path.read_text() + line([HI], "x" * 50, "y"))
    found = prepared(tmp_path / "out", path, "--heldout", 0, "--test", 0)
    assert "20 for training" in (note := task_of(found).notes()[0][1]) and "1 are left out, they are too long" in note
    assert len(task_of(found).samples("heldout")) == 0, "there is none"
    with pytest.raises(DataError, match=r"1 pairs of train .* longest dialogue needs 69: .* or set task.too_long"):
        task_of(found, "task.too_long=refuse").samples("train")
    with pytest.raises(DataError, match=r"21 pairs of train .* pairs of shorter ones$"):
        task_of(found, "model.context=8").samples("train")
    with pytest.raises(DataError, match='preferences, not dialogues: set task.kind = "preference"'):
        Labelled.open(found.folder, kind="dialogues")


# Pairs, the head and its loss


def test_a_pair_is_two_rows_whose_targets_are_the_last_answers(tmp_path: Path) -> None:
    found = prepared(tmp_path / "out", pairs(tmp_path / "a.jsonl"), "--heldout", 0, "--test", 0)
    known = np.arange(40.0).reshape(20, 2)
    some = Pairs(found.dialogues("train"), 40, BYTES.eot, known)
    batch = some.batch([3, 1], 5, 2, rows=3)
    ids, wanted, mask = batch.inputs["ids"], batch.targets["ids"], batch.targets["mask"]
    assert ids.shape == wanted.shape == mask.shape == (6, 40) and (batch.step, batch.index, batch.count) == (5, 2, 2)
    assert (ids[:, 0] == BYTES.eot).all() and (ids[:4, 1:20] == wanted[:4, :19]).all()
    answers = [BYTES.decode(wanted[row, mask[row]].tolist()) for row in range(6)]
    assert answers == ["It is 3!", "3.", "It is 1!", "1.", "", ""]
    assert batch.targets["reference"].tolist() == [[6, 7], [2, 3], [0, 0]]
    assert batch.targets["pairs"].tolist() == [True, True, False]
    assert some.answers()[3].tolist() == [9, 3]
    with pytest.raises(ValueError, match="a reference of 3 pairs, and there are 20"):
        Pairs(found.dialogues("train"), 40, BYTES.eot, known[:3])


def model_of(beta: float = 0.5, dtype: str = "f8") -> Driven:
    settings = llama.Settings(layers=1, width=8, heads=2, context=40, init_std=0.5)
    trunk = llama.build(settings, Sizes(BYTES.vocab_size))
    model = Driven([*trunk.parts, PreferenceHead(trunk, beta)], dtype)
    model.store.initialise(1)
    return model


@pytest.fixture
def some(tmp_path: Path) -> Pairs:
    found = prepared(tmp_path / "out", pairs(tmp_path / "a.jsonl"), "--heldout", 0, "--test", 0)
    return Pairs(found.dialogues("train"), 40, BYTES.eot)


def test_the_loss_is_the_formulas_and_every_gradient_its_slope(some: Pairs) -> None:
    model = model_of()
    known = np.random.default_rng(0).normal(-40, 3, (20, 2))
    batch = Pairs(some.dialogues, 40, BYTES.eot, known).batch([3, 1], 0, 0, rows=3)
    tally = model.tally(batch)
    logits = model.head.logits(model.hidden(batch), Context())
    logp = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    ids, mask = batch.targets["ids"], batch.targets["mask"]
    each = np.take_along_axis(logp, ids[..., None], 2)[..., 0]
    sums = (each * mask).sum(axis=1)[:4].reshape(2, 2)
    assert np.allclose(tally["outcomes"], np.concatenate([sums, known[[3, 1]]], axis=1), rtol=1e-12)
    margins = 0.5 * ((sums - known[[3, 1]]) @ [1, -1])
    assert float(tally["loss"]) == pytest.approx(np.log1p(np.exp(-margins)).sum(), rel=1e-12)
    ctx = Context(training=True)
    assert float(model.loss_and_grad(batch, ctx)) == pytest.approx(float(tally["loss"]), rel=1e-12)
    for span in model.store.spans:
        directional(
            lambda: float(model.training_loss(batch, ctx)), span.parameter.data, model[span.parameter], tol=1e-6
        )


def test_at_the_start_every_loss_is_log_2_and_pairs_that_are_filled_up_say_nothing(some: Pairs) -> None:
    model = model_of(dtype="f4")
    said = model.tally(some.batch(range(20), 0, 0))["outcomes"][:, :2]
    began = Pairs(some.dialogues, 40, BYTES.eot, said)
    plain, filled = began.batch([5, 6], 0, 0), began.batch([5, 6], 0, 0, rows=4)
    losses = [model.loss_and_grad(batch, Context(training=True)) for batch in (plain, filled)]
    assert losses == pytest.approx([2 * np.log(2)] * 2, rel=1e-7) and model.tally(filled)["outcomes"].shape == (2, 4)


def test_figures_are_counted_by_hand(some: Pairs, tmp_path: Path) -> None:
    task = task_of(Labelled.open(tmp_path / "out", kind="preferences"), "task.beta=0.5")
    outcomes = np.array([[-1.0, -4.0, -2.0, -3.0], [-5.0, -2.0, -1.0, -3.0]])
    numbers = task.quality(Sums(1.0, 2, outcomes=outcomes))
    assert numbers == {
        "accuracy": 0.5, "margin": (1.0 - 2.5) / 2, "chosen_reward": -0.75, "rejected_reward": 0.0,
        "start_accuracy": 1.0,
    }  # fmt: skip
    numbers |= {"loss": 0.5, "tokens": 2} | task.baselines("train")
    assert numbers["longer_accuracy"] == 1.0 and any("+0.000" in line for line in task.lines(numbers, "step 3"))


# The reference


def test_a_reference_is_read_as_it_was_written_or_refused(tmp_path: Path) -> None:
    path, random = tmp_path / "reference.json", np.random.default_rng(0)
    found = {"train": random.normal(size=(5, 2)), "heldout": np.zeros((0, 2))}
    manifest = SimpleNamespace(start="a" * 64, catalog="b" * 64)
    reference.write(path, manifest.start, manifest.catalog, found)
    again = reference.read(path, manifest)
    assert all((again[split] == found[split]).all() and again[split].shape == found[split].shape for split in found)
    for other, what in (("start", "another start"), ("catalog", "another corpus")):
        with pytest.raises(CheckpointError, match=f"is of {what} than the run's: put it back"):
            reference.read(path, SimpleNamespace(**{**vars(manifest), other: "c" * 64}))
    content = path.read_bytes()
    number = repr(float(found["train"][2, 1])).encode()
    for bad in (content.replace(number, b"0.5"), content[:-20], b"[]", b'{"start":1}', b"[" * 100_000):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"is damaged \(.*\): put it back as it was, or begin again"):
            reference.read(path, manifest)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file or directory\), which holds what"):
        reference.read(path, manifest)


def test_a_task_takes_a_reference_of_its_own_pairs_alone(some: Pairs, tmp_path: Path) -> None:
    task = task_of(Labelled.open(tmp_path / "out", kind="preferences"))
    with pytest.raises(CheckpointError, match="the reference of train is not of its 20 pairs: begin again"):
        task.refer({"train": np.zeros((3, 2))})
    task.refer({"train": np.ones((20, 2))})
    assert (task.samples("train").batch([0], 0, 0).targets["reference"] == 1).all()
