"""What it costs that ranks share a model: idle time of pipelines, and steps of meshes against data parallelism.

    python benchmarks/meshes.py --pairs 20 --record

Idle time: stages whose forwards sleep 100 ms and whose two halves of a backward 100 ms each, so that two cores are
enough for four stages; messages, waits and instructions are those of training. Theory: (P − 1)(F + B) for GPipe and
1F1B (Narayanan et al., arXiv:2104.04473), (P − 1)(F + B − 2W) for ZB-H1, B both halves (Qi et al., arXiv:2401.10241).
Meshes: two ranks, GPT-2 with 8 layers, C 384, T 64; runs take turns, and which of a pair is first alternates.
"""

import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from harness import Report, arguments, pair_ratio
from recovery_price import interval, step_s

from mlm_mpi.plug import Plugins

STAGES, MICROS, SLEEP_S = 4, 8, 0.1
SCHEDULES = {"gpipe": 3, "one_f_one_b": 3, "zero_bubble": 1}  # idle time in units of (P − 1) · SLEEP_S
MODEL = (
    "model.layers=8", "model.width=384", "model.heads=8", "model.feed_forward=1536", "model.context=64",
    "model.dropout=0.0", "train.micro_batches=8", "train.rows=8", "train.lanes=8", "optim.warmup_steps=2",
)  # fmt: skip
MESHES = {
    "tp 2 against dp 2": (("mesh.tp=2",), ("mesh.tp=1",)),
    "pp 2 (1F1B) against dp 2": (("mesh.pp=2", "train.schedule=one_f_one_b"), ("mesh.pp=1",)),
    "ZeRO-1 against dp 2": (("mesh.zero=1", "comm.recover=false"), ("mesh.zero=0", "comm.recover=false")),
}


class Sleeping:
    """A part that sleeps where others calculate."""

    def __init__(self, last: bool) -> None:
        self.last = last

    def parameters(self) -> list[Any]:
        return []

    def forward(self, x: Any, ctx: Any) -> tuple[Any, Any]:
        time.sleep(SLEEP_S)
        return (() if self.last else (np.zeros((1, 1, 1), np.float32),)), None

    def backward(self, dy: Any, saved: Any, ctx: Any) -> Any:
        ctx.owe(lambda at: time.sleep(SLEEP_S))
        time.sleep(SLEEP_S)
        return (np.zeros((1, 1, 1), np.float32),)


def worker() -> None:
    """On each of STAGES ranks: the time of a step of every schedule, said by rank 0."""
    from mlm_mpi.comm import launch
    from mlm_mpi.comm.mesh import mesh
    from mlm_mpi.data.batch import Batch
    from mlm_mpi.layers.base import Context
    from mlm_mpi.train.pipeline import Stage

    group = launch.start()
    pp = mesh(group, STAGES).group("pp")
    stage = Stage([Sleeping(pp.rank == STAGES - 1)], pp, 1, np.float32, None)
    ids = {"ids": np.zeros((1, 1), np.int32)}
    for schedule in [*SCHEDULES] * 3:
        instructions = Plugins().find("schedules", schedule, "").instructions
        group.barrier("the beginning of a step")
        began, flights = time.perf_counter(), list[Any]()
        for what in instructions(pp.rank, STAGES, MICROS):
            if not hasattr(what, "half"):
                ctx = Context(training=True, batch=Batch(0, what.micro, ids, {}, 1))
                flights.append([ctx, stage.forward((), ctx)[1], None])
                continue
            ctx, kept, owed = flights[what.micro]
            if what.half == "both":
                stage.backward((), kept, ctx)
            elif what.half == "input":
                flights[what.micro][2] = stage.backward_input((), kept, replace(ctx, gradients={}))[1]
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


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(pairs=20)
    parser.add_argument("--config", default="jobs/configs/gpt2-tiny.toml")
    parser.add_argument("--steps", type=int, default=7)
    args = parser.parse_args()
    if args.worker:
        worker()
        return
    report = Report("meshes", "What it costs that ranks share a model", args)
    idle(report)
    report.head("two ranks", "one, s a step", "the other", "time, ratio", "95 %")
    for name, (one, other) in MESHES.items():
        times: dict[tuple[str, ...], list[float]] = {one: [], other: []}
        for pair in range(args.pairs):
            for more in ((one, other), (other, one))[pair % 2]:
                times[more].append(step_s(args.config, (*MODEL, *more), 2, args.steps))
        low, high = interval([a / b for a, b in zip(times[one], times[other], strict=True)])
        medians = (f"{statistics.median(times[key]):.3f}" for key in (one, other))
        report.row(name, *medians, f"{pair_ratio(times[other], times[one]):.3f}", f"{low:.3f} to {high:.3f}")
    report.say()
    report.save()


if __name__ == "__main__":
    main()
