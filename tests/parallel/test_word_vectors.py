"""Skip-gram on any number of ranks: micro-batches of different numbers of pairs, and one set of bits."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import digests
from streams import Tokens
from tiny import VOCABULARY

from mlm_mpi import config as configuration
from mlm_mpi.backend.choice import place_of
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.data.pairs import Drawing, Noise, Pairs, counted, kept
from mlm_mpi.layers.base import Sizes
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks import word_vectors
from mlm_mpi.train.build import build
from mlm_mpi.train.measure import measure

CONFIG = configuration.load(None, [
    "model.kind=skipgram", "model.width=20", "model.context=24", "task.kind=word_vectors", "train.micro_batches=8",
    "train.lanes=8", "train.rows=2", "train.steps=3", "optim.learning_rate=0.05", "comm.bucket_mib=0.001",
])  # fmt: skip


def trained(mesh):
    """(losses and counts of three steps, digests, held-out sums)."""
    stream = Tokens(600, vocabulary=VOCABULARY)
    counts = counted([stream], VOCABULARY, [0])
    drawing = Drawing(3, kept(counts, 0.02), Noise(counts, 0.75), 3, 4, 0)
    samples, plugins, place = Pairs(stream, 24, True, drawing), Plugins(), place_of(CONFIG)
    engine = build(CONFIG, plugins, word_vectors.parts(CONFIG, plugins, Sizes(VOCABULARY)), mesh, place, 20)
    engine.machine.store.initialise(CONFIG.train.seed)
    plan, results = engine.plan(0, 3), []

    def next_batch():
        step, index = next(plan)
        return samples.batch([2 * index, 2 * index + 1], step, index)

    for step in range(3):
        done = engine.step(step, next_batch)
        results.append([done.loss, done.targets, done.gradient_norm])
    heldout = Pairs(Tokens(200, seed=1, vocabulary=VOCABULARY, split="heldout"), 24, False, drawing)
    measured = measure(engine.machine.chain, heldout, 2, 0, mesh, place)
    return [results, digests(engine), measured.loss, measured.targets]


@pytest.mark.usefixtures("three")
def test_three_steps_have_the_bits_of_one_rank(group):
    alone = group.broadcast(trained(Mesh()) if group.rank == 0 else None, "what one rank comes to")
    found = trained(Mesh(group))
    assert len({targets for _, targets, _ in found[0]}) > 1, "chance decides how many pairs there are"
    assert found == alone
