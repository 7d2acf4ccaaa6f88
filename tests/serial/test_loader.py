"""The token stream over shard borders, the prefetch thread, and held-out batches."""

import itertools
import threading
import time

import h5py
import numpy as np
import pytest
from corpora import run_prepare, write_texts
from whole import mask_of

from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.loader import Loader
from mlm_mpi.data.mixture import mixture_of
from mlm_mpi.data.objectives import causal
from mlm_mpi.data.sampler import Sampler
from mlm_mpi.data.stream import TokenStream
from mlm_mpi.data.warmup import Ramp
from mlm_mpi.errors import DataError

T, B, M = 16, 4, 3


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    root = tmp_path_factory.mktemp("loader")
    write_texts(root / "in")
    run_prepare(root / "in", "--out", root / "out", "--shard-mib", "0.002", "--tokenizer", "bytes", "--heldout", "0.2")
    return Catalog.open(root / "out")


def everything(catalog, split):
    parts = []
    for shard in catalog.split(split):
        with h5py.File(catalog.folder / shard.entry.file) as file:
            parts.append(file["tokens"][:])
    return np.concatenate(parts)


@pytest.fixture
def loader(catalog):
    samples = causal.samples(TokenStream(catalog, "train"), T, training=True)
    made = Loader(samples, Sampler(0, mixture_of(samples), M, Ramp(B)), prefetch=2)
    yield made
    made.close()


PLAN = [(step, index) for step in range(5) for index in range(M)]


def same(a, b):
    arrays = zip(a.arrays(), b.arrays(), strict=True)
    return (a.step, a.index) == (b.step, b.index) and all(np.array_equal(x, y) for x, y in arrays)


