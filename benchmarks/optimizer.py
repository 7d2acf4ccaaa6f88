"""What part of a training step an optimiser takes, on any number of ranks.

    mpiexec -n 2 python benchmarks/optimizer.py                       # 4 layers, C 256 and 6 layers, C 384
    mpiexec -n 2 python benchmarks/optimizer.py --set optim.iteration=newton-schulz

A step is 16,384 tokens of random ids. AdamW and Muon take turns in one process, so that whatever else the machine does
hits both alike; times are the slowest rank's, medians over the rounds.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Callable
from typing import Any

import numpy as np

from mlm_mpi import config as configuration
from mlm_mpi.backend.choice import place_of
from mlm_mpi.comm import launch
from mlm_mpi.comm.group import Group
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.data.batch import Batch
from mlm_mpi.layers.base import Sizes
from mlm_mpi.ops.polar import flops
from mlm_mpi.optim.muon import Muon
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks import language_model
from mlm_mpi.train.build import build
from mlm_mpi.train.engine import Engine

MODELS = {"4 layers, C 256": (4, 256, 4, 128), "6 layers, C 384": (6, 384, 6, 128)}
TOKENS, VOCABULARY, MICRO_BATCHES = 16_384, 2048, 8


def engine_of(model: tuple[int, int, int, int], name: str, settings: list[str], mesh: Mesh) -> Engine:
    layers, width, heads, context = model
    shape = [f"model.layers={layers}", f"model.width={width}", f"model.heads={heads}", f"model.context={context}"]
    work = [f"train.micro_batches={MICRO_BATCHES}", f"train.rows={TOKENS // MICRO_BATCHES // context}"]
    own = settings if name == "muon" else []
    config = configuration.load(None, [*shape, *work, f"optim.name={name}", *own])
    plugins = Plugins()
    engine = build(config, plugins, language_model.parts(config, plugins, Sizes(VOCABULARY)), mesh, place_of(config))
    engine.machine.store.initialise(0)
    return engine


def timed(engine: Engine, step: int, context: int) -> tuple[float, float]:
    """(seconds of the whole step, of the optimiser in it)."""
    optimizer, took = engine.machine.optimizer, []
    parts = {name: getattr(optimizer, name) for name in ("prepare", "step") if hasattr(optimizer, name)}
    rows = TOKENS // MICRO_BATCHES // context

    def measured(part: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: Any) -> None:
            began = time.perf_counter()
            part(*arguments)
            took.append(time.perf_counter() - began)

        return timed

    def batch() -> Batch:
        ids = np.random.default_rng(step).integers(0, VOCABULARY, (rows, context)).astype(np.int32)
        return Batch(step, 0, {"ids": ids}, {"ids": ids}, ids.size)

    for name, part in parts.items():
        setattr(optimizer, name, measured(part))
    seconds = engine.step(step, batch).step_s
    for name, part in parts.items():
        setattr(optimizer, name, part)
    return seconds, sum(took)


def measure(name: str, model: tuple[int, int, int, int], group: Group, rounds: int, settings: list[str]) -> None:
    engines = {kind: engine_of(model, kind, settings, Mesh(group)) for kind in ("adamw", "muon")}
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in engines}
    for number in range(rounds + 1):
        for kind, engine in engines.items():
            mine = np.array(timed(engine, number, model[3]))
            if number:  # the first touches its pages
                found[kind].append(group.allgather_array(mine, "times").max(axis=0))
    if group.rank != 0:
        return
    muon = engines["muon"].machine.optimizer
    assert isinstance(muon, Muon)
    work = [2 * flops(len(matrix.update), matrix.update[0].size) for matrix in muon.matrices if matrix.owner == 0]
    print(f"{name}, {engines['muon'].machine.store.count:,} parameters, {group.size} rank(s)")
    for kind, times in found.items():
        step, update = (statistics.median(column) for column in zip(*times, strict=True))
        share = statistics.median(u / s for s, u in times)
        print(f"  {kind:6}  step {step:7.3f} s  optimiser {update:6.3f} s  {share:5.1%} of the step")
    update = statistics.median(u for _, u in found["muon"])
    print(f"  floor   {sum(work) / 1e9:.2f} GFLOP of products on rank 0: {sum(work) / update / 1e9:.1f} GFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", choices=MODELS, help="one of them only")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for Muon")
    args = parser.parse_args()
    group = launch.start()
    for name, model in MODELS.items():
        if args.model in (None, name):
            measure(name, model, group, args.rounds, args.set)
    launch.finish()


if __name__ == "__main__":
    main()
