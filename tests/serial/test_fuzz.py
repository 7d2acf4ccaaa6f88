"""Readers under mutated files: each returns or refuses, in bounded time and memory (`fuzz.py` has the oracle)."""

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FEW = 100  # cases of a target in `make test`
MANY = {
    "shard": 20_000, "structure": 6_000, "part": 16_000, "manifest": 16_000, "catalog": 14_000, "tokenizer": 14_000,
    "config": 12_000, "metrics": 8_000,
}  # fmt: skip


def run_python(words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, [HERE, *HERE.parents[:2]])), "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, errors="replace", check=False
    )


def run(folder: Path, seed: int, cases: int, *targets: str) -> str:
    """Runs fuzz.py; a crash, of the tokenizers' Rust for one, ends that process alone."""
    folder.mkdir(exist_ok=True)
    words = [str(HERE / "fuzz.py"), str(folder), str(seed), str(cases), *targets]
    ended = run_python(words)
    how = f"exit code {ended.returncode}; again with: {' '.join(words)}\n{ended.stdout}\n{ended.stderr[-6000:]}"
    assert ended.returncode == 0 and ended.stdout.count(" cases, ") == len(targets), how
    return ended.stdout


def test_readers_survive_mutated_files(tmp_path):
    run(tmp_path, 20261125, FEW, *MANY)


@pytest.mark.slow
@pytest.mark.parametrize("target", MANY)
def test_a_reader_survives_many_mutated_files(tmp_path, target):
    seed = secrets.randbits(32) if os.environ.get("MLM_MPI_TEST_SEED") == "fresh" else 20261125
    print(run(tmp_path, seed, MANY[target], target))


SLOW = "setattr(fuzz, 'CPU_S', 0.01) or sum(range(10**7)) and (_ for _ in ()).throw(fuzz.MlmError('refused'))"
HARMS = {
    "KeyError": "{}['x']", "MemoryError": "bytearray(2 << 30)", "-11": "os.kill(os.getpid(), 11)",
    "AssertionError": SLOW,
}  # fmt: skip
PROGRAM = "import os, sys, fuzz; fuzz.Tokenizer = lambda _: {}; print(*fuzz.main(sys.argv))"


@pytest.mark.parametrize("said", HARMS)
def test_the_oracle_finds_what_it_looks_for(tmp_path, said):
    """An exception, too much memory, a crash and too much time end the run each."""
    ended = run_python(["-c", PROGRAM.format(HARMS[said]), str(tmp_path), "1", "5", "tokenizer"])
    assert ended.returncode != 0 and said in ended.stderr + str(ended.returncode)