def heldout_batches(stream, context, rows, windows=0):
    """What `measure` asks for."""
    samples = causal.samples(stream, context, training=False)
    total = min(len(samples), windows or len(samples))
    rows = min(rows, total)
    for number in range(-(-total // rows)):
        yield samples.batch(range(number * rows, min((number + 1) * rows, total)), 0, number, rows)


@pytest.mark.parametrize("open_shards", [1, 2, 32])
def test_stream_is_the_concatenation(catalog, open_shards):
    whole = everything(catalog, "train")
    stream = TokenStream(catalog, "train", open_shards)
    assert len(catalog.split("train")) > 10 and stream.tokens == len(whole)
    assert np.array_equal(stream.read(0, len(whole)), whole)
    draw = np.random.default_rng(0)
    borders = [shard.stop + d for shard in catalog.split("train")[:-1] for d in (-1, 0, 1)]
    for start in [*borders, *draw.integers(0, len(whole), 50).tolist()]:
        stop = min(len(whole), start + int(draw.integers(0, 5000)))
        assert np.array_equal(stream.read(start, stop), whole[start:stop])
        assert len(stream._readers) <= open_shards
    assert stream.read(5, 5).size == 0
    for start, stop in ((-1, 3), (3, 2), (0, len(whole) + 1)):
        with pytest.raises(DataError, match="are not in train"):
            stream.read(start, stop)
    stream.close()


def test_stream_opens_only_what_it_needs(catalog):
    stream = TokenStream(catalog, "train")
    stream.read(0, 10)
    assert list(stream._readers) == [0]


def test_micro_batch_is_its_windows(catalog, loader):
    whole = everything(catalog, "train")
    for step, index in PLAN:
        made = loader.micro_batch(step, index)
        ids, targets = made.inputs["ids"], made.targets["ids"]
        assert ids.shape == targets.shape == (B, T) and ids.dtype == targets.dtype == np.int32
        assert "mask" not in made.targets and made.count == B * T
        for row, window in enumerate(loader._sampler.positions(step, index)):
            assert np.array_equal(ids[row], whole[window * T : window * T + T])
            assert np.array_equal(targets[row], whole[window * T + 1 : window * T + T + 1])


def test_thread_follows_the_plan(loader):
    for plan in (PLAN, PLAN[::-1], PLAN[4:9]):
        loader.start(iter(plan))
        for step, index in plan:
            assert same(loader.next(), loader.micro_batch(step, index))
        with pytest.raises(RuntimeError, match="at its end"):
            loader.next()
    assert loader.waited_s > 0


def test_prefetch_is_bounded(loader):
    walked = []

    def plan():
        for pair in PLAN:
            walked.append(pair)
            yield pair

    loader.start(plan())
    time.sleep(0.3)
    assert len(loader._ready) == 2 and len(walked) == 3
    loader.next()
    time.sleep(0.2)
    assert len(walked) == 4


def test_waiting_is_counted(loader, monkeypatch):
    made = loader.micro_batch

    def slow(step, index):
        time.sleep(0.05)
        return made(step, index)

    monkeypatch.setattr(loader, "micro_batch", slow)
    loader.start(PLAN)
    for _ in range(4):
        loader.next()
    assert 0.15 < loader.waited_s < 1


def test_error_of_the_thread_reaches_the_consumer_after_what_is_ready(loader, monkeypatch):
    made = loader.micro_batch

    def failing(step, index):
        if (step, index) == PLAN[2]:
            raise DataError("shard x is damaged")
        return made(step, index)

    monkeypatch.setattr(loader, "micro_batch", failing)
    loader.start(PLAN)
    assert [(m.step, m.index) for m in (loader.next(), loader.next())] == PLAN[:2]
    for _ in range(2):
        with pytest.raises(DataError, match="shard x is damaged"):
            loader.next()
    loader.start(PLAN[:1])
    assert same(loader.next(), made(*PLAN[0]))


def test_close_is_prompt_and_leaves_no_thread(loader):
    before = threading.active_count()
    loader.start(itertools.cycle(PLAN))
    loader.next()
    time.sleep(0.05)  # the thread now waits for room
    begin = time.perf_counter()
    loader.close()
    loader.close()
    assert time.perf_counter() - begin < 0.5 and threading.active_count() == before


def test_damage_is_found_before_the_first_token(catalog, tmp_path):
    for shard in catalog.manifest.shards:
        (tmp_path / shard.file).write_bytes((catalog.folder / shard.file).read_bytes())
    (tmp_path / "catalog.json").write_bytes((catalog.folder / "catalog.json").read_bytes())
    copy = Catalog.open(tmp_path)
    second = copy.split("train")[1]
    path = tmp_path / second.entry.file
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    stream = TokenStream(copy, "train")
    stream.read(0, second.start)
    with pytest.raises(DataError, match="is damaged: SHA-256"):
        stream.read(second.start - 1, second.start + 1)


@pytest.mark.parametrize(("context", "rows"), [(16, 4), (7, 3), (100, 1), (10**5, 2)])
def test_heldout_covers_every_target_once(catalog, context, rows):
    stream = TokenStream(catalog, "heldout")
    whole = everything(catalog, "heldout").astype(np.int32)
    made = list(heldout_batches(stream, context, rows))
    assert sum(m.count for m in made) == stream.tokens - 1
    full = [mask_of(m) for m in made]
    ids, targets = ([m.inputs["ids"] for m in made], [m.targets["ids"] for m in made])
    assert np.array_equal(np.concatenate([m[k] for m, k in zip(ids, full, strict=True)]), whole[:-1])
    assert np.array_equal(np.concatenate([m[k] for m, k in zip(targets, full, strict=True)]), whole[1:])
    assert all(m.count == k.sum() for m, k in zip(made, full, strict=True))
    windows = -(-(stream.tokens - 1) // context)
    assert {m.shape for m in ids} == {(min(rows, windows), context)}


def test_more_heldout_rows_than_windows_cost_nothing(catalog):
    """A hundred billion rows were allocated, after the training."""
    stream = TokenStream(catalog, "heldout")
    (whole,) = heldout_batches(stream, T, 10**11)
    assert whole.count == stream.tokens - 1 and whole.inputs["ids"].size < 2 * stream.tokens


def test_heldout_of_some_windows(catalog):
    stream = TokenStream(catalog, "heldout")
    made = list(heldout_batches(stream, T, 4, windows=10))
    assert [m.index for m in made] == [0, 1, 2] and sum(m.count for m in made) == 10 * T
    assert "mask" not in made[0].targets and made[2].targets["mask"].sum(axis=1).tolist() == [T, T, 0, 0]


def test_heldout_without_text(tmp_path, capsys):
    write_texts(tmp_path / "in", 3)
    run_prepare(tmp_path / "in", "--out", tmp_path / "out", "--heldout", "0", "--tokenizer", "bytes")
    stream = TokenStream(Catalog.open(tmp_path / "out"), "heldout")
    assert stream.read(0, 0).size == 0
    with pytest.raises(DataError, match="heldout has 0 tokens, a target needs 2: prepare with a larger --heldout"):
        causal.samples(stream, T, training=False).batch([0], 0, 0)
