"""The folder of a corpus: nobody else's file is touched, one prepare at a time, and a kill loses nothing."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpora import contents, run_prepare, sentences, write_texts

from mlm_mpi.data.catalog import Catalog
from mlm_mpi.errors import ConfigError, DataError
from mlm_mpi.files import Lock

SMALL = ("--tokenizer", "bytes", "--shard-mib", 0.002)


@pytest.fixture
def source(tmp_path):
    return write_texts(tmp_path / "in", 12, 60)


def refused(action, *words, error=DataError):
    with pytest.raises(error) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize(
    "name",
    [
        "train-00000-of-00002.h5", "heldout-letters.h5.txt", "train-00000-0123abcd.h5", "tokenizer.json",
        "catalog.json", "prepared.json", "prepare.lock", ".staging/notes", ".staging/catalog.json", ".spool/x",
        "notes.txt", "folder/",
    ],
)  # fmt: skip
@pytest.mark.parametrize("has_corpus", [False, True])
def test_a_folder_with_other_files_is_refused_and_stays_as_it_was(source, tmp_path, capsys, name, has_corpus):
    out = tmp_path / "out"
    if has_corpus:
        run_prepare(source, "--out", out, *SMALL)
        if name in ("catalog.json", "prepared.json"):
            (out / name).unlink()
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("/"):
        path.mkdir()
    else:
        path.write_text('{"somebody": "else\'s"}')
    before = contents(out), sorted(map(str, out.rglob("*")))
    foreign = name.rstrip("/").split("/")[0] if name.startswith(".spool") else name.rstrip("/")
    refused(lambda: run_prepare(source, "--out", out, *SMALL), str(out), foreign, "move it away", "another --out")
    assert (contents(out), sorted(map(str, out.rglob("*")))) == before


@pytest.mark.parametrize("damage", ["grown", "changed", "linked", "gone"])
def test_a_file_of_the_corpus_that_has_changed_counts_as_foreign(source, tmp_path, capsys, damage):
    out = tmp_path / "out"
    run_prepare(source, "--out", out, *SMALL)
    shard = out / Catalog.open(out).manifest.shards[0].file
    content = shard.read_bytes()
    shard.unlink()
    if damage == "grown":
        shard.write_bytes(content + b"!")
    elif damage == "changed":
        shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "linked":
        (tmp_path / "elsewhere").write_bytes(content)
        shard.symlink_to(tmp_path / "elsewhere")
    if damage == "gone":
        run_prepare(source, "--out", out, *SMALL)
        assert shard.read_bytes() == content
    else:
        before = contents(out)
        refused(lambda: run_prepare(source, "--out", out, *SMALL), shard.name, "has changed")
        assert contents(out) == before and (damage != "linked" or shard.is_symlink())


def test_a_catalog_cannot_name_what_is_not_of_a_corpus(source, tmp_path, capsys):
    out = tmp_path / "out"
    run_prepare(source, "--out", out, *SMALL)
    table = json.loads((out / "catalog.json").read_text())
    shard = table["shards"][0]
    for name in ("../precious", "precious", "/precious"):
        (tmp_path / "precious").write_bytes((out / shard["file"]).read_bytes())
        (out / "catalog.json").write_text(json.dumps(table | {"shards": [shard | {"file": name}]}))
        refused(lambda: run_prepare(source, "--out", out, *SMALL), "move it away")
        assert (tmp_path / "precious").exists()


def test_links_are_not_followed_out_of_the_folder(source, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "text-0.bin").write_text("kept")
    (tmp_path / "out").mkdir()
    for name in (".staging", "prepare.lock", "catalog.json"):
        target = elsewhere if name == ".staging" else elsewhere / "text-0.bin"
        (tmp_path / "out" / name).symlink_to(target)
        refused(lambda: run_prepare(source, "--out", tmp_path / "out", *SMALL), name)
        (tmp_path / "out" / name).unlink()
    assert contents(elsewhere) == {"text-0.bin": b"kept"}


def test_an_earlier_corpus_is_replaced_and_the_report_says_so(source, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    run_prepare(source, "--out", out, *SMALL)
    assert "replaced" not in capsys.readouterr().out
    first = contents(out)
    (source / "more.txt").write_text(sentences(99, 200))
    run_prepare(source, "--out", out, "--vocab", 300)
    assert f"replaced    the corpus that was in {out}\n" in capsys.readouterr().out
    manifest = Catalog.open(out).manifest
    assert set(contents(out)) == {
        "catalog.json", "prepared.json", manifest.tokenizer.file, *(shard.file for shard in manifest.shards)
    }  # fmt: skip
    assert not set(contents(out)) & set(first) - {"catalog.json", "prepared.json"}


def test_a_corpus_of_the_first_format_is_replaced(source, tmp_path, capsys):
    out = tmp_path / "out"
    run_prepare(source, "--out", out, *SMALL)
    table = json.loads((out / "catalog.json").read_text())
    (out / table["tokenizer"]["file"]).rename(out / "tokenizer.json")
    table["tokenizer"]["file"] = "tokenizer.json"
    del table["content"]
    (out / "catalog.json").write_text(json.dumps(table | {"format": 1}))
    (out / "prepared.json").unlink()
    run_prepare(source, "--out", out, *SMALL)
    assert not (out / "tokenizer.json").exists() and Catalog.open(out).tokenizer()


def test_two_at_once_are_refused_naming_the_holder(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    held = Lock(out / "prepare.lock")
    refused(
        lambda: run_prepare(source, "--out", out, *SMALL),
        "another prepare",
        f"pid {os.getpid()} on ",
        "wait for its end",
    )
    assert set(contents(out)) == {"prepare.lock"}
    held.release()
    run_prepare(source, "--out", out, *SMALL)
    assert "prepare.lock" not in contents(out)


def test_what_is_refused_or_fails_leaves_no_folder(source, tmp_path):
    (tmp_path / "blank.txt").write_text(" ")
    for words in ((tmp_path / "blank.txt",), (source, "--heldout", "nan"), (tmp_path / "nowhere",)):
        with pytest.raises((DataError, ConfigError)):
            run_prepare(*words, "--out", tmp_path / "a" / "b" / "out")
        assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    refused(lambda: run_prepare(tmp_path / "blank.txt", "--out", tmp_path / "empty"), "corpus is empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_folder_that_cannot_be_one_is_one_line(source, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "file/out", "loop", "loop/out", "dangling", "x" * 300, "/proc/out", "/dev/null"):
        refused(lambda name=name: run_prepare(source, "--out", tmp_path / name, *SMALL), "another --out")
    refused(lambda: run_prepare(source, "--out", "", *SMALL), "--out ''", error=ConfigError)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize(("mode", "below"), [(0o555, ""), (0o600, ""), (0o600, "out"), (0o000, "out")])
def test_a_folder_without_permission_is_one_line(source, tmp_path, mode, below):
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(mode)
    os.seteuid(65534)
    try:
        refused(lambda: run_prepare(source, "--out", folder / below), "Permission denied", "another --out")
    finally:
        os.seteuid(0)
    assert list(folder.iterdir()) == []


KILLED = """
import itertools, os, signal, sys
from pathlib import Path
from corpora import run_prepare
from mlm_mpi import files

