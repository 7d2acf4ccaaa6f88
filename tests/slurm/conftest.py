"""The cluster, and what its tests compare with."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "programs"))

from cluster import LAB, SETTINGS, TIMEOUT_S, Cluster
from programs import ended, make_text, prepare


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of bytes in several shards."""
    folder = tmp_path_factory.mktemp("corpus")
    return prepare(make_text(folder / "text"), folder / "corpus", "--tokenizer", "bytes", "--heldout", "0.04")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> str:
    """The hash of the weights after the training of all jobs, on one rank without Slurm."""
    home = Cluster(tmp_path_factory.mktemp("home"), corpus)
    words = home.words("straight", None, *SETTINGS)
    return ended(home.start(*words), 5 * TIMEOUT_S).weights  # 35 s alone on the machine, which may be busy


@pytest.fixture(scope="session")
def slurm(request: pytest.FixtureRequest) -> Iterator[None]:
    """Slurm on two nodes; the parameter says which processes get its signals: see `lab`."""
    subprocess.run([LAB, "up", request.param], check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL)
    yield
    subprocess.run([LAB, "down"], check=True, timeout=TIMEOUT_S)


@pytest.fixture
def cluster(tmp_path: Path, corpus: Path, slurm: None) -> Cluster:
    """A folder of this test's own, whose name wants quotes, to submit from."""
    folder = tmp_path / "Ort für 'Läufe'"
    folder.mkdir()
    return Cluster(folder, corpus)
