"""`mlm-mpi finetune` and `merge`, frozen parts, the best checkpoint: one hash on any mesh, also past kills."""

import contextlib
import json
import re
import shutil

import numpy as np
import pytest
from programs import RANK_DIES, make_text, prepare

from mlm_mpi import config as configuration
from mlm_mpi.comm.group import Group
from mlm_mpi.errors import MlmError
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks import language_model
from mlm_mpi.train import Start
from mlm_mpi.train.manifest import read_manifest
from mlm_mpi.train.run import Options, Run
from mlm_mpi.train.start import check_origin, check_same_origin, origin_at

LORA = ("start.lora_rank=2", "train.steps=3", "eval.every=0")
FROZEN = ("start.freeze=['embed.positions', 'block0.attention*']", "train.steps=3", "eval.every=0")
SEARCH = ("eval.every=1", "eval.best=true", "eval.patience=2", "train.steps=12", "optim.learning_rate=0.5")


def finetune(place, run, ranks, *more, origin="straight", settings=()):
    """`a.b=c` in `settings` becomes `--set a.b=c`."""
    launcher = [] if ranks is None else ["run", "-n", str(ranks), "--"]
    sets = [word for one in settings for word in ("--set", one)]
    return place.program(*launcher, "finetune", str(origin), str(place.config), "--run", run, *more, *sets)


@pytest.fixture
def begun(place, home, straight):
    """A place with a run to begin with."""
    place.copy_of(home, "straight")
    return place


def test_adapters_are_one_run_on_any_ranks_and_merge_into_a_model(begun, say):
    """Three ranks make two steps, one the last, when the run that they began with is gone."""
    whole = finetune(begun, "whole", None, settings=LORA)
    cut = finetune(begun, "cut", 3, "--max-steps", "2", settings=LORA)
    assert cut.said_weights != whole.weights and "of them frozen" in whole.out
    checkpoint = begun.folder / "straight" / "checkpoints" / begun.checkpoints("straight")[-1]
    seal = json.loads((checkpoint / "manifest.json").read_text())["sha256"][:12]
    assert "start             weights of " in whole.out
    assert f", seal {seal}; drawn: block0.attention.qkv.lora_a.weight" in whole.out
    (begun.folder / "straight").rename(begun.folder / "gone")
    assert finetune(begun, "cut", None, settings=LORA).weights == whole.weights
    merged = say("merge", str(begun.folder / "cut"), "--out", str(begun.folder / "merged"))
    assert merged.code == 0, merged.err
    held = [json.loads(say("evaluate", str(begun.folder / run), "--json").out) for run in ("cut", "merged")]
    assert abs(held[0]["loss"] - held[1]["loss"]) < 1e-5 and held[0]["step"] == held[1]["step"] == 3
    again = say("merge", str(begun.folder / "merged"), "--out", str(begun.folder / "other"))
    again.refused("has no adapters (start.lora_rank = 0)")
    assert not (begun.folder / "other").exists()


def test_what_cannot_begin(home, straight, tmp_path):
    """One line each, and no run folder."""
    origin = home.folder / "straight"
    with pytest.raises(MlmError, match=f"prepare the corpus with --tokenizer {origin}.*/tokenizer.json"):
        check_origin(origin_at(str(origin)), Start(), [], b"another", Plugins())
    texts = {
        ("model.layers=2",): "12 of 28 weights are missing there (block1.norm1.gain)",
        ("model.width=16",): "missing there (embed.tokens has shape [257, 32] there, [257, 16] here)",
        ("start.freeze=['blok0']",): 'start.freeze = "blok0" is no parameter; did you mean',
        ("eval.figure=accuracy",): 'eval.figure = "accuracy" is not measured',
        ("start.checkpoint=nothing",): "nothing is no run folder (it has no checkpoints/)",
        ("start.checkpoint=",): "",
    }
    for settings, said in texts.items():
        config = configuration.load(home.config, [f"start.checkpoint={origin}", *settings])
        with pytest.raises(MlmError, match=re.escape(said)) if said else contextlib.nullcontext():
            Run(config, Options(tmp_path / "run"), language_model.build, Group())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "mesh"),
    [(2, "mesh.pp=2"), (2, "mesh.zero=1"), (3, "mesh.zero=2"), (2, "mesh.zero=3"), (4, "mesh.pp=2")],
)
def test_what_is_left_of_a_frozen_model_is_one_on_any_mesh(begun, ranks, mesh):
    for kind, settings in {"frozen": FROZEN, "parts": ("start.freeze=['embed']", *FROZEN[1:]), "lora": LORA}.items():
        whole = finetune(begun, f"{kind}-whole", None, settings=settings)
        cut = finetune(begun, f"{kind}-cut", ranks, "--max-steps", "2", settings=(*settings, mesh))
        assert cut.code == 0, cut.err
        assert finetune(begun, f"{kind}-cut", 3, settings=settings).weights == whole.weights
        shutil.rmtree(begun.folder / f"{kind}-whole")