def kill_at(number):
    count = itertools.count(1)
    def counted(function):
        def wrapper(*args, **more):
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **more)
        return wrapper
    for name in ("mkdir", "replace", "unlink", "rmdir"):
        setattr(Path, name, counted(getattr(Path, name)))
    files._write_synced = counted(files._write_synced)

for line in sys.stdin:  # a fork for each order: what is imported stays imported
    number, *words = line.split()
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr
        kill_at(int(number))
        try:
            run_prepare(*words)
        except BaseException as error:
            print("failed:", error)
            os._exit(1)
        os._exit(0)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.fixture
def orders():
    """Runs prepare in a process and kills it before its n-th change of the file system; returns the wait status."""
    server = subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=Path(__file__).parent, env=os.environ | {"PYTHONPATH": "."},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def order(number, *words):
        server.stdin.write(" ".join(map(str, (number, *words))) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    yield order
    server.communicate()


def corpus(folder):
    """What a corpus consists of, once every file of it is checked."""
    catalog = Catalog.open(folder)
    catalog.tokenizer()
    catalog.check_files()
    names = {catalog.manifest.tokenizer.file, *(shard.file for shard in catalog.manifest.shards), "catalog.json"}
    return {name: content for name, content in contents(folder).items() if name in names}


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_the_old_corpus_or_the_new_one(tmp_path, orders, step):
    (tmp_path / "in").mkdir()
    words = (write_texts(tmp_path / "in" / "texts", 6, 60), "--tokenizer", "bytes", "--heldout", 0.2, "--shard-mib")
    assert orders(0, *words, 0.001, "--out", tmp_path / "old") == 0
    assert orders(0, *words, 0.0005, "--out", tmp_path / "new") == 0
    old, new, out = corpus(tmp_path / "old"), corpus(tmp_path / "new"), tmp_path / "out"
    seen = []
    for number in itertools.count(1, step):
        shutil.copytree(tmp_path / "old", out)
        status = orders(number, *words, 0.0005, "--out", out)
        found = corpus(out)
        assert found in (old, new)
        seen.append(found == new)
        if status == 0:
            break
        assert os.WTERMSIG(status) == 9
        assert orders(0, *words, 0.0005, "--out", out) == 0
        assert corpus(out) == new and set(contents(out)) == {*new, "prepared.json"}
        shutil.rmtree(out)
    assert seen == sorted(seen) and seen.count(False) >= 24 / step and seen.count(True) > 1


def test_a_rename_that_fails_leaves_the_earlier_corpus(source, tmp_path, monkeypatch, capsys):
    out, rename = tmp_path / "out", Path.replace
    run_prepare(source, "--out", out, *SMALL)
    before = contents(out)
    for number in itertools.count(2, 5):
        count = itertools.count(1)

        def limited(path, target, count=count, number=number):
            if next(count) >= number:  # and so does every later one
                raise OSError(28, "No space left on device")
            return rename(path, target)

        monkeypatch.setattr(Path, "replace", limited)
        try:
            run_prepare(source, "--out", out, *SMALL, "--heldout", 0.3)
        except DataError as error:
            assert "No space left on device" in str(error) and "\n" not in str(error)
            if contents(out) != before:  # the catalog was renamed already
                break
        else:
            break
    assert number > 9 and corpus(out)["catalog.json"] != before["catalog.json"]


def test_a_kill_at_the_first_preparation_leaves_nothing_that_stays(tmp_path, orders):
    words = (write_texts(tmp_path / "in", 6, 60), "--tokenizer", "bytes", "--out", tmp_path / "out")
    for number in itertools.count(1, 3):
        if orders(number, *words) == 0:
            break
    assert number > 9
    assert set(contents(tmp_path / "out")) == {*corpus(tmp_path / "out"), "prepared.json"}


def test_a_real_kill_while_cleaning(tmp_path):
    lines = "".join(json.dumps({"text": sentences(n, 30)}) + "\n" for n in range(6000))
    (tmp_path / "x.jsonl").write_text(lines)
    words = ("prepare", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "out"), "--tokenizer", "bytes")
    running = subprocess.Popen([sys.executable, "-m", "mlm_mpi", *words], stdout=subprocess.DEVNULL)
    while not (tmp_path / "out" / ".staging" / "text-0.bin").exists():
        assert running.poll() is None
        time.sleep(0.01)
    refused(lambda: run_prepare(*words[1:]), f"pid {running.pid} on ")
    running.kill()
    running.wait()
    run_prepare(write_texts(tmp_path / "in", 12, 60), "--out", tmp_path / "out", *SMALL)
    assert set(contents(tmp_path / "out")) == {*corpus(tmp_path / "out"), "prepared.json"}
