"""One answer on every mesh: the same losses, norms and weights, bit for bit, however ranks share a model."""

import argparse
import ctypes
import functools
import itertools
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from samples import LABELS, OTHERS, VOCABULARY
from tiny import batches, tiny_config
from whole import engine_of

from mlm_mpi.beams import Beams, written
from mlm_mpi.comm.collectives import gathered, joined, joined_rows, largest, scattered
from mlm_mpi.comm.mailbox import Mailbox
from mlm_mpi.comm.mesh import Mesh, mesh
from mlm_mpi.commands.sharing import mesh_of
from mlm_mpi.errors import CommError, ConfigError
from mlm_mpi.generation import Sampling, continue_prompt, logits
from mlm_mpi.layers.attention import KeyValueCache
from mlm_mpi.ops import linear, matmul
from mlm_mpi.order import joined as tree
from mlm_mpi.params import clip
from mlm_mpi.train import checkpoint
from mlm_mpi.train.replicas import repaired
from mlm_mpi.train.sharing import Lent

STEPS = 2
SIZES = (
    "model.layers=3",
    "model.width=32",
    "model.heads=8",
    "model.context=16",
    "train.micro_batches=8",
    "train.lanes=4",
)
GPT = (*SIZES, "train.recompute=true", "train.schedule=one_f_one_b")
DECODER = (
    *SIZES, "model.kind=llama", "model.qk_norm=true", "model.tied=true", "model.logit_cap=5", "model.feed_forward=64",
    "optim.name=muon", "optim.average=0.5", "train.schedule=zero_bubble", "mesh.zero=1",
)  # fmt: skip
UNTIED = (*SIZES, "model.kind=llama", "model.embedding_norm=true", "train.lanes=8", "train.schedule=gpipe")

LSTM = (
    "model.kind=lstm",
    "model.layers=3",
    "model.width=16",
    "train.micro_batches=4",
    "train.lanes=2",
    "train.schedule=zero_bubble",
)
GRU = (  # states of more than a chain of additions, documents that begin inside a row
    "model.kind=gru",
    "model.layers=1",
    "model.width=400",
    "model.context=16",
    "data.documents=separate",
    "model.tied=false",
    "train.micro_batches=4",
    "train.lanes=2",
    "train.recompute=true",
)

PAIRS = (  # both halves' texts of several lengths; a memory that crosses the cuts of a pipeline
    *SIZES, "model.kind=encoder_decoder", "model.layers=1", "model.decoder_layers=2", "task.kind=translation",
    "model.width=16", "model.heads=4", "train.micro_batches=4", "train.lanes=2", "train.schedule=one_f_one_b",
    "train.recompute=true", "model.lexical=true",
)  # fmt: skip

SPANS = (
    *PAIRS,
    "model.lexical=false",
    "task.kind=span_corruption",
    "task.rate=0.3",
    "task.span=2",
    "train.recompute=false",
)  # rows of the table behind those of the tokens

HEAD = (
    *SIZES, "model.layers=1", "model.width=16", "model.heads=4", "train.micro_batches=4", "train.schedule=one_f_one_b",
)  # fmt: skip
QUESTIONS = (*HEAD, "task.kind=question_answering", "model.kind=bert", "task.hide=0.2", "mesh.zero=2")
TAGGED = (*HEAD, "task.kind=tagging", "model.kind=bert", "task.smoothing=0.1", "mesh.zero=3")
DIALOGUES = (*HEAD, "task.kind=dialogue", "model.kind=llama", "model.context=24", "mesh.zero=3")
PREFERENCES = (
    *HEAD, "task.kind=preference", "model.kind=llama", "model.context=24", "start.checkpoint=x", "mesh.zero=2",
)  # fmt: skip

HEADS = (QUESTIONS, TAGGED, DIALOGUES, PREFERENCES)
SLOW = (GRU, PAIRS, SPANS, *HEADS[1:])

# several chunks a stage; with four layers there are six parts
CHUNKS = ("model.layers=4", "train.schedule=interleaved", "mesh.chunks=2", "mesh.pp=2")
CHUNKED = {2: [(2, 1)], 3: [(3, 1)], 4: [(2, 1), (2, 2)]}  # (pp, tp) by ranks
ODD = (*GPT, "train.micro_batches=9", "train.lanes=3")  # groups of 2 do not end where lanes do