@pytest.mark.slow
def test_another_start_is_another_run(begun):
    place = begun
    first = finetune(place, "run", None, "--max-steps", "1", settings=("train.steps=3",))
    assert first.code == 0
    other = place.folder / "straight" / "checkpoints" / "step-00000002"
    finetune(place, "run", None, origin=other, settings=("train.steps=3",)).refused("began with", "is another")
    place.train("run", None, "train.steps=3").refused("began with", 'start.checkpoint = "" is another')
    moved = shutil.copytree(place.folder / "straight" / "checkpoints" / "step-00000006", place.folder / "moved")
    shutil.rmtree(place.folder / "straight")
    assert finetune(place, "run", None, origin=moved, settings=("train.steps=3",)).code == 0


@pytest.mark.slow
def test_a_larger_model_begins_in_part(begun):
    more = ("model.layers=2", "start.partial=true", "train.steps=2")
    runs = [finetune(begun, f"run{ranks}", ranks, settings=more) for ranks in (None, 2)]
    assert runs[0].weights == runs[1].weights and "drawn: block1.norm1.gain" in runs[0].out


def letters(width=32, scale=5.0, first="a"):
    """Lines of word vectors for letters, which a tokenizer of bytes has as words, small and capital."""
    rows = np.random.default_rng(4).normal(size=(26, width)) * scale
    return "".join(f"{chr(ord(first) + n)} {' '.join(f'{x:.5f}' for x in row)}\n" for n, row in enumerate(rows))


WORDS = ("start.vectors=letters.txt", "train.steps=2", "eval.every=0", "checkpoint.every=1", "checkpoint.keep=3")


@pytest.mark.slow
def test_word_vectors_begin_one_run_on_any_ranks_and_are_needed_no_more(place):
    file = place.folder / "letters.txt"
    file.write_text(letters())
    whole = place.train("whole", None, *WORDS)
    assert "start             vectors of 52 of 257 tokens of /" in whole.out  # and the rest on the next lines
    cut = place.program(*place.words("cut", 2, *WORDS), "--max-steps", "1")
    assert cut.code == 0, cut.err
    saved = place.folder / "cut" / "checkpoints" / "step-00000001"
    check_same_origin(saved, read_manifest(saved), Start(vectors=str(file.rename(place.folder / "moved.txt"))))
    file.write_text(letters(scale=6.0))
    for name, said in ((str(file), f'"{file}" has changed since: restore it'), ("", '"" is another: restore it')):
        with pytest.raises(MlmError, match=re.escape(f'began with the vectors of "{file}" (SHA-256 ')) as caught:
            check_same_origin(saved, read_manifest(saved), Start(vectors=name))
        assert said in str(caught.value)
    file.unlink()
    assert place.train("cut", None, *WORDS).weights == whole.weights


def test_word_vectors_that_cannot_begin(home, tmp_path):
    """One line each, and no run folder."""
    file = tmp_path / "some.txt"
    tiny = ["start.vectors_scale=1", "model.init_std=0"]
    texts = {
        (None, ""): f'start.vectors = "{file}" cannot be read: No such file or directory',
        ("", ""): f"{file} has no word: give a file of word vectors",
        (letters(16), ""): f"{file} has vectors of 16 numbers, and embed.tokens rows of 32: set model.width = 16, or",
        ("whole 1 2 3\n", ""): "has none of the 257 tokens of the tokenizer as a word",
        ("a" + " 0" * 32, ""): "has zeros only for the tokens that it knows: give another file",
        (letters(), "start.vectors_scale=1e38"): "too large for float32 when multiplied by 1e+38: lower start.vectors_",
        (letters(), "model.init_std=0"): "embed.tokens is drawn as 0.0, which gives no scale: set start.vectors_scale",
    }
    for (content, setting), said in texts.items():
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content)
        config = configuration.load(home.config, [f"start.vectors={file}", *filter(None, [setting])])
        with pytest.raises(MlmError, match=re.escape(said)):
            Run(config, Options(tmp_path / "run"), language_model.build, Group())
    file.write_text(letters())
    Run(configuration.load(home.config, [f"start.vectors={file}", *tiny]), Options(tmp_path / "run"),
        language_model.build, Group())  # fmt: skip
    with pytest.raises(MlmError, match="start.vectors_scale = 2.0 needs start.vectors"):
        configuration.load(home.config, ["start.vectors_scale=2"])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "mesh"), [(2, "mesh.pp=2"), (2, "mesh.zero=3"), (3, "mesh.tp=1")])
