"""What the tests of whole programs share: made once per session."""

from pathlib import Path

import pytest
from programs import EVERY_TWO, Ended, Place, make_text, prepare

from mlm_mpi.__main__ import main


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of bytes in several shards."""
    folder = tmp_path_factory.mktemp("corpus")
    return prepare(make_text(folder / "text"), folder / "corpus", "--tokenizer", "bytes", "--heldout", "0.04")


@pytest.fixture
def place(tmp_path: Path, corpus: Path) -> Place:
    """A folder of this test's own to train in."""
    return Place(tmp_path, corpus)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Place:
    """Where the runs lie that tests compare with; tests do not change them."""
    return Place(tmp_path_factory.mktemp("home"), corpus)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]):
    """A command in this process, which spares half a second of imports. Of those that train nothing."""

    def run(*words: object) -> Ended:
        code = main([str(word) for word in words])
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def straight(home: Place) -> Ended:
    """Six steps on one rank without a launcher, run folder home/straight, a checkpoint every two steps."""
    ended = home.train("straight", None, *EVERY_TWO)
    assert ended.code == 0, ended.err
    return ended