def meshes(ranks: int) -> list[tuple[int, int]]:
    """(pp, tp) that fit so many ranks and the model."""
    some = {
        2: [(2, 1), (1, 2), (1, 1)],
        3: [(3, 1), (1, 1)],
        4: [(2, 2), (1, 4), (2, 1)],
        5: [(5, 1)],
        8: [(2, 2), (1, 8)],
    }
    return some.get(ranks, [])


@functools.cache
def known():
    """What one rank makes of something, by what it is."""
    return {}


def alone(group, words, make=None):
    """What one rank makes of it: losses, norms, hash. Rank 0 does: where ranks share cores all of them take as often
    as long."""
    if (words, make) not in known():
        found = (make or made)(words, Mesh()) if group.rank == 0 else None
        known()[words, make] = group.broadcast(found, "what one rank makes of it")
    return known()[words, make]


def made(words, on):
    return outcome(*trained(words, on))


def trained(words: tuple[str, ...], on: Mesh, steps: int = STEPS):
    config = tiny_config(*words, f"train.steps={STEPS}")
    engine = engine_of(config, VOCABULARY, on, LABELS)
    engine.machine.store.initialise(config.train.seed)
    plan = engine.plan(0, steps)
    source = batches(config, plan)
    if config.task.kind in OTHERS:
        source = iter(OTHERS[config.task.kind](config, plan)).__next__
    if config.data.documents == "separate":
        source = with_documents(source)
    return engine, [engine.step(step, source) for step in range(steps)]


