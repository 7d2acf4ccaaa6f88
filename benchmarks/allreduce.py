"""The reduction alone, on P floats: canonical, our allreduce (MPI_Iallreduce by bucket), plain MPI_Allreduce.

    python benchmarks/allreduce.py --ranks 2,4 --floats 13891584

The floor is what a rank must send at least, 2 (R − 1)/R · 4P bytes, at the rate at which all ranks together copy
memory at that moment. No arithmetic hides anything here: a step hides most of this behind its backward.
"""

import itertools
import json
import statistics
import time
from typing import Any

import harness
import numpy as np
from harness import Report, pair_ratio, start_ranks

from mlm_mpi.comm import launch
from mlm_mpi.comm.buckets import Reduction, Setup
from mlm_mpi.comm.group import Group
from mlm_mpi.comm.reductions.allreduce import Allreduce
from mlm_mpi.comm.reductions.canonical import Canonical
from mlm_mpi.cut import cut

VARIANTS = ("canonical", "allreduce", "plain")


class Plain(Allreduce):
    """One blocking MPI_Allreduce: what the MPI library does best, and what no trainer can hide."""

    def finish(self) -> Any:
        if self.group.size > 1:
            from mpi4py import MPI

            self.group.comm.Allreduce(MPI.IN_PLACE, self.buffer)
        return self.buffer


def make(name: str, group: Group, floats: int, lanes: int, bucket_mib: float) -> Reduction:
    """A reduction as the trainer builds it, over a store of eight equal blocks."""
    edges = [floats * i // 8 for i in range(9)]
    segments = list(itertools.pairwise(edges))
    group = group.duplicate()
    ranges = [cut(lanes, group.size, rank) for rank in range(group.size)]
    setup = Setup(group, lanes, ranges, segments, bucket_mib * 2**20, "float32", True)
    return {"allreduce": Allreduce, "plain": Plain, "canonical": Canonical}[name](setup)


def copy_rate(group: Group, floats: int) -> float:
    """Bytes copied per second and rank while all ranks copy."""
    a, b = np.zeros(floats, "f4"), np.ones(floats, "f4")
    group.barrier("copying")
    start = time.perf_counter()
    for _ in range(10):
        np.copyto(a, b)
    return 10 * a.nbytes / (time.perf_counter() - start)


def work(job: dict[str, Any]) -> None:
    """A rank: every lane's gradient is there at once; times `begin` to `finish`."""
    group = launch.start()
    floats, lanes = job["floats"], job["lanes"] or group.size
    reductions = {name: make(name, group, floats, lanes, job["bucket_mib"]) for name in VARIANTS}
    first, stop = cut(lanes, group.size, group.rank)

    def answer(variant: str, times: int) -> dict[str, Any]:
        reduction, seconds = reductions[variant], []
        for _ in range(times):
            group.barrier("a reduction")
            start = time.perf_counter()
            reduction.begin()
            for lane in range(first, stop):
                buffer, _ = reduction.open_lane(lane)
                buffer[:: 1 << 16] = lane
                reduction.close_lane(lane)
            total = reduction.finish()
            seconds.append(time.perf_counter() - start)
        rates = group.allgather_array(np.array([copy_rate(group, floats)]), "rates")
        slowest = group.allgather_array(np.array(seconds), "times").max(axis=0)
        right = variant != "canonical" or float(total[0]) == sum(range(lanes))
        return {"seconds": slowest.tolist(), "copy_rate": float(rates.mean()), "right": right} | reduction.costs()

    harness.serve(group, answer, {"ranks": group.size})
    launch.finish()


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--floats", type=int, default=13_891_584, help="default: the reference model")
    parser.add_argument("--lanes", type=int, default=0, help="default: one per rank")
    parser.add_argument("--bucket-mib", type=float, default=4.0)
    parser.add_argument("--times", type=int, default=3, help="reductions a turn")
    args = parser.parse_args()
    if args.worker:
        return work(json.loads(args.worker))
    report = Report("allreduce", "The gradient sum alone", args)
    report.head("ranks", "strategy", "ms", "floor ms", "× floor", "sent MiB a rank", "held MiB", "speed, canonical = 1")
    job = {"floats": args.floats, "lanes": args.lanes, "bucket_mib": args.bucket_mib}
    for ranks in map(int, args.ranks.split(",")):
        worker = start_ranks("allreduce.py", job, ranks, args.threads)
        medians: dict[str, list[float]] = {name: [] for name in VARIANTS}
        last: dict[str, dict[str, Any]] = {}
        rates = []
        for name in VARIANTS:
            worker.ask(variant=name, times=2)
        for number in range(args.pairs):
            for name in VARIANTS if number % 2 == 0 else reversed(VARIANTS):
                last[name] = worker.ask(variant=name, times=args.times)
                assert last[name]["right"], f"{name} summed wrongly on {ranks} ranks"
                medians[name].append(statistics.median(last[name]["seconds"]))
                rates.append(last[name]["copy_rate"])
        worker.close()
        least = 2 * (ranks - 1) / ranks * 4 * args.floats
        floor = least / statistics.median(rates)
        for name in VARIANTS:
            seconds, cost = statistics.median(medians[name]), last[name]
            report.row(
                ranks, name, f"{1e3 * seconds:.1f}", f"{1e3 * floor:.1f}", f"{seconds / max(floor, 1e-9):.1f}",
                f"{cost['sent_bytes'] / 2**20:.0f}", f"{cost['held_bytes'] / 2**20:.0f}",
                f"{1 / pair_ratio(medians['canonical'], medians[name]):.3f}",
            )  # fmt: skip
        report.save()


if __name__ == "__main__":
    main()
