"""A file format costs one file: `formats/pipe.py` in the folder of --plugins, and no edit elsewhere."""

import gzip
import hashlib
import json
import os
import shlex
import subprocess
import sys

import pytest
from corpora import contents, in_a_process, run_prepare, sentences
from test_prepare import documents

from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.reading import Formats
from mlm_mpi.errors import ConfigError, DataError
from mlm_mpi.plug import Plugins

PIPE = """
SUFFIXES = (".pipe",)


def documents(content):
    yield from content.text().split("\\n|||\\n")
"""
# the same, however large a file is
STREAM = """
SUFFIXES = (".pipe",)
SHARED = True


def documents(content):
    lines = []
    for line in content.lines():
        if line == "|||\\n":
            yield "".join(lines).removesuffix("\\n").__str__
            lines = []
        else:
            lines.append(line)
    yield "".join(lines)
"""
TEXTS = [sentences(seed, 40).strip() for seed in range(20)]
CONTENT = "\n|||\n".join(TEXTS)


def plugins(tmp_path, name="plugins", **files):
    """A folder with these formats."""
    for stem, content in files.items():
        path = tmp_path / name / "formats" / f"{stem}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / name


def prepared(tmp_path, path, *words, out="out"):
    run_prepare(path, "--out", tmp_path / out, "--tokenizer", "bytes", "--heldout", 0, *words)
    return documents(tmp_path / out, "train")


def refused(tmp_path, *words, error=DataError, given):
    with pytest.raises(error) as caught:
        prepared(tmp_path, *given)
    text = str(caught.value)
    assert text.isprintable() and all(str(word) in text for word in words), text
    assert not (tmp_path / "out").exists()


@pytest.fixture
def piped(tmp_path):
    path = tmp_path / "in" / "a.pipe"
    path.parent.mkdir()
    path.write_text(CONTENT)
    return path


@pytest.mark.parametrize("source", [PIPE, STREAM], ids=["whole", "shared"])
def test_a_file_makes_a_format(tmp_path, piped, capsys, source):
    folder = plugins(tmp_path, pipe=source)
    assert prepared(tmp_path, piped, "--plugins", folder) == TEXTS
    told = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert told["plugins"] == {"formats/pipe.py": hashlib.sha256(source.encode()).hexdigest()}
    assert told["command"].endswith(f"--plugins {folder}")
    first = contents(tmp_path / "out")
    run_prepare(*shlex.split(told["command"])[2:])
    assert contents(tmp_path / "out") == first


def test_without_plugins_the_file_is_text_as_its_name_says(tmp_path, piped, capsys):
    assert prepared(tmp_path, piped) == [CONTENT]
    assert "plugins" not in json.loads((tmp_path / "out" / "prepared.json").read_text())
    (tmp_path / "out").rename(tmp_path / "other")
    refused(tmp_path, "a.jsonl:1 is not JSON", given=[piped.rename(piped.with_suffix(".jsonl"))])


def test_the_catalog_knows_the_text_alone(tmp_path, piped, capsys):
    """Two readers of the same documents make the same corpus; prepared.json tells them apart."""
    found = []
    for name, source in (("one", PIPE), ("two", STREAM), ("three", PIPE.replace('"\\n', 'chr(10) + "'))):
        prepared(tmp_path, piped, "--plugins", plugins(tmp_path, name, pipe=source), out=f"out-{name}")
        found.append(contents(tmp_path / f"out-{name}"))
    assert len({files.pop("prepared.json") for files in found}) == 3
    assert found[0] == found[1] == found[2]
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepared(tmp_path, lines)
    assert Catalog.open(tmp_path / "out").digest == Catalog.open(tmp_path / "out-one").digest


