"""One hash on every mesh: each (pp, dp, tp) of up to 8 ranks, with schedules, ZeRO levels, recomputation and cut
positions so that every pair of values meets on some mesh.

    python benchmarks/mesh_hashes.py --record          # GPT-2 and the decoder: 8 layers, C 384, V 8192, T 64, M = J = 8
    python benchmarks/mesh_hashes.py --small           # narrow, in a minute or two
    python benchmarks/mesh_hashes.py --float64         # losses and norms of five steps in float64, to 1e-10

A job of R ranks goes through the meshes of R ranks, one after another: draws weights, makes two steps, says the hash.
What it has to be, one rank says. In float64 references compute, whose sums a mesh may order otherwise. Exit code 1
where one differs.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import Report, arguments

from mlm_mpi import config
from mlm_mpi.plug import Plugins

VOCABULARY, RANKS = 8192, 8
STEPS, STEPS_IN_FLOAT64, CLOSE = 2, 5, 1e-10
MODELS = {
    "gpt": ("model.kind=gpt", "model.dropout=0.1", "optim.name=adamw"),
    "decoder": ("model.kind=llama", "model.tied=true", "model.qk_norm=true", "optim.name=muon", "optim.average=0.9"),
}
SIZE = (
    "model.layers=8", "model.width=384", "model.heads=8", "model.feed_forward=1536", "model.context=64",
    "train.rows=1", "train.micro_batches=8", "train.lanes=8", "numerics.threads=1", f"train.steps={STEPS_IN_FLOAT64}",
    "optim.warmup_steps=1", "guard.audit_every=0",
)  # fmt: skip
SMALL = ("model.width=64", "model.feed_forward=128", "model.context=16")
SCHEDULES = (("gpipe", 1), ("one_f_one_b", 1), ("zero_bubble", 1), ("interleaved", 2))


class Case(NamedTuple):
    """A mesh and how it trains."""

    pp: int
    dp: int
    tp: int
    schedule: str
    chunks: int
    zero: int
    recompute: bool
    sequence: bool

    @property
    def settings(self) -> tuple[str, ...]:
        return (
            f"train.schedule={self.schedule}", f"mesh.chunks={self.chunks}", f"mesh.zero={self.zero}",
            f"mesh.pp={self.pp}", f"mesh.tp={self.tp}", f"mesh.sequence={str(self.sequence).lower()}",
            f"train.recompute={str(self.recompute).lower()}",
        )  # fmt: skip


def meshes(ranks: int) -> list[tuple[int, int, int]]:
    """(pp, dp, tp) of so many ranks that 8 heads, 8 lanes and 10 parts allow."""
    every = itertools.product(range(1, ranks + 1), repeat=3)
    return [(pp, dp, tp) for pp, dp, tp in every if pp * dp * tp == ranks and tp in (1, 2, 4, 8)]


def cases() -> list[Case]:
    """Every mesh once, and more of them until every pair of (schedule, ZeRO, recomputation, positions) has met."""
    ways = list(itertools.product(SCHEDULES, range(4), (False, True), (False, True)))
    unmet = {pair for way in ways for pair in _pairs(way)}
    found = []
    places = [place for ranks in range(1, RANKS + 1) for place in meshes(ranks)]
    for pp, dp, tp in [*places, *reversed(places)]:
        again = any((case.pp, case.dp, case.tp) == (pp, dp, tp) for case in found)
        fitting = [
            way for way in ways
            if (way[0][0] == "gpipe" or pp > 1) and (way[1] == 0 or dp > 1) and (not way[3] or tp > 1)
            and pp * way[0][1] <= 10
        ]  # fmt: skip
        best = max(fitting, key=lambda way: len(unmet & _pairs(way)))
        if again and not unmet & _pairs(best):
            continue
        unmet -= _pairs(best)
        (schedule, chunks), zero, recompute, sequence = best
        found.append(Case(pp, dp, tp, schedule if pp > 1 else "single", chunks, zero, recompute, sequence))
    assert not unmet, unmet
    return found


def named() -> list[Case]:
    """The meshes that are compared in float64."""
    every = [(1, 1, 1), (4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)]
    schedule = {1: "single", 2: "one_f_one_b", 4: "zero_bubble"}
    return [Case(pp, dp, tp, schedule[pp], 1, 0, False, False) for pp, dp, tp in every]


def _pairs(way: tuple[Any, ...]) -> frozenset[Any]:
    return frozenset(itertools.combinations(enumerate(way), 2))


def settings(job: dict[str, Any], case: Case) -> config.Config:
    words = [*MODELS[job["model"]], *SIZE, *(SMALL if job["small"] else ()), *case.settings]
    return config.load(None, [*words, *(["train.dtype=float64"] if job["float64"] else [])])


def work(job: dict[str, Any]) -> None:
    """On every rank: the hashes of some cases, said by rank 0 line by line."""
    from mlm_mpi.backend import choice
    from mlm_mpi.comm import launch
    from mlm_mpi.comm.mesh import mesh
    from mlm_mpi.config import rules
    from mlm_mpi.data.batch import Batch
    from mlm_mpi.layers.base import Sizes
    from mlm_mpi.tasks import language_model
    from mlm_mpi.train.build import build

    choice.keep_freed_memory()
    group = launch.start()
    for number, row in job["cases"]:
        c, plugins = settings(job, Case(*row)), Plugins()
        place = choice.place_of(c, c.numerics.level)
        parts = language_model.parts(c, plugins, Sizes(VOCABULARY, rules.shares(c)))
        engine = build(c, plugins, parts, mesh(group, c.mesh.pp, c.mesh.tp, c.mesh.sequence), place, c.model.width)
        engine.machine.store.initialise(0)

        def batch(step: int, index: int, length: int = c.model.context) -> Batch:
            rows = np.random.default_rng(1000 * step + index).integers(0, VOCABULARY, (1, length + 1)).astype(np.int32)
            ids, targets = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
            return Batch(step, index, {"ids": ids}, {"ids": targets}, targets.size)

        steps = STEPS_IN_FLOAT64 if job["float64"] else STEPS
        made = (batch(*pair) for pair in engine.plan(0, steps))
        results = [engine.step(step, made.__next__) for step in range(steps)]
        numbers = [number for result in results for number in (result.loss, result.gradient_norm)]
        said = [number, engine.weights_sha256(), numbers]
        if group.rank == 0:
            print(json.dumps(said), flush=True)
        del engine
    launch.leave(group, 0)
    launch.finish()


def start(job: dict[str, Any], ranks: int) -> dict[int, list[Any]]:
    """What a job of so many ranks says of each case."""
    command = [str(Path(sys.executable).parent / "mpiexec"), "-n", str(ranks), "--oversubscribe", "--bind-to", "none"]
    command += ["--mca", "mpi_yield_when_idle", "1", sys.executable, __file__, "--worker", json.dumps(job)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("[")]
    return {number: rest for number, *rest in lines}


def agree(one: list[Any], other: list[Any], float64: bool) -> bool:
    """Hash, losses and norms; in float64 the numbers to 1e-10."""
    if not float64:
        return one == other
    return all(abs(a - b) <= CLOSE * abs(b) for a, b in zip(one[1], other[1], strict=True))


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="C 64, T 16")
    parser.add_argument("--float64", action="store_true", help="losses and norms of five steps, to 1e-10")
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    args = parser.parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return 0
    theme = "mesh-float64" if args.float64 else "mesh-hashes"
    report, every, wrong = Report(theme, "One hash on every mesh", args), named() if args.float64 else cases(), 0
    for model in args.model or MODELS:
        job = {"model": model, "small": args.small, "float64": args.float64}
        found: dict[int, list[Any]] = {}
        for ranks in range(1, RANKS + 1):
            mine = [(number, case) for number, case in enumerate(every) if case.pp * case.dp * case.tp == ranks]
            if mine:
                found |= start(job | {"cases": mine}, ranks)
                print(f"{model}: {ranks} ranks, {len(mine)} cases", file=sys.stderr, flush=True)
        plain = found[0]
        same = {number: agree(one, plain, args.float64) for number, one in found.items()}
        wrong += list(same.values()).count(False)
        report.say(f"## {model}: {' '.join(MODELS[model])}")
        report.say(f"One rank: weights sha256 `{plain[0]}`, losses and norms {', '.join(map(repr, plain[1]))}.")
        report.say(f"{list(same.values()).count(True)} of {len(found)} meshes have the same.")
        report.say()
        report.head("pp", "dp", "tp", "schedule", "chunks", "ZeRO", "recompute", "positions cut", "the same")
        for number, case in enumerate(every):
            report.row(*case, "yes" if same[number] else f"NO: {found[number]}")
        report.say()
    report.save()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
