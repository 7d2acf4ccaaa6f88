"""A kind is a file: of a room of the package, or of the folder that the command names, and of no other."""

import dataclasses
import hashlib
import os
import sys
import typing

import pytest

from mlm_mpi.errors import ConfigError, DataError, MlmError
from mlm_mpi.plug import Plugins

ROOM = "formats"
OWN = ["jsonl", "text"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "plugins" / ROOM).mkdir(parents=True)
    return tmp_path / "plugins"


def written(folder, name, content="VALUE = 1\n"):
    path = folder / ROOM / name
    path.write_text(content)
    return path


def refused(action, *words):
    with pytest.raises(ConfigError) as caught:
        action()
    text = str(caught.value)
    assert text.isprintable() and all(str(word) in text for word in words), text


def test_kinds_are_the_modules_of_a_room_and_the_files_of_the_folder(folder):
    assert Plugins().kinds(ROOM) == OWN
    written(folder, "pipe.py")
    for name in ("_helper.py", ".hidden.py", "notes.txt", "pipe.pyc"):
        written(folder, name)
    plugins = Plugins(folder)
    assert plugins.kinds(ROOM) == ["jsonl", "pipe", "text"]
    assert not plugins.used  # nothing has been loaded for a list of names


def test_a_room_that_the_folder_lacks_has_our_kinds(tmp_path):
    assert Plugins(tmp_path).kinds(ROOM) == OWN
    assert Plugins(tmp_path).find(ROOM, "text", "format").__name__ == "mlm_mpi.data.formats.text"


def test_a_file_of_the_folder_goes_before_a_module_of_the_same_name(folder):
    path = written(folder, "text.py", "VALUE = 7\n")
    found = Plugins(folder).find(ROOM, "text", "format")
    assert found.VALUE == 7 and found.__file__ == str(path)


def test_an_unknown_kind_is_told_the_nearest_name(folder):
    written(folder, "pipe.py")
    refused(
        lambda: Plugins(folder).find(ROOM, "pipes", "data.format"),
        'data.format = "pipes"',
        "jsonl, pipe, text; did you mean 'pipe'?",
    )
    refused(lambda: Plugins().find(ROOM, "jsonlines", "data.format"), "did you mean 'jsonl'?")
    refused(
        lambda: Plugins().find(ROOM, "zzz", "data.format"), "is none of jsonl, text (a file of your own: --plugins DIR)"
    )


@pytest.mark.parametrize("kind", ["", "../pipe", "formats/pipe", "os", "pipe.py", "text\n", "x" * 5000])
def test_no_kind_leads_out_of_its_room(folder, kind):
    written(folder, "pipe.py")
    (folder / "pipe.py").write_text("raise SystemExit\n")
    refused(lambda: Plugins(folder).find(ROOM, kind, "key"), "key = ")


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    for name in ("nowhere", "file", "a\nb"):
        refused(lambda name=name: Plugins(tmp_path / name), "--plugins", "is no folder")


@pytest.mark.parametrize(
    "name", ["Mine.py", "my-format.py", "2nd.py", "ünder.py", "a b.py", "a.b.py", "x" * 65 + ".py"]
)
def test_a_file_that_could_never_be_named_is_refused_and_not_passed_over(folder, name):
    path = written(folder, name)
    refused(lambda: Plugins(folder).kinds(ROOM), path, "names no kind")


def fifo(path):
    os.mkfifo(path)


def oversized(path):
    path.write_text("#" * (1 << 20) + "\n")


def link_out(path):
    outside = path.parents[2] / "outside.py"
    outside.write_text("VALUE = 1\n")
    path.symlink_to(outside)


def endless(path):
    path.symlink_to("/dev/zero")


def loop(path):
    path.symlink_to(path)


