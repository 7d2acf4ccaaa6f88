"""The built-in corpus: the same documents whatever a distribution or a patch release makes of Python's library."""

import hashlib
import subprocess
import sys

import pytest
from corpora import run_prepare

from mlm_mpi.data import builtin
from mlm_mpi.data.catalog import Catalog

# of 11,996 documents; found with CPython 3.11.2 (Debian), 3.11.7, 3.12.1 and 3.13.0 each running this code
TEXTS = "83cdda0df971"
CONTENT = "a3260bdf35747d05b1d21bf3d634aac543b768b4a20718d6fa1c2cf096134599"

MODULE = '''"""What the module is for: {name}."""
# A comment of one module of a fake library ({name}),
#    continued, with its indentation
def function():
    """Returns nothing, and says so at some length: {name}.

    A second paragraph, which a patch release may change: {more}.
    """
    # short
class Class:
    "A class."
    # {more}: a comment inside of a class, which may change
'''


def library(folder, names, more="once"):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MODULE.format(name=name, more=more if name == "b.py" else "always"))
    (folder / "pydoc_data").mkdir()
    topic = "First paragraph of the topic, long enough.\n\nSecond paragraph of the topic, changed {}.\n\nShort.\n"
    (folder / "pydoc_data" / "topics.py").write_text(f"topics = {{'one': {topic.format(more)!r}}}")
    return folder


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """A library, and the same one as a distribution and a patch release make it; the list is of both."""
    first = library(tmp_path / "first", ["b.py", "a.py", "json/__init__.py", "tkinter/split_off.py", "c.py"])
    second = library(tmp_path / "second", ["a.py", "b.py", "json/__init__.py", "_distribution.py", "z.py"], "again")
    first_line, rest = MODULE.format(name="c.py", more="always").split("\n", 1)
    (second / "c.py").write_text(f'{first_line}\nclass More:\n    """Another class."""\n{rest}')
    (second / "broken.py").write_text("def (")
    (second / "nul.py").write_bytes(b'"""Text."""\0')
    (second / "latin.py").write_bytes(b'"""Gr\xfc\xdfe."""')
    (second / "dangling.py").symlink_to("nowhere")
    listed = tuple(map(builtin._digest, builtin._common([first, second])))
    monkeypatch.setattr(builtin, "_listed", lambda: listed)
    return first, second


def test_what_a_distribution_adds_drops_or_changes_does_not_matter(libraries):
    documents = [builtin.documents(folder) for folder in libraries]
    assert documents[0] == documents[1] and len(documents[0]) == builtin.count()
    texts = [documents[0][place] for place in sorted(documents[0])]
    assert [text for text in texts if "What the module" in text] == [
        f"What the module is for: {name}." for name in ("a.py", "b.py", "c.py", "json/__init__.py")
    ]
    assert "A comment of one module of a fake library (c.py),\n   continued, with its indentation" in texts
    # of what has changed its other paragraphs count, of what has not the whole
    assert "Returns nothing, and says so at some length: b.py." in texts
    assert any(text.endswith("may change: always.") and "c.py" in text for text in texts)
    assert "First paragraph of the topic, long enough." in texts
    assert not [text for text in texts if "once" in text or "again" in text or "short" in text.split()]


def test_a_text_that_is_missing_is_counted(libraries):
    (libraries[0] / "c.py").unlink()
    found = builtin.documents(libraries[0])
    assert len(found) == builtin.count() - 3
    assert found.items() < builtin.documents(libraries[1]).items()


@pytest.mark.slow
def test_this_python_holds_every_listed_document():
    found = builtin.documents()
    assert [*sorted(found)] == [*range(builtin.count())]
    digest = hashlib.sha256("\0".join(found[place] for place in sorted(found)).encode())
    assert digest.hexdigest()[:12] == TEXTS


@pytest.mark.slow
def test_the_content_of_the_builtin_corpus_is_pinned(tmp_path, capsys):
    run_prepare("--builtin", "--out", tmp_path / "out")
    catalog = Catalog.open(tmp_path / "out")
    assert catalog.manifest.content == CONTENT and catalog.tokens("train") >= 550_000
    assert "built-in" not in capsys.readouterr().out


def test_documents_that_are_missing_are_reported(tmp_path, capsys, libraries, monkeypatch):
    (libraries[0] / "c.py").unlink()
    documents = builtin.documents(libraries[0])
    monkeypatch.setattr(builtin, "documents", lambda: documents)
    run_prepare("--builtin", "--out", tmp_path / "out", "--tokenizer", "bytes", "--heldout", 0)
    assert f"built-in    3 of {builtin.count()} documents are not in Python" in capsys.readouterr().out


def test_the_list_is_made_by_a_command(libraries, tmp_path):
    code = (
        "import runpy, sys; from pathlib import Path\n"
        "write = Path.write_bytes; Path.write_bytes = lambda self, content: write(Path('list'), content)\n"
        "runpy.run_module('mlm_mpi.data.builtin', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *libraries], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert f"{builtin.count()} texts are in all of 2 libraries" in done.stdout, done.stderr
    assert (tmp_path / "list").read_bytes() == b"".join(builtin._listed())