def test_word_vectors_over_a_checkpoint_are_one_run_on_any_mesh(begun, ranks, mesh):
    (begun.folder / "letters.txt").write_text(letters())
    whole = finetune(begun, "whole", None, settings=WORDS)
    assert whole.out.count("start             ") == 2 and "vectors of 52 of 257 tokens" in whole.out
    assert finetune(begun, "plain", None, settings=WORDS[1:]).weights != whole.weights
    assert finetune(begun, "cut", ranks, settings=(*WORDS, mesh)).weights == whole.weights


@pytest.mark.slow
def test_word_vectors_of_a_table_that_ranks_cut(place):
    prepare(make_text(place.folder / "text"), place.folder / "corpus", "--vocab", "300")
    (place.folder / "letters.txt").write_text(letters())
    words = (*WORDS, "data.dir=corpus")
    assert place.train("cut", 2, *words, "mesh.tp=2").weights == place.train("whole", None, *words).weights


DYING = """
import os
def before_step(rank, step):
    if step == {step} and rank == 0:
        os._exit(9)
"""


@pytest.mark.slow
@pytest.mark.parametrize("save", [(), ("checkpoint.every=2", "checkpoint.keep=1")])
def test_the_best_stays_and_patience_ends_the_run_also_after_kills(place, save, say):
    settings = (*SEARCH, *save)
    whole = place.train("whole", None, *settings)
    done = json.loads((place.folder / "whole" / "DONE").read_text())
    best = json.loads((place.folder / "whole" / "best.json").read_text())
    step = int(best["checkpoint"][5:])
    assert done["patience"] == 2 and done["step"] == step + 2 < 12
    held = [heldout for _, heldout in place.losses("whole")]
    assert min(held) == held[step - 1] and abs(best["value"] - min(held)) < 1e-9
    assert best["checkpoint"] in place.checkpoints("whole")
    assert f"ended after step {step + 2} of 12, 2 evaluations without a better loss than" in whole.out
    for kill in range(1, step + 2):
        run = f"cut{kill}"
        killed = place.faulty(DYING.format(step=kill), run, 1, *settings)
        assert killed.code != 0
        assert place.train(run, 2 + kill % 2, *settings).weights == whole.weights
        assert json.loads((place.folder / run / "best.json").read_text()) == best
        assert json.loads((place.folder / run / "DONE").read_text())["step"] == step + 2
    again = place.train("whole", None, *settings)
    assert again.weights == whole.weights
    assert f"is complete: it ended for eval.patience = 2 after step {step + 2}" in again.out
    found = json.loads(say("evaluate", str(place.folder / "whole"), "--best", "--json").out)
    assert found["step"] == step and abs(found["loss"] - best["value"]) < 1e-6
    longer = place.train("whole", None, *settings, "eval.patience=3")
    assert longer.code == 0 and json.loads((place.folder / "whole" / "DONE").read_text())["step"] > step + 2


def test_the_best_stays_where_a_rank_dies_in_the_step_behind_it(place):
    """Saved in the background it would be lost with the part of the rank that has died."""
    settings = ("eval.best=true", "eval.every=2", "train.steps=6", "optim.learning_rate=1.0", "optim.warmup_steps=6")
    whole = place.train("whole", None, *settings)
    best = json.loads((place.folder / "whole" / "best.json").read_text())
    step = int(best["checkpoint"][5:])
    assert step < 6, "the best is not the last"
    killed = place.faulty(RANK_DIES.format(step=step), "killed", 3, *settings, recovers=True)
    assert killed.weights == whole.weights and "lost rank 1" in killed.out + killed.err
    assert json.loads((place.folder / "killed" / "best.json").read_text()) == best
    assert best["checkpoint"] in place.checkpoints("killed")
