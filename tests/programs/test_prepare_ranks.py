"""`prepare` under mpiexec: the same bytes and the same errors on any number of ranks."""

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from terminal import Terminal

from mlm_mpi.files import Lock

MPIEXEC = Path(sys.executable).parent / "mpiexec"
ENVIRONMENT = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def in_a_process(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlm_mpi", "prepare", *map(str, words)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def on_ranks(ranks: int, *words: object) -> subprocess.CompletedProcess[str]:
    launcher = [
        str(MPIEXEC if MPIEXEC.exists() else "mpiexec"),
        "--oversubscribe",
        *("--bind-to", "none", "--mca", "btl", "self,sm", "-n", str(ranks)),
    ]
    return subprocess.run(
        [*launcher, sys.executable, "-m", "mlm_mpi", "prepare", *map(str, words)],
        capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False,
    )  # fmt: skip


def text(draw: random.Random, words: int) -> str:
    return " ".join("".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(words)) + "\n"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Text files, a file twice, near-identical ones, invalid UTF-8, JSON lines plain and compressed."""
    draw = random.Random(5)
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(25):
        body = text(draw, 100)
        (folder / f"{number:02d}.txt").write_text(body)
        if number % 5 == 0:
            (folder / f"x{number}.md").write_text(body)
            (folder / f"y{number}.md").write_text(body + "with an end\n")
    (folder / "bad.txt").write_bytes(b"\xff\x07" + text(draw, 30).encode())
    lines = "".join(json.dumps({"text": text(draw, 40)}) + "\n" for _ in range(33)).encode()
    (folder / "lines.jsonl").write_bytes(lines)
    (folder / "more.jsonl.gz").write_bytes(gzip.compress(lines[: len(lines) // 2].rsplit(b"\n", 1)[0]))
    return folder


def test_any_number_of_ranks_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    draw = random.Random(6)
    for number in range(3):  # long texts, which different ranks cut
        (source / f"long{number}.txt").write_text("\n\n".join(text(draw, 50) for _ in range(40)))
    with open(source / "lines.jsonl", "a") as file:
        file.write('{"text": null}\n{}\n' * 3)
    made = {}
    for ranks in (1, 3, 4):
        out = tmp_path / f"out{ranks}"
        words = ("--vocab", 320, "--shard-mib", 0.004, "--heldout", 0.2, "--cut", "always")
        done = on_ranks(ranks, source, "--out", out, *words)
        assert done.returncode == 0 and done.stdout.count("at blank lines, the last ") == 3, done.stderr
        assert done.stdout.count("is ready") == 1 and "1 invalid UTF-8" in done.stdout
        assert f"skipped     6 lines without text in field 'text', first: {source}/lines.jsonl:34\n" in done.stdout
        made[ranks] = contents(out)
        assert f"{out} ".encode() in made[ranks].pop("prepared.json")
    assert len(made[1]) > 6
    assert made[1] == made[3] == made[4]


@pytest.fixture
def labelled(tmp_path: Path) -> list[Path]:
    """A table of pairs with labels, plain and compressed."""
    draw = random.Random(7)
    lines = [f"{number % 3}\t{text(draw, 9).strip()}\t{text(draw, 5).strip()}\n" for number in range(300)]
    (tmp_path / "a.tsv").write_text("label\ttext\tpair\n" + "".join(lines))
    rows = [json.dumps({"text": text(draw, 8), "pair": None, "label": number % 2}) + "\n" for number in range(99)]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(rows).encode()))
    return [tmp_path / "a.tsv", tmp_path / "b.jsonl.gz"]


def test_one_rank_and_three_give_the_same_labelled_texts(labelled: list[Path], tmp_path: Path) -> None:
    made, said = [], set()
    words = (*labelled, "--label", "label", "--pair", "pair", "--vocab", 320, "--shard-mib", 0.01)
    for prepare in (in_a_process, partial(on_ranks, 3)):
        done = prepare(*words, "--out", tmp_path / "out")
        assert done.returncode == 0 and "399 read, 399 kept" in done.stdout, done.stderr
        made.append(contents(tmp_path / "out"))
        said.add(done.stdout.splitlines()[-1].rpartition("content ")[2])
    assert made[0] == made[1] and len(made[0]) > 5 and len(said) == 1


@pytest.mark.slow  # the mechanism of the tests of other input once more
def test_labelled_texts_that_are_wrong_end_all_ranks_with_one_line(labelled: list[Path], tmp_path: Path) -> None:
    with open(labelled[0], "a") as file:
        file.write("1\tno pair\n")
    done = on_ranks(3, *labelled, "--out", tmp_path / "out", "--label", "label")
    said = [line for line in done.stderr.splitlines() if line.startswith("mlm-mpi:")]
    assert done.returncode == 2 and len(said) == 1, done.stderr
    assert f"{labelled[0]}:302 has 2 fields, the first row has 3" in said[0]
    assert not (tmp_path / "out").exists()


def test_progress_is_drawn_in_a_terminal(source: Path, tmp_path: Path) -> None:
    words = ["run", "-n", "2", "--", "prepare", str(source), "--out", "out", "--vocab", "400", "--tokenizer", "bytes"]
    terminal = Terminal([sys.executable, "-P", "-m", "mlm_mpi", *words], tmp_path)
    assert terminal.end(60) == 0
    assert b"cleaning" in terminal.raw and b" KiB" in terminal.raw and b"shards" in terminal.raw
    assert terminal.lines[0].startswith("documents ") and terminal.lines[-1].startswith("out is ready"), (
        "no bar is left"
    )


def test_an_error_of_one_rank_ends_all_with_one_line(source: Path, tmp_path: Path) -> None:
    (source / "wrong.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b"}\n{"text": \n')
    done = on_ranks(3, source, "--out", tmp_path / "out")
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("mlm-mpi:")]
    assert len(said) == 1 and "wrong.jsonl:3 is not JSON" in said[0]
    assert not (tmp_path / "out").exists()


def test_the_verdict_on_an_encoding_is_of_all_ranks(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 100}) + "\n"
    (tmp_path / "x.jsonl").write_bytes((line * 9).encode() + line.encode().replace(b"xxxxxxxxxxxx", b"\xff" * 12, 1))
    done = on_ranks(3, tmp_path / "x.jsonl", "--out", tmp_path / "out")
    said = [text for text in done.stderr.splitlines() if text.startswith("mlm-mpi:")]
    assert len(said) == 1 and "x.jsonl is not in the encoding it was read with (12 of 1,000 characters)" in said[0]
    assert done.returncode == 2 and not (tmp_path / "out").exists()


def test_a_second_prepare_is_refused_on_all_ranks(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    held = Lock(tmp_path / "out" / "prepare.lock")
    done = on_ranks(2, source, "--out", tmp_path / "out")
    held.release()
    said = [text for text in done.stderr.splitlines() if text.startswith("mlm-mpi:")]
    assert done.returncode == 2 and len(said) == 1 and f"another prepare (pid {os.getpid()} on " in said[0]


def test_an_error_of_all_ranks_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" ")
    done = on_ranks(2, tmp_path / "blank.txt", "--out", tmp_path / "out")
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("mlm-mpi:")]
    assert said == ["mlm-mpi: the corpus is empty: no input holds any text: give other files, or --builtin"]


def test_a_wrong_command_line_is_said_once(tmp_path: Path) -> None:
    done = on_ranks(3, "--builtin", "--out", tmp_path / "out", "--heldout", 2)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("mlm-mpi:")]
    assert said == ["mlm-mpi: --heldout 2.0 must be in [0, 1): 2 % is 0.02"]


PIPE = """
SUFFIXES = (".pipe",)
SHARED = {shared}


def documents(content):
    for text in content.text().split("\\n|||\\n"):
        yield text.__str__
"""


def plugin(folder: Path, content: str) -> Path:
    (folder / "formats").mkdir(parents=True)
    (folder / "formats" / "pipe.py").write_text(content)
    return folder


@pytest.fixture
def piped(tmp_path: Path) -> Path:
    draw = random.Random(6)
    folder = tmp_path / "piped"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.pipe").write_text("\n|||\n".join(text(draw, 40) for _ in range(7)))
    return folder


@pytest.mark.slow  # the mechanism of the test above once more
def test_a_format_of_a_plugin_gives_the_same_bytes_on_any_number_of_ranks(piped: Path, tmp_path: Path) -> None:
    made = []
    for shared in (True, False):
        folder = plugin(tmp_path / f"plugins-{shared}", PIPE.format(shared=shared))
        for ranks in (1, 2, 3) if shared else (1, 2):
            out = tmp_path / f"out-{shared}-{ranks}"
            done = on_ranks(ranks, piped, "--out", out, "--vocab", 300, "--heldout", 0.2, "--plugins", folder)
            assert done.returncode == 0 and "35 read, 35 kept" in done.stdout, done.stderr
            found = contents(out)
            digest = hashlib.sha256((folder / "formats" / "pipe.py").read_bytes()).hexdigest()
            assert json.loads(found.pop("prepared.json"))["plugins"] == {"formats/pipe.py": digest}
            made.append(found)
    assert all(found == made[0] for found in made)


def said_on_two(tmp_path: Path, *words: object) -> str:
    """What two ranks say, each with a plug-in folder of its own: tmp_path/0 and tmp_path/1."""
    program = [sys.executable, "-m", "mlm_mpi", "prepare", *map(str, words)]
    launcher = str(MPIEXEC if MPIEXEC.exists() else "mpiexec")
    first, second = ([*program, "--plugins", str(tmp_path / str(rank))] for rank in range(2))
    done = subprocess.run(
        [launcher, "--oversubscribe", "--bind-to", "none", "-n", "1", *first, ":", "-n", "1", *second],
        capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line.startswith("mlm-mpi:")]
    assert done.returncode == 2 and len(said) == 1, done.stderr
    return said[0]


@pytest.mark.slow  # the mechanism is tested in training too
def test_ranks_with_different_plugins_end_with_one_line(piped: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plugin(tmp_path / "0", PIPE.format(shared=True))
    plugin(tmp_path / "1", PIPE.format(shared=True) + "\n")
    said = said_on_two(tmp_path, piped, "--out", out)
    assert "--plugins differ between ranks: formats/pipe.py is " in said and "on rank 1: give all ranks" in said
    (tmp_path / "1" / "formats" / "pipe.py").unlink()
    assert "and none on rank 1" in said_on_two(tmp_path, piped, "--out", out)
    (tmp_path / "1" / "formats" / "pipe.py").write_text("1 / 0\n")
    assert "rank 1: " in (said := said_on_two(tmp_path, piped, "--out", out)) and "ZeroDivisionError" in said
    assert not out.exists()


@pytest.mark.parametrize("failure", ["1 / 0", "raise SystemExit(0)"])
def test_a_plugin_that_fails_on_one_rank_ends_all_with_one_line(piped: Path, tmp_path: Path, failure: str) -> None:
    body = f"    if content.path.name == '1.pipe':\n        {failure}\n    yield content.text()\n"
    folder = plugin(tmp_path / "plugins", f"SUFFIXES = ('.pipe',)\n\ndef documents(content):\n{body}")
    done = on_ranks(2, piped, "--out", tmp_path / "out", "--plugins", folder)
    said = [line for line in done.stderr.splitlines() if line.startswith("mlm-mpi:")]
    assert done.returncode == 2 and len(said) == 1, done.stderr
    assert f"{folder}/formats/pipe.py:5 failed to read {piped}/1.pipe" in said[0]
    assert not (tmp_path / "out").exists()