def test_compression_and_encodings_are_read_for_every_format(tmp_path, piped, capsys):
    folder = plugins(tmp_path, pipe=PIPE)
    packed = piped.with_name("b.pipe.gz")
    packed.write_bytes(gzip.compress(CONTENT.replace("a", "ä").encode("utf-16")))
    assert prepared(tmp_path, packed, "--plugins", folder) == [text.replace("a", "ä") for text in TEXTS]
    piped.write_bytes(CONTENT.replace("a", "ä").encode("cp1252"))
    (tmp_path / "out").rename(tmp_path / "other")
    refused(tmp_path, "a.pipe is not in the encoding", "--encoding", given=[piped, "--plugins", folder])
    piped.write_bytes(b"%PDF-1.7\n")
    refused(tmp_path, "a.pipe is a PDF", given=[piped, "--plugins", folder])


def test_a_format_may_be_binary(tmp_path, piped, capsys):
    """What is refused as text can have a reader: here numbers of bytes and so many bytes, in UTF-8."""
    source = """
SUFFIXES = (".rec",)


def documents(content):
    with content.binary() as file:
        while head := file.read(2):
            yield file.read(int.from_bytes(head, "little")).decode()
"""
    data = b"".join(len(text).to_bytes(2, "little") + text.encode() for text in TEXTS)
    for name, packed in (("a.rec", data), ("b.rec.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(packed)
        assert (
            prepared(tmp_path, tmp_path / name, "--plugins", plugins(tmp_path, rec=source), out=name + "out") == TEXTS
        )
    (tmp_path / "b.rec.gz").write_bytes(gzip.compress(data)[:-9])
    given = [tmp_path / "b.rec.gz", "--plugins", tmp_path / "plugins"]
    refused(tmp_path, "b.rec.gz", "its compressed content is damaged", given=given)


def test_the_longest_suffix_decides_and_a_plugins_goes_first(tmp_path):
    declared = {"pipe": ".pipe", "deep": ".a.pipe", "lines": ".jsonl", "note": ".note.txt"}
    folder = plugins(tmp_path, **{kind: f"SUFFIXES = ({end!r},)\ndocuments = id\n" for kind, end in declared.items()})
    formats = Formats(Plugins(folder))

    def kind(name):
        found = formats.serving(tmp_path / name)
        return found.plugin.stem if found.plugin else found.module.__name__.rpartition(".")[2] + " of ours"

    assert {name: kind(name) for name in (
        "x.pipe", "x.a.pipe", "x.b.pipe", "xa.pipe", "x.a.pipe.zst", "x.pipe.gz.gz", ".pipe", "pipe", "x.PIPE",
        "x.jsonl", "x.ndjson.bz2", "x.txt", "x.note.txt", "x", "x.gz",
    )} == {
        "x.pipe": "pipe", "x.a.pipe": "deep", "x.b.pipe": "pipe", "xa.pipe": "pipe", "x.a.pipe.zst": "deep",
        "x.pipe.gz.gz": "text of ours", ".pipe": "text of ours", "pipe": "text of ours", "x.PIPE": "text of ours",
        "x.jsonl": "lines", "x.ndjson.bz2": "jsonl of ours", "x.txt": "text of ours", "x.note.txt": "note",
        "x": "text of ours", "x.gz": "text of ours",
    }  # fmt: skip


def test_the_current_folder_is_never_searched(tmp_path, piped):
    folder = plugins(tmp_path, pipe="raise RuntimeError('was run')\n")
    (folder / "pipe.py").write_text("raise RuntimeError('was run')\n")
    (folder / "plugins").symlink_to(".")
    words = ["prepare", str(piped), "--out", str(tmp_path / "out"), "--tokenizer", "bytes", "--heldout", "0"]
    for more, code, say in (([], 0, ""), (["--plugins="], 2, "--plugins '' names no folder")):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "mlm_mpi", *words, *more],
            capture_output=True, text=True, timeout=60, cwd=folder, check=False,
        )  # fmt: skip
        assert done.returncode == code and say in done.stderr and "was run" not in done.stderr, done.stderr
    assert documents(tmp_path / "out", "train") == [CONTENT]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def documents(:\n", ("SyntaxError",)),
        ("import no_such_module\n", ("ModuleNotFoundError",)),
        ("raise SystemExit\n", ("SystemExit",)),
        ("documents = id\n", ("needs SUFFIXES", "it has None", "mlm_mpi/data/formats/__init__.py")),
        ("SUFFIXES = '.pipe'\ndocuments = id\n", ("needs SUFFIXES, a tuple", "'.pipe'")),
        ("SUFFIXES = ()\ndocuments = id\n", ("needs SUFFIXES",)),
        ("SUFFIXES = ('.pipe', 5)\ndocuments = id\n", ("needs SUFFIXES",)),
        ("SUFFIXES = ('',)\ndocuments = id\n", ("SUFFIXES has ''", "from a dot on")),
        ("SUFFIXES = ('pipe',)\ndocuments = id\n", ("SUFFIXES has 'pipe'", "from a dot on")),
        ("SUFFIXES = ('.pipe.gz',)\ndocuments = id\n", ("'.pipe.gz'", "leave out what compression adds")),
        ("SUFFIXES = ('.pipe',)\n", ("needs a function documents(content)",)),
        ("SUFFIXES = ('.pipe',)\ndocuments = 5\n", ("needs a function documents(content)",)),
    ],
)  # fmt: skip
def test_a_file_that_is_no_format_is_one_line(tmp_path, piped, source, words):
    folder = plugins(tmp_path, pipe=source)
    given = [piped, "--plugins", folder]
    refused(tmp_path, folder / "formats" / "pipe.py", *words, error=ConfigError, given=given)


