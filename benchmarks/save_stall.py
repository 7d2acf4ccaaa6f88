"""How long a save in the background holds up the steps beside it: the longest step against the usual one.

    python benchmarks/save_stall.py                        # 1 and 2 GiB of state, three saves each

A step is matrix products and 2,000 short NumPy calls on one thread, about half a second: what it needs the
interpreter's lock for is spread over it as in training. A round is 12 steps without a save and then steps until a save
is published. `begin` (the snapshot) and `tend` are the loop's own, everything else is done by threads.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from save_memory import ABOUT, state

from mlm_mpi.backend.choice import keep_freed_memory
from mlm_mpi.comm.group import Group
from mlm_mpi.train import checkpoint

ROUNDS = 3


def timed(action) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def go_on(saver: checkpoint.Saver) -> None:
    """What the loop does when all have written."""
    problem = saver.tend(ABOUT)
    assert problem is None, problem


def work(mib: int, folder: Path) -> None:
    """Prints a row of the table for each save."""
    keep_freed_memory()
    a, b = np.random.default_rng(1).random((2, 1024, 1024), "f4")
    c, products = np.empty_like(a), 1

    def step() -> None:
        for _ in range(products):
            np.matmul(a, b, out=c)
        for row in range(2000):
            np.add(a[row % 1024], b[row % 1024], out=c[row % 1024])

    short = min(timed(step) for _ in range(5))
    products = 2
    one = max(1e-3, min(timed(step) for _ in range(5)) - short)
    products = max(1, round((0.5 - short) / one))
    store, buffers = state(mib)
    saver = checkpoint.Saver(folder, store, buffers, b"{}", Group(), 1, True)
    for number in range(1, ROUNDS + 1):
        alone = [timed(step) for _ in range(12)]
        began = time.perf_counter()
        begin = timed(lambda number=number: saver.begin(number))
        beside, tends = [], []
        while saver.busy:
            beside.append(timed(step))
            if saver.written:
                tends.append(timed(lambda: go_on(saver)))
        took = time.perf_counter() - began
        print(
            f"| {mib} MiB | {number} | {statistics.median(alone):.3f} | {max(alone):.3f} | {begin:.3f} | "
            f"{statistics.median(beside):.3f} | {max(beside):.3f} | {max(tends):.3f} | {took:.1f} |", flush=True,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="1024,2048", help="MiB of state, weights and two moments together")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where to save")
    parser.add_argument("--work", nargs=2, metavar=("MIB", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(int(options.work[0]), Path(options.work[1]))
        return
    print(
        "| state | save | median step alone, s | longest alone | begin (snapshot) | median beside the save | "
        "longest beside | publish or longest tend | save took |\n|---|---|---|---|---|---|---|---|---|", flush=True,
    )  # fmt: skip
    for size in options.sizes.split(","):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            subprocess.run(
                [sys.executable, __file__, "--work", size, folder], env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
                check=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
