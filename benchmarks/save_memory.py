"""Peak memory of a run with saves, and of a resume: what they take over that of the steps themselves.

    python benchmarks/save_memory.py                       # 64, 256 and 1024 MiB of weights and two moments

One rank, whose step is a fake one: it touches a quarter of the state and frees it, so that its peak is known. Every
figure is the VmHWM of a process of its own: steps alone; steps with two saves in the background, which go on while
a save is written; with two synchronous saves; a resume. Memory that is freed stays with the process, as in training.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mlm_mpi.backend.choice import keep_freed_memory
from mlm_mpi.comm.group import Group
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import FlatStore, Parameter
from mlm_mpi.train import checkpoint

WIDTH = 1024  # of a row; parameters have 4 MiB, 1 MiB and one row
ABOUT: dict[str, Any] = {"config": {}, "vocabulary": 40, "catalog": "", "fingerprint": {}}
MODES = ("steps", "background", "synchronous", "resume")


def state(mib: int) -> tuple[FlatStore, dict[str, np.ndarray]]:
    """A store and its three buffers, of about so many MiB together, every page touched."""
    rows = mib * 2**20 // 3 // (4 * WIDTH)
    shapes = [(1024, WIDTH), (256, 4, WIDTH // 4), (1, WIDTH)]
    parameters, number = [], 0
    while rows > 0:
        shape = shapes[number % 3]
        shape = (min(shape[0], rows), *shape[1:])
        parameters.append(Parameter(f"p{number:04}", Layout(shape), 0.02))
        rows, number = rows - max(1, int(np.prod(shape)) // WIDTH), number + 1
    store = FlatStore([parameters], Mesh(), "f4")
    buffers = {"weights": store.data, "moment1": store.new_buffer(), "moment2": store.new_buffer()}
    for flat in buffers.values():
        flat[...] = np.arange(len(flat), dtype="f4")
    return store, buffers


def status(field: str) -> int:
    """VmHWM or VmRSS of this process in KiB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def work(mode: str, mib: int, folder: Path) -> None:
    """Runs one mode in this process and prints its peak."""
    keep_freed_memory()
    store, buffers = state(mib)
    if mode == "resume":
        (path,) = checkpoint.published(folder)
        before = status("VmRSS")
        checkpoint.restore(path, checkpoint.read_manifest(path), store, buffers)
        print(json.dumps({"peak_kib": status("VmHWM") - before}))
        return
    saver = checkpoint.Saver(folder, store, buffers, b"{}", Group(), 1, mode == "background")

    def step() -> None:
        array = np.ones(sum(map(len, buffers.values())) // 4, "f4")
        array += 1

    step()
    saves = 0
    while saves < 2:
        step()
        saves += 1
        if mode == "steps":
            continue
        saver.begin(saves)
        while not saver.written:
            step()
        problem = saver.publish(ABOUT)
        assert problem is None, problem
    step()
    print(json.dumps({"peak_kib": status("VmHWM")}))


def peak_mib(mode: str, mib: int, folder: Path) -> float:
    """The peak of a mode in a process of its own."""
    command = [sys.executable, __file__, "--work", mode, str(mib), str(folder)]
    done = subprocess.run(command, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)["peak_kib"] / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="64,256,1024", help="MiB of state, weights and two moments together")
    parser.add_argument("--work", nargs=3, metavar=("MODE", "MIB", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work[0], int(options.work[1]), Path(options.work[2]))
        return
    print("| state | steps alone | + background saves | + synchronous saves | a resume takes |")
    print("|---|---|---|---|---|")
    for size in map(int, options.sizes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            peaks = {mode: peak_mib(mode, size, Path(folder)) for mode in MODES}
        more = {mode: peaks[mode] - peaks["steps"] for mode in ("background", "synchronous")}
        print(
            f"| {size} MiB | {peaks['steps']:.0f} MiB | {more['background']:+.0f} MiB | {more['synchronous']:+.0f} MiB "
            f"| {peaks['resume']:+.0f} MiB |"
        )


if __name__ == "__main__":
    main()
