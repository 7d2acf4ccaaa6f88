"""What it costs that ranks share a model: idle time of pipelines, and steps of meshes against data parallelism.

    python benchmarks/meshes.py --pairs 20 --record          # also against PyTorch's tensor parallelism, if it is there

Idle time: stages whose forwards sleep 100 ms and whose two halves of a backward 100 ms each, so that two cores are
enough for four stages; the first and the last share a table, and each micro-batch is a lane, which is training at its
worst. Messages, waits and instructions are those of training. Theory: (P − 1)(F + B) for GPipe and 1F1B (Narayanan et
al., arXiv:2104.04473), (P − 1)(F + B − 2W) for ZB-H1, B both halves (Qi et al., arXiv:2401.10241).
Meshes: two ranks, the reference size of `step.py`, the same tokens a step for all. All engines live in one job, and
take turns by the step; which of a pair is first alternates.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import SIZES, Report, Worker, arguments, pair_ratio, start_ranks
from recovery_price import interval

from mlm_mpi import config
from mlm_mpi.plug import Plugins

STAGES, MICROS, SLEEP_S = 4, 8, 0.1
SCHEDULES = {"gpipe": 3, "one_f_one_b": 3, "zero_bubble": 1}  # idle time in units of (P − 1) · SLEEP_S
SIZE = SIZES["reference"] | {"rows": 2}
MODEL = (
    "model.kind=gpt", *(f"model.{key}={SIZE[key]}" for key in ("layers", "width", "heads", "context")),
    f"train.rows={SIZE['rows']}", "train.micro_batches=4", "train.lanes=4", "train.steps=100000",
)  # fmt: skip
PLAIN = "dp 2"
MESHES = {
    PLAIN: (),
    "tp 2": ("mesh.tp=2",),
    "tp 2, positions cut": ("mesh.tp=2", "mesh.sequence=true"),
    "pp 2, 1F1B": ("mesh.pp=2", "train.schedule=one_f_one_b"),
    "pp 2, ZB-H1": ("mesh.pp=2", "train.schedule=zero_bubble"),
    "dp 2, ZeRO-1": ("mesh.zero=1",),
    "dp 2, ZeRO-2": ("mesh.zero=2",),
    "dp 2, ZeRO-3": ("mesh.zero=3",),
}


def settings(*more: str) -> config.Config:
    """That of an engine."""
    return config.load(None, [*MODEL, "numerics.threads=1", *more])


class Sleeping:
    """A part that sleeps where others calculate. `table`: what the first and the last one share."""

    def __init__(self, last: bool, table: Any) -> None:
        self.last, self.table = last, table

    def parameters(self) -> list[Any]:
        return []

    def forward(self, x: Any, ctx: Any) -> tuple[Any, Any]:
        time.sleep(SLEEP_S)
        return (() if self.last else (np.zeros((1, 1, 1), np.float32),)), None

    def backward(self, dy: Any, saved: Any, ctx: Any) -> Any:
        ctx.owe(lambda at: time.sleep(SLEEP_S))
        time.sleep(SLEEP_S)
        if self.last:
            ctx.grad(self.table)[...] = 0.0
        return (np.zeros((1, 1, 1), np.float32),)


def sleep() -> None:
    """On each of STAGES ranks: the time of a step of every schedule, said by rank 0."""
    from mlm_mpi.comm import launch
    from mlm_mpi.comm.mesh import mesh
    from mlm_mpi.data.batch import Batch
    from mlm_mpi.layers.base import Context
    from mlm_mpi.params.layout import Layout
    from mlm_mpi.params.store import Parameter
    from mlm_mpi.train.pipeline import Slice

    group = launch.start()
    pp = mesh(group, STAGES).group("pp")
    table = Parameter("table", Layout((1, 1)), 0.0, tied=True)
    part = Sleeping(pp.rank == STAGES - 1, table)
    stage = Slice([part], pp.rank, STAGES, pp, 1, np.float32, table)
    ids = {"ids": np.zeros((1, 1), np.int32)}
    for schedule in [*SCHEDULES] * 3:
        instructions = Plugins().find("schedules", schedule, "").instructions
        group.barrier("the beginning of a step")
        began, flights = time.perf_counter(), list[Any]()
        for what in instructions(pp.rank, STAGES, MICROS):
            if not hasattr(what, "half"):
                buffer = {table: np.zeros((1, 1), np.float32)}
                ctx = Context(training=True, batch=Batch(0, what.micro, ids, {}, 1), gradients=buffer)
                flights.append([ctx, stage.forward((), ctx)[1], None])
                continue
            ctx, kept, owed = flights[what.micro]
            if what.half == "both":
                stage.backward((), kept, ctx)
            elif what.half == "input":
                flights[what.micro][2] = stage.backward_input((), kept, ctx)[1]
            else:
                stage.backward_weight(owed, ctx)
        group.barrier("the end of a step")
        if group.rank == 0:
            print(schedule, time.perf_counter() - began, flush=True)
    launch.leave(group, 0)
    launch.finish()


def idle(report: Report) -> None:
    """Measured idle time of each schedule beside theory."""
    command = [str(Path(sys.executable).parent / "mpiexec"), "-n", str(STAGES), "--oversubscribe", "--bind-to", "none"]
    command += ["--mca", "mpi_yield_when_idle", "1", sys.executable, __file__, "--worker", "idle"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    report.head("schedule", "step, s", "idle, s", "theory, s", "ratio")
    for schedule, units in SCHEDULES.items():
        step = statistics.median(float(line.split()[1]) for line in lines if line.startswith(f"{schedule} "))
        found, theory = step - 3 * MICROS * SLEEP_S, units * (STAGES - 1) * SLEEP_S
        report.row(schedule, f"{step:.3f}", f"{found:.3f}", f"{theory:.3f}", f"{found / theory:.2f}")
    report.say()


def train() -> None:
    """On each of two ranks: an engine for every mesh, which steps when it is asked to."""
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
    engines = {}
    for name, more in MESHES.items():
        c, plugins = settings(*more), Plugins()
        place = choice.place_of(c, c.numerics.level)
        parts = language_model.parts(c, plugins, Sizes(SIZE["vocabulary"], rules.shares(c)))
        on = mesh(group, c.mesh.pp, c.mesh.tp, c.mesh.sequence)
        engines[name] = build(c, plugins, parts, on, place, c.model.width)
        engines[name].machine.store.initialise(0)
    random, done = np.random.default_rng(0), dict.fromkeys(engines, 0)

    def batch(step: int, index: int) -> Batch:
        rows = random.integers(0, SIZE["vocabulary"], (SIZE["rows"], SIZE["context"] + 1)).astype(np.int32)
        ids, targets = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
        return Batch(step, index, {"ids": ids}, {"ids": targets}, targets.size)

    def answer(name: str) -> dict[str, Any]:
        engine, step = engines[name], done[name]
        made = iter([batch(*pair) for pair in engine.plan(step, step + 1)])
        group.barrier("a step")
        began = time.perf_counter()
        engine.step(step, made.__next__)
        engine.machine.chain.weights.complete()  # else the next engine's step would pay for it
        done[name] = step + 1
        return {"seconds": float(group.allgather_array(np.array([time.perf_counter() - began]), "times").max())}

    harness.serve(group, answer, {"meshes": list(engines)})
    launch.finish()


def peer(args: Any, report: Report) -> Worker | None:
    """PyTorch's tensor parallelism on two ranks, if there is a PyTorch."""
    if not Path(args.peer_python).exists():
        report.say(f"PyTorch is left out: there is no {args.peer_python}")
        return None
    c = settings()
    job = {
        "model": asdict(c.model), "vocabulary": SIZE["vocabulary"], "rows": SIZE["rows"],
        "micro_batches": c.train.micro_batches, "clip": c.optim.clip,
    }  # fmt: skip
    worker = Worker([args.peer_python, str(harness.HERE / "torch_tp.py"), json.dumps(job)], 1)
    report.say(f"PyTorch: {worker.hello['about']}")
    return worker


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(pairs=20)
    parser.add_argument("--peer-python", default=harness.PEER_PYTHON)
    args = parser.parse_args()
    if args.worker:
        return sleep() if args.worker == "idle" else train()
    report = Report("meshes", "What it costs that ranks share a model", args)
    idle(report)
    torch, ours = peer(args, report), start_ranks("meshes.py", {"meshes": True}, 2, 1)
    report.say()
    turns = {name: (ours, {"name": name}) for name in MESHES}
    if torch is not None:
        turns["PyTorch, tp 2"] = (torch, {"steps": 1})
    times: dict[str, list[float]] = {name: [] for name in turns}
    for pair in range(-2, args.pairs):  # the first two touch pages
        for name in turns if pair % 2 == 0 else reversed(turns):
            worker, request = turns[name]
            seconds = worker.ask(**request)["seconds"]
            if pair >= 0:
                times[name].append(seconds)
    report.head("two ranks", "s a step", f"time, {PLAIN} = 1", "95 %")
    for name, mine in times.items():
        low, high = interval([a / b for a, b in zip(mine, times[PLAIN], strict=True)])
        ratio = f"{pair_ratio(times[PLAIN], mine):.3f}"
        report.row(name, f"{statistics.median(mine):.3f}", ratio, f"{low:.3f} to {high:.3f}")
    report.say()
    if torch is not None:
        ratios = [b / a for a, b in zip(times["tp 2"], times["PyTorch, tp 2"], strict=True)]
        low, high = interval(ratios)
        report.say(f"tp 2 is {statistics.median(ratios):.3f} × as fast as PyTorch's ({low:.3f} to {high:.3f}).")
        torch.close()
    ours.close()
    report.save()


if __name__ == "__main__":
    main()
