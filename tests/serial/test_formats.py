"""What a file holds is told by its content: compression and encodings are read, everything else is refused by name."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import random
import socket
import sqlite3
import subprocess
import sys
import tarfile
import zipfile

import h5py
import numpy as np
import pytest
import zstandard
from corpora import contents, run_prepare, sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_mpi.data import decoding as formats
from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.stream import TokenStream
from mlm_mpi.data.text import clean
from mlm_mpi.errors import ConfigError, DataError


def prepared(tmp_path, name, content, *words):
    """The text that `prepare` makes of one file."""
    (tmp_path / name).write_bytes(content)
    run_prepare(tmp_path / name, "--out", tmp_path / "out", "--tokenizer", "bytes", "--heldout", 0, *words)
    catalog = Catalog.open(tmp_path / "out")
    stream = TokenStream(catalog, "train")
    return catalog.tokenizer().decode(stream.read(0, stream.tokens).tolist())


def refused(tmp_path, name, content, *words, options=(), error=DataError):
    with pytest.raises(error) as caught:
        prepared(tmp_path, name, content, *options)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in (name, *words)), text
    assert not (tmp_path / "out").exists()


def written(write):
    memory = io.BytesIO()
    write(memory)
    return memory.getvalue()


def a_zip(memory):
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("word/document.xml", sentences(1, 50))


def a_tar(memory):
    with tarfile.open(fileobj=memory, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))


def an_hdf5(memory):
    with h5py.File(memory, "w") as file:
        file["text"] = np.arange(9)


def a_database():
    database = sqlite3.connect(":memory:")
    database.execute("create table t (a)")
    return database.serialize()


TEXT = sentences(5, 200)
PACKED = {
    "gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"%PDF-1.7\n%text\n", ("a PDF", "convert it to text")),
        (written(a_zip), ("zip", "docx", "unpack")),
        (written(a_tar), ("a tar archive", "unpack")),
        (gzip.compress(written(a_tar)), ("a tar archive", "unpack")),
        (gzip.compress(gzip.compress(TEXT.encode())), ("twice", "unpack")),
        (b"7z\xbc\xaf\x27\x1c\x00\x04", ("a 7z archive",)),
        (b"Rar!\x1a\x07\x01\x00", ("a rar archive",)),
        (b"\x89PNG\r\n\x1a\n", ("an image", "leave it out")),
        (b"\xff\xd8\xff\xe0JFIF", ("an image",)),
        (b"GIF89a\x01", ("an image",)),
        (b"\x7fELF\x02\x01\x01", ("a program",)),
        (a_database(), ("an SQLite database",)),
        (written(an_hdf5), ("an HDF5 file",)),
        (written(lambda memory: np.save(memory, np.arange(9))), ("a NumPy array",)),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", ("an Office document",)),
        (rb"{\rtf1\ansi text}", ("an RTF document",)),
        (pickle.dumps({"text": TEXT}), ("a Python pickle",)),
        (b"PAR1\x15\x04\x15text", ("a Parquet file", "convert it to JSON lines")),
        (b"ARROW1\x00\x00", ("an Arrow or Feather file", "convert it to JSON lines")),
        (b"\xff\xff\xff\xff\x80\x00\x00\x00\x10", ("an Arrow", "convert it to JSON lines")),
        (b"FEA1\x00\x00\x00\x00", ("Feather", "convert it to JSON lines")),
        (b"\x28\xb5\x2f\xfd" + b"\x7f" * 9, ("damaged",)),
        (b'[{"text": "a"},\n {"text": "b"}]\n', ("one JSON document", "convert it to JSON lines")),
        (b'["a", "b"]', ("one JSON document",)),
        (b'{\n "text": "a"\n}\n', ("one JSON document",)),
        (b'{"text": "a"}\n{"text": "b"}\n', ("JSON lines", "rename it", ".jsonl")),
        (TEXT.encode() + b"\na\0b", ("has a NUL byte as character 2", "which no text has: remove it (tr -d '\\0')")),
        ("Grüße 漢字漢字漢字\n".encode("utf-16-le"), ("NUL bytes", "--encoding utf-16-le")),
        (b"\0" * 5000, ("NUL bytes",)),
        (TEXT.encode("utf-16-le"), ("NUL bytes", "--encoding utf-16-le")),
        ("Grüße für Bären und Öfen. ".encode("latin-1") * 9, ("--encoding", "cp1252", "of 234 characters")),
        (random.Random(1).randbytes(999).replace(b"\0", b"a"), ("--encoding",)),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_what_is_no_text_is_refused_by_name(tmp_path, content, words):
    refused(tmp_path, "file.txt", content, *words)


@pytest.mark.parametrize(
    "text",
    ["PAR1 is a magic word", "ORC and elf\n", "[1] A note\n", '{"quoted"} text', "BZh is the mark", "MZ.", "Rar!"],
)
def test_text_that_begins_like_something_else_is_text(tmp_path, capsys, text):
    assert prepared(tmp_path, "x.txt", text.encode()) == text


def test_json_under_the_name_of_json_says_what_to_do(tmp_path):
    refused(tmp_path, "x.json", b'{"text": "a"}\n{"text": "b"}\n', "rename it to end in .jsonl")
    refused(tmp_path, "x.json", b'{"text": "a",\n "more": 1}\n', "one JSON document", "one {")
    refused(tmp_path, "x.json.gz", gzip.compress(b"[1, 2, 3]\n"), "one JSON document")
    refused(tmp_path, "x.jsonl", b'[{"text": "a"}]\n', "one JSON document")
    refused(tmp_path, "x.jsonl", b'{\n"text": "a"\n}\n', "one JSON document")


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("name", ["x.txt", "x.txt.{}", "x.jsonl.{}", "x.ndjson.{}", "x.jsonl"])
def test_compressed_files_are_told_by_their_content(tmp_path, capsys, kind, name):
    pack, name = PACKED[kind], name.format(kind)
    half = len(TEXT) // 2
    if "json" in name:
        content = pack(json.dumps({"text": TEXT}).encode())
    else:
        content = pack(TEXT[:half].encode()) + pack(b"") + pack(TEXT[half:].encode())  # several members, or frames
    assert prepared(tmp_path, name, content) == TEXT
    for damaged in (content[:-5], content[: len(content) // 2], content[:200] + b"\x55" * 20 + content[220:]):
        with pytest.raises(DataError) as caught:
            prepared(tmp_path, name, damaged)
        assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_a_mark_decides_the_encoding(tmp_path, capsys, encoding):
    text = "Grüße, 世界, \U0001f600\n" * 50
    mark = "\ufeff" if encoding.endswith("-be") else ""
    content = (mark + text).encode(encoding)
    assert prepared(tmp_path, "x.txt", content, "--encoding", "latin-1") == text
    lines = (mark + "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n")).encode(encoding)
    assert prepared(tmp_path, "x.jsonl", lines) == text
    assert prepared(tmp_path, "x.jsonl.zst", PACKED["zst"](lines)) == text


def test_an_encoding_is_given_by_name(tmp_path, capsys):
    for encoding in ("cp1252", "utf-16-le", "shift_jis", "koi8-r"):
        text = {"shift_jis": "こんにちは。", "koi8-r": "Привет. "}.get(encoding, "Grüße für Bären. ") * 30
        assert prepared(tmp_path, "x.txt", text.encode(encoding), "--encoding", encoding) == text
        line = json.dumps({"text": text}, ensure_ascii=False).encode(encoding)
        assert prepared(tmp_path, "x.jsonl", line, "--encoding", encoding) == text
    few = ("こ" * 300).encode("shift_jis") + b"\xa0\xff"
    assert prepared(tmp_path, "x.txt", few, "--encoding", "shift_jis") == "こ" * 300 + "\ufffd\ufffd"
    assert "repaired    2 invalid UTF-8" in capsys.readouterr().out
    (tmp_path / "out").rename(tmp_path / "other")
    refused(tmp_path, "x.txt", ("こ" * 150).encode("shift_jis") + b"\xa0\xff", options=("--encoding", "shift_jis"))


@pytest.mark.parametrize(
    "name", ["", "nonsense", "hex", "rot13", "base64", "zlib", "idna", "undefined", "utf-16", "utf-32", "../utf_8", "é"]
)
def test_other_codecs_are_no_encodings(tmp_path, name):
    with pytest.raises(ConfigError, match="--encoding .* is no text encoding"):
        prepared(tmp_path, "x.txt", b"text", "--encoding", name)


def test_one_character_in_a_hundred_may_be_repaired(tmp_path, capsys):
    assert prepared(tmp_path, "x.txt", b"a" * 99 + b"\xff") == "a" * 99 + "\ufffd"
    (tmp_path / "out").rename(tmp_path / "other")
    refused(tmp_path, "x.txt", b"a" * 98 + b"\xff", "1 of 99 characters")
    lines = [json.dumps({"text": "a" * 33}).encode().replace(b"aaa", b"\xff", 1 if n == 2 else 0) for n in range(3)]
    refused(tmp_path, "x.jsonl", b"\n".join(lines), "1 of 97 characters")
    assert "\ufffd" in prepared(tmp_path, "x.jsonl", b"\n".join([lines[0] + b"\n" + lines[1], *lines]))


def special(tmp_path, kind):
    path = tmp_path / "special"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.symlink_to(kind)
    return path


@pytest.mark.parametrize("kind", ["fifo", "socket", "/dev/zero", "/dev/null"])
@pytest.mark.parametrize("suffix", ["", ".jsonl"])
def test_only_regular_files_are_read(tmp_path, kind, suffix):
    path = special(tmp_path, kind)
    named = path.rename(path.with_suffix(suffix)) if suffix else path
    with pytest.raises(DataError, match=r"special.*not a regular file\): write it to a file first"):
        run_prepare(named, "--out", tmp_path / "out")
    (tmp_path / "blank.txt").write_text(" ")
    with pytest.raises(DataError, match="corpus is empty"):  # in a folder it is nobody's input
        run_prepare(tmp_path, "--out", tmp_path / "out")


def test_standard_input_and_process_substitution_are_refused(tmp_path):
    command = f"{sys.executable} -m mlm_mpi prepare <(echo text) /dev/stdin --out {tmp_path}/out < <(echo text)"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "write it to a file first" in done.stderr


def test_loops_of_links_end(tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / "deep" / ".hidden").mkdir(parents=True)
    for name in ("a", "b", "c", "deep/d", "deep/e"):
        (folder / name).symlink_to(folder, target_is_directory=True)
    (folder / "loop").symlink_to("loop")
    for path in ("one.txt", "deep/two.txt", "deep/.hidden/three.txt", "deep/more[1].txt"):
        (folder / path).write_text(sentences(len(path), 50))
    for words in (folder, folder / "**", folder / "**" / "*.txt", folder / "**" / "d*" / "*.txt"):
        run_prepare(words, "--out", tmp_path / "out", "--tokenizer", "bytes", "--heldout", 0)
        assert "documents   3 read" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_folder_that_may_not_be_searched_is_one_line(tmp_path):
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    (tmp_path / "in" / "closed").mkdir(parents=True)
    (tmp_path / "in" / "closed").chmod(0o000)
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    os.seteuid(65534)
    try:
        for path in ("in", "in/closed", "in/closed/x.txt", "in/**/*.txt", "in/" + "x" * 300):
            with pytest.raises(DataError) as caught:
                run_prepare(tmp_path / path, "--out", tmp_path / "out")
            assert "\n" not in str(caught.value)
    finally:
        os.seteuid(0)
    assert contents(tmp_path / "out") == {}


BOMB = """
import sys
from pathlib import Path
from mlm_mpi.data import decoding as formats
from mlm_mpi.errors import DataError