def test_two_files_that_take_the_same_suffix_are_one_line(tmp_path, piped):
    folder = plugins(tmp_path, pipe=PIPE, other=PIPE)
    given = [piped, "--plugins", folder]
    refused(tmp_path, "other.py", "pipe.py", "both take '.pipe'", error=ConfigError, given=given)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("    yield 'a'\n    yield content.nothing\n", (".py:6", "AttributeError", "nothing")),
        ("    int(content.head())\n    yield ''\n", (".py:5", "ValueError")),
        ("    return 5\n", ("TypeError", "not iterable")),
        ("    pass\n", ("TypeError", "'NoneType' object is not iterable")),
        ("    yield b'text'\n", ("TypeError", "document 0 is no str but bytes")),
        ("    yield 'a'\n    yield 5\n", ("document 1 is no str but int",)),
        ("    yield lambda: 1 / 0\n", (".py:5", "ZeroDivisionError")),
        ("    yield 'a'\n    raise SystemExit(0)\n", (".py:6", "SystemExit")),
        ("    raise ValueError('two\\nlines')\n", (".py:5", "two\\nlines")),
        ("    yield from documents(content)\n", ("RecursionError",)),
        ("    open('/nowhere/x')\n    yield ''\n", (".py:5", "FileNotFoundError", "/nowhere/x")),
    ],
)  # fmt: skip
def test_what_goes_wrong_in_a_plugin_is_one_line(tmp_path, piped, capsys, body, words):
    """It names the plug-in and the file that was read; an earlier corpus stays as it was."""
    folder = plugins(tmp_path, pipe="\nSUFFIXES = ('.pipe',)\n\ndef documents(content):\n" + body)
    given = [piped, "--plugins", folder]
    refused(tmp_path, folder / "formats" / "pipe.py", f"failed to read {piped}", *words, "mend it", given=given)
    prepared(tmp_path, piped)
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match="mend it"):
        prepared(tmp_path, *given)
    assert contents(tmp_path / "out") == before


def test_a_bug_of_ours_shows_its_traceback(tmp_path, piped, monkeypatch):
    monkeypatch.setattr("mlm_mpi.data.formats.text.documents", lambda content: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        prepared(tmp_path, piped)
    assert not (tmp_path / "out").exists()


def test_on_the_command_line_it_is_one_line_and_exit_code_2(tmp_path, piped):
    os.mkfifo(plugins(tmp_path, pipe=PIPE) / "formats" / "mine.py")
    for folder, say in (
        (tmp_path / "plugins", "it is a FIFO"),
        (tmp_path / "nowhere", "is no folder"),
        (plugins(tmp_path, "broken", pipe="SUFFIXES = 1 / 0\n"), "ZeroDivisionError"),
    ):
        done = in_a_process(piped, "--out", tmp_path / "out", "--plugins", folder)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and say in done.stderr, done.stderr
        assert not (tmp_path / "out").exists()
