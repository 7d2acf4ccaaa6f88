"""What a reviewer with an attacker's mind found, each as it was shown."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from mlm_mpi import hdf5
from mlm_mpi.data import staging
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.errors import DataError
from mlm_mpi.files import HeldError
from mlm_mpi.monitor.metrics import MetricsLog
from mlm_mpi.output import Output
from mlm_mpi.train import checkpoint


def changed(**parts) -> bytes:
    return json.dumps(json.loads(Tokenizer.bytes().content) | parts).encode()


def replace(content: str) -> dict:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


def test_a_tokenizer_that_makes_a_text_endless_is_refused():
    """94 KB of JSON ended the interpreter: each of three steps writes 30,000 letters for one."""
    steps = {"type": "Sequence", "normalizers": [replace("a" * 30_000)] * 3}
    with pytest.raises(DataError, match=r"may make a text 3e\+13 times as long"):
        Tokenizer(changed(normalizer=steps))
    with pytest.raises(DataError, match="times as long"):
        Tokenizer(changed(normalizer={"type": "Sequence", "normalizers": [replace("aa")] * 24}))
    assert Tokenizer(changed(normalizer=replace("▁"))).vocab_size == 257


def test_a_tokenizer_that_throws_dice_is_refused():
    model = json.loads(Tokenizer.bytes().content)["model"]
    with pytest.raises(DataError, match=r"in another way each time \(dropout\)"):
        Tokenizer(changed(model=model | {"dropout": 0.5}))


def test_chunks_that_overlap_are_refused():
    """600 entries that all lead to one deflated chunk made 1.2 GiB of a file of 17 KB."""
    file = hdf5._File.__new__(hdf5._File)
    file._size = 10_000
    wanted = hdf5.Expected((200,), np.dtype("u2"), hdf5.PACKED)
    apart = np.array([(100, 50, 0), (150, 50, 0)], np.uint64)
    file._check_places(apart, "tokens", 200, wanted)
    for second in (100, 149):
        with pytest.raises(hdf5.FormatError, match="has chunks that overlap in /tokens"):
            file._check_places(np.array([(100, 50, 0), (second, 50, 0)], np.uint64), "tokens", 200, wanted)


def test_a_link_where_a_save_would_write_is_removed_and_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("kept")
    runs = tmp_path / "checkpoints"
    runs.mkdir()
    (runs / ".writing-step-00000001").symlink_to(tmp_path / "elsewhere")
    (runs / ".writing-old-step-00000001").symlink_to("nowhere")
    checkpoint.remove_unfinished(runs)
    assert not list(runs.iterdir())
    assert (tmp_path / "elsewhere" / "precious").read_text() == "kept"


def test_whoever_loses_the_race_for_a_new_folder_leaves_the_winners_lock(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def lost(path):
        path.write_text("pid 1 on elsewhere\n")
        raise HeldError("pid 1 on elsewhere")

    monkeypatch.setattr(staging, "Lock", lost)
    with pytest.raises(DataError, match=r"another prepare \(pid 1 on elsewhere\) writes to"):
        staging.CorpusFolder(out)
    assert (out / "prepare.lock").exists()


def test_a_log_from_which_nothing_is_dropped_keeps_its_time(tmp_path):
    """The job script takes a newer one for a step that was made, and starts such a job again."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    os.utime(path, (0, 0))
    MetricsLog.open(path, 2).close()
    assert path.stat().st_mtime == 0
    MetricsLog.open(path, 1).close()
    assert path.read_text() == '{"step": 1}\n'


def test_a_pipe_that_is_full_for_a_while_loses_nothing():
    read, write = os.pipe()
    os.set_blocking(write, False)
    got = bytearray()
    reader = threading.Thread(target=lambda: got.extend(iter_bytes(read)))
    out = Output(write, "ascii", patient=True)
    timer = threading.Timer(0.2, reader.start)
    timer.start()
    for _ in range(30):
        out.write("x" * 9000)
    out.flush()
    timer.join()
    os.close(write)
    reader.join()
    assert len(got) == 270_000


def iter_bytes(descriptor: int):
    while data := os.read(descriptor, 65536):
        yield from data


PUMP = """
import sys
from mlm_mpi.comm.launch import supervise
from mlm_mpi.launcher import Limits, run_job
say = "import sys; from mlm_mpi.comm import launch; print('a warning', file=sys.stderr)"
rank = say + "; launch.start(); launch.finish()"
sys.exit(supervise(lambda: run_job([sys.executable, "-c", rank], 2, limits=Limits(60, 8, True))))
"""


def test_a_start_is_watched_though_nobody_can_read_its_stderr():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", PUMP], stderr=full, timeout=60)
    assert done.returncode == 0