def peak_mib():
    # (ru_maxrss would be that of the process which started this one)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024

formats.LARGEST_TEXT_BYTES = formats.LONGEST_LINE = 1 << 23
before = peak_mib()
for path in map(Path, sys.argv[1:]):
    try:
        [*formats.read_lines(path, "utf-8")] if path.suffix == ".jsonl" else formats.read_text(path, "utf-8")
    except DataError as error:
        print(error)
print(peak_mib() - before)
"""


@pytest.mark.parametrize("kind", PACKED)
def test_a_bomb_fills_no_memory(tmp_path, kind):
    bomb = PACKED[kind](b"a" * (40 << 20))
    paths = [tmp_path / "x.txt", tmp_path / "x.jsonl"]
    for path in paths:
        path.write_bytes(bomb)
    done = subprocess.run([sys.executable, "-c", BOMB, *paths], capture_output=True, text=True, check=True)
    text, line, mib = done.stdout.splitlines()
    assert f"{paths[0]} has more than 8 MiB" in text and f"{paths[1]}:1 has 8,388,608 characters" in line
    assert int(mib) < 70  # zstd hands out up to 32 MiB at once


BEGINNINGS = [
    b"",
    b"\xff\xfe",
    b"\xfe\xff",
    b"\x00\x00\xfe\xff",
    b"\x1f\x8b\x08",
    b"\xfd7zXZ\x00",
    b"BZh91AY&SY",
    b'{"a',
]
ENCODINGS = [
    "utf-8",
    "cp1252",
    "utf-16",
    "utf-16-le",
    "utf-7",
    "shift_jis",
    "hz",
    "iso2022_jp",
    "gb18030",
    "unicode_escape",
]


@pytest.mark.parametrize("count", [150, pytest.param(20_000, marks=pytest.mark.slow)])
def test_any_bytes_are_text_or_one_line(tmp_path_factory, count):
    path = tmp_path_factory.mktemp("fuzz") / "x"

    @settings(max_examples=count, deadline=None)
    @given(
        st.sampled_from([*PACKED.values(), bytes]),
        st.sampled_from(BEGINNINGS),
        st.binary(max_size=80),
        st.lists(st.tuples(st.integers(0, 99), st.integers(1, 255)), max_size=2),
        st.integers(0, 9),
        st.sampled_from(ENCODINGS),
    )
    def read(pack, beginning, middle, flips, cut, encoding):
        content = bytearray(pack(beginning + middle))
        for place, change in flips:
            if place < len(content):
                content[place] ^= change
        path.write_bytes(content[: max(0, len(content) - max(0, cut - 6))])
        for read in (formats.read_text, lambda path, encoding: "".join(formats.read_lines(path, encoding))):
            try:
                clean(read(path, encoding)).text.encode()
            except DataError as error:
                assert "\n" not in str(error) and str(path) in str(error)

    read()
