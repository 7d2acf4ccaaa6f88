"""Word vectors as a user learns them: prepared words, trained on any number of ranks, killed, exported, looked at."""

import json
import random
from pathlib import Path

import pytest
from programs import Place, prepare

CONFIG = """
[model]
kind = "skipgram"
width = 16
context = 32
[task]
kind = "word_vectors"
window = 2
subsample = 0.01
[data]
dir = "{corpus}"
[train]
steps = 6
micro_batches = 8
lanes = 8
rows = 4
[optim]
learning_rate = 0.05
weight_decay = 0.0
[eval]
every = 3
[checkpoint]
every = 1
background = false
[comm]
bucket_mib = 0.001
[log]
curve = false
"""
KILL = """
import signal
def before_step(rank, step):
    if rank == 1 and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder, draw = tmp_path_factory.mktemp("words"), random.Random(1)
    (folder / "text").mkdir()
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(60)]
    for number in range(20):
        (folder / "text" / f"{number}.txt").write_text(" ".join(draw.choices(words, k=300)) + "\n")
    options = "--tokenizer", "words", "--vocab", "50", "--heldout", "0.1"
    place = Place(folder, prepare(folder / "text", folder / "corpus", *options))
    place.config.write_text(CONFIG.format(corpus=place.corpus))
    return place


@pytest.mark.slow
def test_one_hash_on_any_number_of_ranks_killed_resumed_and_looked_at(home, say):
    straight = home.train("straight", None)
    for ranks in (2, 3, 4):
        assert home.train(f"on{ranks}", ranks).weights == straight.weights
    assert home.train("zero", 2, "mesh.zero=2").weights == straight.weights
    assert home.faulty(KILL, "run", 3).code != 0
    assert home.train("run", 4).weights == straight.weights
    assert home.losses("run") == home.losses("straight") and home.proven("run").steps == 6
    told = json.loads(say("evaluate", home.folder / "run", "--json").out)
    assert told["loss"] < told["nats of a guess"] and told["tokens"] > 500
    home.program("generate", "run", "--prompt", "a").refused('was trained for task.kind = "word_vectors", which cont')
    home.train("tp", 2, "mesh.tp=2").refused('model.kind = "skipgram" does not heed mesh.tp')
    word = Path(home.folder / "text" / "0.txt").read_text().split()[0]
    run, file = home.folder / "run", home.folder / "a.vec"
    one = json.loads(say("vectors", run, word, "--json", "--export", file).out)
    two = json.loads(say("vectors", file, word, "--json").out)
    assert one["neighbours"] == two["neighbours"] and one["words"] == 48 and one["width"] == 16