def with_documents(source):
    """Micro-batches whose rows hold documents of five tokens."""

    def next_batch():
        batch = source()
        rows, length = batch.inputs["ids"].shape
        batch.inputs["starts"] = np.tile((np.arange(length) // 5 * 5).astype(np.int32), (rows, 1))
        return batch

    return next_batch


def outcome(engine, results):
    weights = engine.weights_sha256()
    return [[[r.loss, r.gradient_norm, r.targets, list(r.windows), r.ranks[0][0]] for r in results], weights]


@pytest.mark.parametrize(
    "words",
    [
        GPT, DECODER, UNTIED, LSTM, QUESTIONS, *(pytest.param(words, marks=pytest.mark.slow) for words in SLOW),
    ],
    ids=[
        "gpt", "decoder", "untied", "lstm", "questions", "gru", "pairs", "spans", "tagged", "dialogues", "preferences",
    ],
)  # fmt: skip
def test_every_mesh_has_the_bits_of_one_rank(group, words):
    for pp, tp in meshes(group.size):
        wide_or_slow = (words is GRU and group.size != 2) or (words in (UNTIED, LSTM, PAIRS, SPANS) and group.size == 8)
        if wide_or_slow or (words in HEADS and group.size > 4):
            continue
        found = outcome(*trained(words, mesh(group, pp, tp)))
        assert found == alone(group, words), f"pp {pp}, tp {tp}"


@pytest.mark.slow
@pytest.mark.parametrize("words", [*HEADS, PAIRS], ids=["questions", "tagged", "dialogues", "preferences", "pairs"])
def test_heads_have_the_bits_of_one_rank_in_bf16_too(group, words, monkeypatch):
    """In plain C, which any CPU runs; tp needs float32."""
    if group.size != 2:
        pytest.skip("two ranks say it, of float32 more do")
    monkeypatch.setenv("MLM_MPI_BF16", "portable")
    words = (*words, "numerics.products=bf16")
    for pp in (1, 2):
        assert outcome(*trained(words, mesh(group, pp, 1))) == alone(group, words), f"pp {pp}"


def test_a_memory_crosses_the_cuts_of_a_pipeline(group):
    if group.size != 4:
        pytest.skip("two stages of two ranks say it; every other mesh does in test-all")
    assert outcome(*trained(PAIRS, mesh(group, 2, 2))) == alone(group, PAIRS)


@pytest.mark.parametrize("words", [GPT, ODD, DECODER, UNTIED], ids=["gpt", "odd", "decoder", "untied"])
def test_stages_of_several_chunks_have_the_bits_of_one_rank(group, words):
    """Two lanes are open at once, for different chunks; buckets that lie in both leave when both are final."""
    for pp, tp in CHUNKED.get(group.size, []):
        engine, results = trained((*words, *CHUNKS), mesh(group, pp, tp))
        reduction = engine.machine.reduction
        assert len(engine.chunks) == 2 and reduction.final == set(range(reduction.blocks)), "each leaves when it can"
        assert outcome(engine, results) == alone(group, (*words, "model.layers=4")), f"pp {pp}, tp {tp}"
    if group.size == 2 and words is ODD:
        found = outcome(*trained((*words, *CHUNKS, "mesh.chunks=3", "comm.reduction=naive"), mesh(group, 2, 1)))
        assert found == alone(group, (*words, "model.layers=4"))


@pytest.mark.parametrize("words", [GPT, DECODER, LSTM], ids=["gpt", "decoder", "lstm"])
def test_ranks_that_share_a_model_draw_the_tokens_of_one(group, words):
    """To the last bit of every logit, past the end of the context; all caches together are as large as that of one."""
    if group.size > 4:
        pytest.skip("two, three and four ranks say it")
    expected = alone(group, words, continued)
    for pp, tp in meshes(group.size):
        if pp * tp == group.size:
            found = continued(words, mesh(group, pp, tp))
            assert found == expected, f"pp {pp}, tp {tp}"


def test_beam_search_writes_the_same_on_every_mesh(group):
    """By ranks that share the model, of which each keeps the keys and values of its own layers and heads."""
    if group.size not in (2, 3, 4):
        pytest.skip("two, three and four ranks say it")
    expected = alone(group, PAIRS, searched)
    for pp, tp in meshes(group.size):
        if pp * tp == group.size:
            assert searched(PAIRS, mesh(group, pp, tp)) == expected, f"pp {pp}, tp {tp}"


def searched(words: tuple[str, ...], on: Mesh):
    """What is made of some sources with one beam and with three."""
    config = tiny_config(*words)
    engine = engine_of(config, VOCABULARY, on)
    engine.machine.store.initialise(config.train.seed)
    sources = np.random.default_rng(1).integers(0, VOCABULARY, (3, 5)).astype(np.int32)
    return [written(engine.machine.chain, sources, 8, 0, Beams(width), on) for width in (1, 3)]


def continued(words: tuple[str, ...], on: Mesh):
    """What follows a prompt, with and without a cache, and the bits of the logits of two more positions."""
    config = tiny_config(*words)
    engine = engine_of(config, VOCABULARY, on)
    engine.machine.store.initialise(config.train.seed)
    chain, draw = engine.machine.chain, Sampling(temperature=1.0, seed=7)
    texts = [
        list(itertools.islice(continue_prompt(chain, 16, [1, 2, 3], draw, cached, mesh=on), count))
        for cached, count in ((True, 16), (False, 2))
    ]
    cache, rows = KeyValueCache(16), []
    for ids in ([[1, 2, 3]], [[4]]):
        mine = logits(chain, np.array(ids, np.int32), cache, on)
        part = b"" if mine is None else on.group("tp").allgather_array(mine[0, -1], "logits").tobytes()
        rows.append(on.group("pp").allgather(part.hex(), "the last stage's")[-1])
    kept = sum(keys.size + values.size for keys, values in cache._held.values())
    return [texts, rows, sum(on.world.allgather(kept, "sizes of caches"))]


@pytest.mark.parametrize("words", [GPT, DECODER, GRU], ids=["gpt", "decoder", "gru"])
def test_positions_may_be_cut_too(group, words):
    for pp, tp in meshes(group.size)[group.size // 8 :]:  # of 8 ranks those that cut most
        if tp > 1 and (group.size < 8 or words is GPT):
            found = outcome(*trained(words, mesh(group, pp, tp, sequence=True)))
            assert found == alone(group, words), f"pp {pp}, tp {tp}"


@pytest.mark.parametrize(
    ("words", "level"), [(GPT, 2), pytest.param(DECODER, 3, marks=pytest.mark.slow)], ids=["gpt", "decoder"]
)
def test_what_copies_of_the_model_share_out_changes_no_bit(group, words, level, monkeypatch):
    if group.size > 4:
        pytest.skip("two, three and four ranks say it")
    monkeypatch.setattr(clip, "BLOCK_ELEMENTS", 64)  # of a norm: ranges end inside of parameters too
    expected = alone(group, (*words, "train.seed=64"))
    for pp, tp in [(1, 1), *meshes(group.size)]:
        on = mesh(group, pp, tp)
        if on.size("dp") > 4:  # lanes
            continue
        engine, results = trained((*words, "train.seed=64", f"mesh.zero={level}", "guard.audit_every=1"), on)
        assert outcome(engine, results) == expected, f"pp {pp}, tp {tp}"
        assert (engine.machine.owners is not None) == (level > 1 and on.size("dp") > 1)
        if words is GPT and level > 1 and group.size == 3 and on.is_plain:
            begins = {span.start for span in engine.machine.store.spans}
            assert {start for start, _ in engine.machine.owned.every} - begins, "a range begins inside of a parameter"


FROZEN = {
    "front": (*GPT, "start.freeze=['embed', 'block0']"),  # the first stage has nothing to learn, the table neither
    "inside": (*DECODER, "start.freeze=['block1', 'final*', 'block0.attention.qkv']"),
    "halves": (*UNTIED, "train.schedule=zero_bubble", "start.freeze=['embed', 'block0', 'head']"),
    "top": (*GPT, "start.freeze=['embed', 'block*']", "optim.average=0.5"),
}  # fmt: skip
ADAPTED = (
    *GPT,
    "start.checkpoint=x",
    "start.lora_rank=2",
    "start.lora_targets=['qkv', 'feed_forward.up', 'feed_forward.down']",
)


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 2, 3])
@pytest.mark.parametrize("words", [*FROZEN.values(), ADAPTED], ids=[*FROZEN, "adapters"])
def test_what_is_frozen_and_what_learns_beside_it_is_one_on_every_mesh(group, words, level, tmp_path_factory):
    """Its checkpoint too, which another mesh reads."""
    if group.size > 4:
        pytest.skip("two, three and four ranks say it")
    expected = alone(group, words)
    for pp, tp in [(1, 1), *meshes(group.size)]:
        if words is ADAPTED and tp > 1:
            continue
        engine, results = trained((*words, f"mesh.zero={level}"), mesh(group, pp, tp))
        assert outcome(engine, results) == expected, f"pp {pp}, tp {tp}"
        assert repaired(engine, STEPS) == ()
        folder = Path(group.broadcast(str(tmp_path_factory.mktemp("run")), "a folder"))
        store, owned = engine.machine.store, engine.machine.owned
        saver = checkpoint.Saver(folder, store, engine.state(), b"{}", group, 2, False, owned)
        saver.begin(STEPS)
        about = {"config": {}, "vocabulary": VOCABULARY, "catalog": "", "fingerprint": {}}
        assert saver.publish(about) is None
        again = engine_of(tiny_config(*words, f"train.steps={STEPS}"), VOCABULARY, mesh(group, 1, 1))
        checkpoint.resume(folder, again.machine.store, again.state(), group, print, owned=again.machine.owned)
        assert again.weights_sha256() == expected[1]
        checkpoint.check(folder / f"step-{STEPS:08}", checkpoint.read_manifest(folder / f"step-{STEPS:08}"))


def test_losses_in_float64_are_those_of_one_rank(group):
    words = (*GPT, "train.dtype=float64")
    for pp, tp in meshes(group.size)[:1]:
        (found, _), (expected, _) = made(words, mesh(group, pp, tp)), alone(group, words)
        np.testing.assert_allclose([one[:2] for one in found], [one[:2] for one in expected], rtol=1e-10)


def test_a_rank_holds_and_multiplies_its_part_only(group, monkeypatch):
    """Weights and products: 1/tp of what tp cuts, nothing of other stages, no way round by doing all; of moments its
    own (ZeRO-1)."""
    if group.size > 5:
        pytest.skip("two to five ranks say it")
    counted = _count_products(monkeypatch)
    whole, _ = trained(DECODER, Mesh(), steps=1)
    all_products, sizes = counted.pop(), _sizes(whole)
    for pp, tp in meshes(group.size):
        on = mesh(group, pp, tp)
        engine, _ = trained(DECODER, on, steps=1)
        store = engine.machine.store
        for span in store.spans:
            cut = tp if "tp" in span.parameter.layout.axes else 1
            assert (span.stop - span.start) * cut == sizes[span.parameter.name]
        weights, *moments = engine.state().values()
        assert weights.size == store.size
        for moment in moments[:2]:  # the third is the average, which all hold
            assert sum(on.group("dp").allgather(moment.size, "sizes")) == store.size
        names = on.group("pp").allgather([span.parameter.name for span in store.own], "names")
        assert sorted(name for some in names for name in some) == sorted(sizes), "each on one stage"
        everybodys = group.allgather(counted.pop(), "products")
        assert sum(everybodys) == pytest.approx(all_products, rel=1e-9), "each product once, on one rank"
        assert max(everybodys) < 2.2 * all_products / group.size, "and on all ranks about as many"


def test_a_rank_sends_what_the_plain_scheme_sends(group, monkeypatch):
    """2 (R − 1) / R of an activation for each sum: two a block and way, one for the embedding, one for the head."""
    sent = []
    plain = Mailbox.send
    monkeypatch.setattr(Mailbox, "send", lambda self, array, *to: sent.append(array.nbytes) or plain(self, array, *to))
    for pp, tp in meshes(group.size):
        if pp > 1 or tp == 1:
            continue
        engine, (result,) = trained(DECODER, mesh(group, pp, tp), steps=1)
        settings, tokens = engine.machine, 2 * 16
        micros, activation = len(engine.load.mine), tokens * 32 * 4
        gains = 3 * (2 * 4) * 4  # of queries and keys, with heads 4 wide: too few to matter in a model that is not tiny
        sums = (4 * 3 + 2) * activation + gains
        expected = micros * 2 * (tp - 1) / tp * sums + settings.reduction.costs()["sent_bytes"]
        assert sum(sent) <= 1.05 * expected and result.targets
        sent.clear()


@pytest.mark.parametrize("words", [GPT, pytest.param(DECODER, marks=pytest.mark.slow)], ids=["gpt", "decoder"])
def test_any_mesh_goes_on_from_what_another_has_saved(group, words, tmp_path_factory):
    """A step on one mesh, the last one on the next, weights and moments by way of a checkpoint."""
    if group.size > (4 if words is GPT else 3):
        pytest.skip("two and three ranks say it, and four for one model")
    words = (*words, "model.layers=4")
    chunked = [(sizes, CHUNKS) for sizes in CHUNKED.get(group.size, [])[-1:]]
    every = [((1, 1), ()), *chunked, *((sizes, ()) for sizes in meshes(group.size))]
    for level, ((sizes, more), (others, other_more)) in enumerate(zip(every, [*every[1:], every[0]], strict=True)):
        engine, _ = trained((*words, *more, f"mesh.zero={3 - level % 4}"), mesh(group, *sizes), steps=1)
        folder = Path(group.broadcast(str(tmp_path_factory.mktemp("checkpoints")), "a folder"))
        saver = checkpoint.Saver(
            folder, engine.machine.store, engine.state(), b"{}", group, 1, False, engine.machine.owned
        )
        saver.begin(1)
        about = {"config": {}, "vocabulary": VOCABULARY, "catalog": "", "fingerprint": {}}
        assert saver.publish(about) is None
        config = tiny_config(*words, *other_more, f"train.steps={STEPS}", f"mesh.zero={level % 4}")
        on = mesh(group, *others)
        other = engine_of(config, VOCABULARY, on)
        found = checkpoint.resume(folder, other.machine.store, other.state(), group, print, owned=other.machine.owned)
        assert found is not None and found[1].step == 1
        other.step(1, batches(config, other.plan(1, STEPS)))
        assert other.weights_sha256() == alone(group, words)[1], f"from {sizes} {more} to {others} {other_more}"


def test_all_ranks_read_the_same_checkpoint(group, tmp_path_factory):
    """One that is damaged where a single rank reads it is passed over by all."""
    if group.size != 2:
        pytest.skip("one rank finds it sound, one does not")
    folder = Path(group.broadcast(str(tmp_path_factory.mktemp("checkpoints")), "a folder"))
    engine, _ = trained(GPT, Mesh(group), steps=1)
    saver = checkpoint.Saver(folder, engine.machine.store, engine.state(), b"{}", group, 2, False)
    for step in (1, 2):
        saver.begin(step)
        assert saver.publish({"config": {}, "vocabulary": VOCABULARY, "catalog": "", "fingerprint": {}}) is None
    said = []

    def load(path, manifest):
        if manifest.step == 2 and group.rank == group.size - 1:
            raise checkpoint.DamagedCheckpoint("a flipped bit")
        return manifest.step

    assert checkpoint.newest_sound(folder, load, said.append, group) == 1
    assert len(said) == 1 and "step-00000002 is damaged (a flipped bit)" in said[0]


def test_what_is_wrong_twice_is_skipped_on_any_mesh(group):
    """A micro-batch whose gradient of one gain is not finite, wherever it runs: the same verdict, the same bits."""

    if group.size > 4:
        pytest.skip("two, three and four ranks say it")
    expected = alone(group, GPT, spoiled)
    assert expected[2] == [5]
    for pp, tp in meshes(group.size)[:3:2] or meshes(group.size)[:2]:
        found = spoiled((*GPT, f"mesh.zero={3 if group.size in (2, 3) else 0}"), mesh(group, pp, tp))
        assert found == expected, f"pp {pp}, tp {tp}"
    if group.size == 2:
        found = spoiled((*GPT, *CHUNKS, "model.layers=3"), mesh(group, 2, 1))
        assert found == expected, "and no group of micro-batches is whole"


def spoiled(words, on):
    config = tiny_config(*words, f"train.steps={STEPS}")
    engine = engine_of(config, VOCABULARY, on)
    engine.machine.store.initialise(config.train.seed)
    for part in engine.machine.chain.parts:
        if any(parameter.name == "block0.norm2.gain" for parameter in part.parameters()):
            _spoil(part, (1, 5))
    source = batches(config, list(engine.plan(0, STEPS)))
    results = [engine.step(step, source) for step in range(STEPS)]
    return [*outcome(engine, results), list(results[1].verdict.skipped)]


def test_between_parts_a_rank_holds_its_own_weights_only(group, monkeypatch):
    """ZeRO-3: pages that are there of what layers see, when a part begins and after a step."""
    if group.size not in (2, 3):
        pytest.skip("two and three ranks say it")
    words = (*GPT, "model.width=128", "mesh.zero=3", "eval.rows=2")
    there, plain = [], Lent.need
    monkeypatch.setattr(Lent, "need", lambda self, part: plain(self, part) or there.append(_resident(self.store.shown)))
    engine, _ = trained(words, Mesh(group), steps=1)
    m = engine.machine
    parts = sorted(stop - start for start, stop in m.store.segments)[-2:]
    pages = 4096 * 2 * len(m.store.segments)  # of which others' weights have a part
    assert len(there) > 10 and max(there) <= m.owned.data.nbytes + 4 * sum(parts) + pages
    assert m.owned.data.nbytes - pages < _resident(m.store.shown) <= m.owned.data.nbytes + pages
    assert sum(group.allgather(m.owned.size, "sizes")) == m.store.size
    assert engine.state()["weights"].size == m.owned.size < 0.6 * m.store.size


def _resident(array) -> int:
    """Bytes of an array in pages that are in memory."""
    first = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    count = -(-(array.ctypes.data + array.nbytes - first) // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * count)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(count * mmap.PAGESIZE), found) == 0
    return sum(one & 1 for one in found) * mmap.PAGESIZE


def _spoil(part, where) -> None:
    backward = part.backward

    def run(dy, saved, ctx):
        dx = backward(dy, saved, ctx)
        if (ctx.step, ctx.micro_batch) == where:
            ctx.grad(part.parameters()[0])[0] = np.nan
        return dx

    part.backward = run


def test_replicas_of_a_part_are_compared_and_mended(group):
    """A bit that flips on one rank of a part, with two more that hold it."""
    for pp, tp in ((1, 2), (2, 1)):
        if group.size != 3 * pp * tp:
            continue
        on = mesh(group, pp, tp)
        engine, _ = trained(GPT, on, steps=1)
        before = engine.weights_sha256()
        if group.rank == group.size - 1:
            engine.machine.store.data[3] += 1.0
        said = repaired(engine, 1)
        assert len(said) == 1 and f"rank {group.size - 1} held other weights than 2 of 3" in said[0]
        assert engine.weights_sha256() == before


def test_what_cannot_be_cut_is_refused_by_all(group):
    if group.size not in (2, 4):
        pytest.skip("two or four ranks say it")
    for words, (pp, tp), text in (
        (
            ("model.heads=3", "model.width=24"),
            (1, 2),
            "does not divide the 3 heads, features or tokens of block0.attention.qkv.weight",
        ),
        (("model.layers=1",), (group.size, 1), "the model has 3"),
        (
            (*CHUNKS, "model.layers=1"),
            (2, 1),
            "mesh.chunks = 2 of mesh.pp = 2 stages need 4 parts, and .*: set .* = 1 or",
        ),
        (("model.kind=lstm", "optim.name=muon"), (1, 2), "whole matrices, and mesh.tp = 2 cuts those of layer0.cell"),
    ):
        if pp == 2 and "mesh.chunks=2" not in words:
            continue
        with pytest.raises(ConfigError, match=text):
            engine_of(tiny_config(*words), VOCABULARY, mesh(group, pp, tp))


def test_a_command_refuses_ranks_that_it_has_no_use_for(group):
    asked = argparse.Namespace(pp=1, tp=group.size + 1)
    with pytest.raises(ConfigError, match=f"--tp {group.size + 1} need a multiple of {group.size + 1} ranks, the "):
        mesh_of(asked, group, copies=True)
    asked.tp = 1
    assert mesh_of(asked, group, copies=True).size("dp") == group.size
    if group.size > 1:
        with pytest.raises(ConfigError, match=f"need 1 rank, the launcher gave {group.size}: start it without"):
            mesh_of(asked, group, copies=False)


def test_a_collective_and_its_adjoint(group):
    """<F x, y> = <x, F* y>: what is joined on the way there is copied on the way back, and the other way round."""
    random = np.random.default_rng(7)
    x, y = random.standard_normal((2, group.size, 5, 7))  # a row for each rank
    mine = x[group.rank].copy()
    whole = joined(group, mine.copy(), "x")
    assert (whole == tree(list(x))).all() if group.size > 1 else True
    common = y[0]  # a joined array is one array: its gradient is the same on all ranks
    there = float((whole * common).sum())
    back = sum(float((row * common).sum()) for row in x)
    assert there == pytest.approx(back, rel=1e-12)
    copied = x[0]  # the other way: one array used by all, whose gradients are joined
    there = sum(float((copied * gradient).sum()) for gradient in y)
    back = float((copied * joined(group, y[group.rank].copy(), "y")).sum())
    assert there == pytest.approx(back, rel=1e-12)


def test_positions_are_gathered_and_scattered(group):
    """The pair that sequence parallelism has in the place of an array and its sum: adjoint, in the tree's order."""
    random = np.random.default_rng(11)
    x, y = random.standard_normal((group.size, 2, 3, 5)), random.standard_normal((group.size, 2, 3 * group.size, 5))
    whole = gathered(group, x[group.rank], "x")
    assert (whole == np.concatenate(list(x), axis=1)).all()
    mine = scattered(group, y[group.rank].copy(), "y")
    here = slice(3 * group.rank, 3 * (group.rank + 1))
    assert (mine == tree([part[:, here] for part in y])).all()
    there = sum(float((whole * part).sum()) for part in y)
    back = sum(group.allgather(float((x[group.rank] * mine).sum()), "products"))
    assert there == pytest.approx(back, rel=1e-12)


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_numbers_are_joined_in_the_order_of_the_tree(group, count):
    rows = np.random.default_rng(3).standard_normal((group.size, count)).astype("f4")
    assert (joined_rows(group, rows[group.rank], "rows") == tree(list(rows))).all()
    assert (joined(group, rows[group.rank].copy(), "an array") == tree(list(rows))).all()
    assert (largest(group, rows[group.rank], "maxima") == rows.max(axis=0)).all()


def test_a_peer_that_never_comes_is_an_error_of_its_own_words(group):
    if group.size != 2:
        pytest.skip("one waits, one does not come")
    on = mesh(group.with_timeout(2.0), 2, 1)
    if group.rank == 0:
        with pytest.raises(CommError, match="gradients of micro-batch"):
            trained(GPT, on, steps=1)
    group.with_timeout(60.0).barrier("the one that waited")


def _sizes(engine) -> dict[str, int]:
    return {span.parameter.name: span.stop - span.start for span in engine.machine.store.spans}


class _Counted:
    """Multiplications of products."""

    def __init__(self) -> None:
        self.number = 0

    def pop(self) -> int:
        number, self.number = self.number, 0
        return number


def _count_products(monkeypatch) -> _Counted:
    counted = _Counted()

    def counting(room, name, cost):
        plain = getattr(room, name)

        def run(*arguments, **named):
            counted.number += cost(*arguments)
            return plain(*arguments, **named)

        monkeypatch.setattr(room, name, run)

    rows_times_weight = lambda x, w, *more: x.shape[0] * w.size  # noqa: E731
    for name in ("forward", "forward_gelu", "forward_relu2", "forward_swiglu", "backward_input"):
        counting(linear, name, rows_times_weight)
    counting(matmul, "add", lambda a, b, *more: a.size * b.shape[1])
    return counted