def dangling(path):
    path.symlink_to("nothing.py")


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (fifo, "it is a FIFO, not a regular file"),
        (lambda path: path.mkdir(), "it is a folder"),
        (oversized, "at most 1,048,576 are read"),
        (link_out, "it leads out of"),
        (endless, "it leads out of"),
        (loop, "cannot read"),
        (dangling, "cannot read"),
    ],
)
def test_what_is_no_plain_file_of_the_folder_is_one_line(folder, make, word):
    make(folder / ROOM / "mine.py")
    plugins = Plugins(folder)
    refused(lambda: plugins.find(ROOM, "mine", "format"), folder / ROOM / "mine.py", word)
    assert not plugins.used


def test_a_link_inside_the_folder_is_followed(folder):
    (folder / "shared.py").write_text("VALUE = 3\n")
    (folder / ROOM / "mine.py").symlink_to("../shared.py")
    assert Plugins(folder).find(ROOM, "mine", "format").VALUE == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"def documents(:\n", ("SyntaxError", "line 1")),
        (b"\xff\xfe\n", ("SyntaxError",)),
        (b"a = 1\0\n", ("does not load",)),
        (b"import no_such_module_anywhere\n", ("ModuleNotFoundError", "no_such_module_anywhere")),
        (b"from . import helper\n", ("does not load",)),
        (b"1 / 0\n", ("ZeroDivisionError",)),
        (b"raise ValueError('two\\nlines')\n", ("ValueError", "two\\nlines")),
        (b"raise SystemExit(0)\n", ("SystemExit",)),
        (b"x = " + b"(" * 5000, ("does not load",)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_file_that_does_not_load_is_one_line(folder, content, words):
    path = folder / ROOM / "mine.py"
    path.write_bytes(content)
    plugins = Plugins(folder)
    for _ in range(2):  # nothing half loaded is kept
        refused(lambda: plugins.find(ROOM, "mine", "format"), path, *words, "mend it")
    assert not plugins.used


def test_an_error_of_ours_keeps_its_kind(folder):
    written(folder, "mine.py", "from mlm_mpi.errors import DataError\nraise DataError('needs a table')\n")
    with pytest.raises(DataError, match="needs a table"):
        Plugins(folder).find(ROOM, "mine", "format")
    assert issubclass(DataError, MlmError)


def test_used_holds_the_digest_of_what_was_loaded_and_of_nothing_else(folder):
    path = written(folder, "mine.py", "# ünï\nVALUE = 5\n")
    written(folder, "other.py")
    plugins = Plugins(folder)
    plugins.find(ROOM, "text", "format")
    assert plugins.used == {}
    first = plugins.find(ROOM, "mine", "format")
    assert plugins.used == {"formats/mine.py": hashlib.sha256(path.read_bytes()).hexdigest()}
    path.write_text("VALUE = 6\n")  # what has been loaded stays what its digest says
    assert plugins.find(ROOM, "mine", "format") is first and first.VALUE == 5


DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass

class Inner:
    pass

@dataclass(frozen=True)
class Settings:
    inner: Inner
    width: int = {width}
"""


def test_two_plugins_share_no_state(tmp_path):
    found = []
    for width in (3, 4):
        folder = tmp_path / str(width)
        (folder / ROOM).mkdir(parents=True)
        written(folder, "mine.py", DATACLASS.format(width=width))
        plugins = Plugins(folder)
        found.append((plugins, plugins.find(ROOM, "mine", "format")))
    (one, a), (two, b) = found
    assert one.used != two.used and one.find(ROOM, "mine", "format") is a
    for module, width in ((a, 3), (b, 4)):
        assert dataclasses.fields(module.Settings)[1].default == width
        assert typing.get_type_hints(module.Settings)["inner"] is module.Inner
        assert sys.modules[module.__name__] is module
    assert Plugins().kinds(ROOM) == OWN


def test_the_current_folder_is_never_searched(folder, monkeypatch):
    written(folder, "mine.py")
    monkeypatch.chdir(folder)
    path = list(sys.path)
    assert Plugins().kinds(ROOM) == OWN
    refused(lambda: Plugins().find(ROOM, "mine", "format"), 'format = "mine" is none of')
    Plugins(folder).find(ROOM, "mine", "format")
    assert sys.path == path
