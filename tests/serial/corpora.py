"""Small corpora for tests: text that differs, and `prepare` as the command line calls it."""

import argparse
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

from mlm_mpi.comm.group import Group
from mlm_mpi.commands import prepare


def sentences(seed: int, words: int) -> str:
    """Pronounceable nonsense, different for each seed."""
    draw = random.Random(seed)
    made = [
        "".join(draw.choice("bdfklmnrst") + draw.choice("aeiou") for _ in range(draw.randint(1, 4)))
        for _ in range(words)
    ]
    return " ".join(made) + "\n"


def write_texts(folder: Path, count: int = 40, words: int = 120) -> Path:
    """`count` text files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"doc{number:03d}.txt").write_text(sentences(number, words), encoding="utf-8")
    return folder


def run_prepare(*words: object) -> int:
    """`mlm-mpi prepare` in this process, alone."""
    parser = argparse.ArgumentParser()
    prepare.configure(parser)
    return prepare.main(parser.parse_args([str(word) for word in words]), Group())


def in_a_process(*words: object, limit_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    """`mlm-mpi prepare` in a process of its own, with files of at most `limit_bytes`."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return subprocess.run(
        [sys.executable, "-m", "mlm_mpi", "prepare", *map(str, words)],
        capture_output=True, text=True, timeout=60, preexec_fn=limit if limit_bytes else None, check=False,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
