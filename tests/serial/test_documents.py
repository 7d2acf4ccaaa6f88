"""Where documents begin in a row, against a transcription that walks; models that read it not refuse the setting."""

import numpy as np
import pytest
from corpora import run_prepare, write_texts
from streams import Tokens

from mlm_mpi import config
from mlm_mpi.data.documents import Documents, starts_of
from mlm_mpi.data.objectives import causal
from mlm_mpi.errors import ConfigError
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks.language_model import LanguageModel

END = 7


def walked(ids, end=END):
    rows = []
    for row in ids:
        start, starts = 0, []
        for position, token in enumerate(row):
            if token == end:
                start = position
            starts.append(start)
        rows.append(starts)
    return rows


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 40)])
@pytest.mark.parametrize("vocabulary", [8, 9, 40])
def test_starts(shape, vocabulary):
    draw = np.random.default_rng(vocabulary)
    for _ in range(10):
        ids = draw.integers(6, vocabulary, shape).astype(np.int32)
        starts = starts_of(ids, END)
        assert starts.dtype == np.int32 and starts.tolist() == walked(ids)
        assert (np.diff(starts, axis=1) >= 0).all() and (starts <= np.arange(shape[1])).all()


def test_a_batch_has_them_beside_its_ids_and_every_target_counts():
    plain = causal.samples(Tokens(100, vocabulary=9), 12, False)
    samples = Documents(plain, END)
    batch, other = samples.batch([2, 8], 1, 3, rows=3), plain.batch([2, 8], 1, 3, rows=3)
    assert list(batch.inputs) == ["ids", "starts"] and len(samples) == len(plain)
    assert batch.inputs["starts"].tolist() == walked(other.inputs["ids"])
    assert batch.inputs["starts"].max() > 0
    assert batch.count == other.count == 12 + 3
    assert all(np.array_equal(batch.targets[name], other.targets[name]) for name in other.targets)


def write_models(folder):
    """Kinds "deaf" and "mine"; the second claims to read starts."""
    (folder / "models").mkdir()
    text = "from mlm_mpi.models.gpt import Settings, build\nHEEDS = {}\n"
    (folder / "models/deaf.py").write_text(text.format("()"))
    (folder / "models/mine.py").write_text(text.format("('data.documents',)"))


def test_a_language_model_gives_them_in_training_and_held_out(tmp_path):
    """Two corpora, windows cut in training only."""
    write_models(tmp_path)
    write_texts(tmp_path / "in", count=12, words=30)
    for name in "ab":
        run_prepare(
            tmp_path / "in", "--out", tmp_path / name, "--tokenizer", "bytes", "--heldout", "0.3", "--seed", ord(name)
        )
    mixed = [f'data.mixture=["{tmp_path}/a","{tmp_path}/b"]', "data.weights=[0.5,0.5]", "data.documents=separate"]
    warm = ["model.kind=mine", "model.context=128", "train.first_context=64", "train.context_warmup_steps=5"]
    plugins = Plugins(tmp_path)
    task = LanguageModel(config.load(None, [*mixed, *warm], plugins), plugins)
    train, heldout = task.samples("train"), task.samples("heldout")
    last = len(train) - 1
    for samples, step, length in (
        (train, 0, 64),
        (train, 5, 128),
        (heldout.parts[0], 0, 128),
        (heldout.parts[1], 0, 128),
    ):
        numbers = [0, 1, 2, last] if samples is train else [0, 1]
        batch = samples.batch(numbers, step, 0)
        ids, starts = batch.inputs["ids"], batch.inputs["starts"]
        assert ids.shape == starts.shape == (len(numbers) * 128 // length, length)
        assert starts.tolist() == walked(ids, task.eot)
    everything = train.batch(range(len(train)), 5, 0).inputs["starts"]
    assert everything.max() > 0, "a window holds the end of a document"


def test_a_model_that_does_not_read_them_refuses(tmp_path):
    write_models(tmp_path)
    wanted = ["data.documents=separate", "model.kind=deaf"]
    with pytest.raises(ConfigError, match=r'model\.kind = "deaf" does not heed data\.documents: take') as caught:
        config.load(None, wanted, Plugins(tmp_path))
    assert "\n" not in str(caught.value)
    assert config.load(None, [wanted[0], "model.kind=mine"], Plugins(tmp_path)).data.documents == "separate"
