"""Time of a training step: tokens/s, GFLOP/s, share of the sgemm peak; against PyTorch; against allreduce.

    python benchmarks/step.py --peer torch                # 1 rank, pairs with PyTorch eager
    python benchmarks/step.py --ranks 1,2,4               # canonical against allreduce
    python benchmarks/step.py --size gpt2-124m --peer torch --pairs 3

The step is the trainer's own (`train.replica.Replica.step`): micro-batches, reduction, norm, clipping, AdamW.
Every rank runs one micro-batch, the tokens of every step are fresh, evaluation and saving are not included.
"""

import argparse
import json
import statistics
import time
from functools import partial
from typing import Any

import harness
import msgspec
import numpy as np
from harness import SIZES, Report, Worker, pair_ratio, start_ranks

from mlm_mpi import config
from mlm_mpi.backend.arrays import keep_freed_memory
from mlm_mpi.comm import launch
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.data.loader import MicroBatch
from mlm_mpi.models import gpt
from mlm_mpi.train.replica import Replica

MIB = 2**20


def configuration(size: dict[str, Any], ranks: int, reduction: str, threads: int) -> config.Config:
    """M = 1 a rank, one lane each, and everything else as a user gets it."""
    model = [f"model.{key}={size[key]}" for key in ("layers", "width", "heads", "context")]
    return config.load(
        None,
        [*model, f"train.rows={size['rows']}", f"train.micro_batches={ranks}", f"train.lanes={ranks}"]
        + [f"comm.reduction={reduction}", f"numerics.threads={threads}", "train.steps=100000"],
    )


def work(job: dict[str, Any]) -> None:
    """A rank: holds one replica per reduction and runs steps on request."""
    keep_freed_memory()
    group = launch.start()
    size, replicas = job["size"], {}
    for reduction in job["reductions"]:
        replicas[reduction] = Replica(
            configuration(size, group.size, reduction, job["threads"]), size["vocabulary"], Mesh(group)
        )
        replicas[reduction].store.initialise(0)
    random = np.random.default_rng(group.rank)
    done = dict.fromkeys(replicas, 0)

    def batch(step: int) -> MicroBatch:
        rows = random.integers(0, size["vocabulary"], (size["rows"], size["context"] + 1)).astype(np.int32)
        ids, targets = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
        return MicroBatch(step, group.rank, ids, targets, None, targets.size)

    def answer(reduction: str, steps: int) -> dict[str, Any]:
        seconds, exposed = [], []
        for _ in range(steps):
            made = iter([batch(done[reduction])])
            group.barrier("a step")
            start = time.perf_counter()
            result = replicas[reduction].step(done[reduction], partial(next, made))
            seconds.append(time.perf_counter() - start)
            exposed.append(result.exposed_s)
            done[reduction] += 1
        slowest = group.allgather_array(np.array([seconds, exposed]), "times").max(axis=0)
        peak = group.allgather_array(np.array([harness.peak_flops(job["dtype"])]), "peak").mean()
        memory = group.allgather_array(np.array([harness.peak_bytes()]), "memory").max()
        return {
            "seconds": slowest[0].tolist(), "exposed": slowest[1].tolist(), "peak_flops": float(peak),
            "peak_bytes": int(memory), "loss": result.loss,
        }  # fmt: skip

    harness.serve(group, answer, {"parameters": next(iter(replicas.values())).store.count})
    launch.finish()


def peer_worker(args: argparse.Namespace, size: dict[str, Any], kept: bool) -> Worker:
    """PyTorch on the same model, with glibc's allocator as it comes or keeping freed memory as ours does."""
    c = configuration(size, 1, "canonical", args.threads)
    job = {
        "task": "step", "model": msgspec.to_builtins(c.model), "optim": msgspec.to_builtins(c.optim),
        "rows": size["rows"], "vocabulary": size["vocabulary"], "threads": args.threads, "keep_freed_memory": kept,
    }  # fmt: skip
    return Worker([args.peer_python, str(harness.HERE / "torch_peer.py"), json.dumps(job)], args.threads)


def compare(args: argparse.Namespace, size: dict[str, Any], ranks: int, report: Report) -> None:
    """One number of ranks: turns of every variant, then its table."""
    peers = {}
    if args.peer and ranks == 1:
        peers = {"PyTorch": peer_worker(args, size, False), "PyTorch, freed memory kept": peer_worker(args, size, True)}
    reductions = ["canonical"] if ranks == 1 else args.reductions.split(",")
    job = {"size": size, "threads": args.threads, "reductions": reductions, "dtype": "float32"}
    ours = start_ranks("step.py", job, ranks, args.threads)
    flops = gpt.step_flops(configuration(size, 1, "canonical", 1).model, size["vocabulary"], 1)
    tokens = size["rows"] * size["context"] * ranks
    names = reductions + list(peers)

    def turn(name: str, steps: int) -> dict[str, Any]:
        return peers[name].ask(steps=steps) if name in peers else ours.ask(reduction=name, steps=steps)

    medians: dict[str, list[float]] = {name: [] for name in names}
    last: dict[str, dict[str, Any]] = {}
    peaks = []
    for name in names:
        turn(name, 2)  # page faults, first touches
    for number in range(args.pairs):
        for name in names if number % 2 == 0 else reversed(names):
            last[name] = turn(name, args.steps)
            medians[name].append(statistics.median(last[name]["seconds"]))
            peaks += [last[name]["peak_flops"]] if "peak_flops" in last[name] else []
    peak = statistics.median(peaks)
    for worker in (ours, *peers.values()):
        worker.close()

    report.say(f"## {args.size}, {ranks} rank{'s' * (ranks > 1)}, {args.threads} thread{'s' * (args.threads > 1)} each")
    report.say()
    report.say(
        f"{ours.hello['parameters']:,} parameters, {tokens} tokens a step, float32, {args.pairs} interleaved pairs of "
        f"{args.steps} steps; sgemm peak in the same processes {peak / 1e9:.1f} GFLOP/s a rank"
    )
    for name, peer in peers.items():
        report.say(f"{name}: {peer.hello['torch']}, AdamW {peer.hello['adamw']}, {peer.hello['cpu']}")
    report.say()
    report.head(
        "variant",
        "s/step",
        "tokens/s",
        "GFLOP/s a rank",
        "of sgemm peak",
        "exposed ms",
        "peak MiB",
        "speed, canonical = 1",
    )
    for name in names:
        seconds = statistics.median(medians[name])
        rate = flops * tokens / ranks / seconds
        exposed = f"{1e3 * statistics.median(last[name]['exposed']):.1f}" if name not in peers else ""
        report.row(
            name, f"{seconds:.4f}", f"{tokens / seconds:.0f}", f"{rate / 1e9:.1f}", f"{100 * rate / peak:.0f} %",
            exposed, f"{last[name]['peak_bytes'] / MIB:.0f}",
            f"{1 / pair_ratio(medians['canonical'], medians[name]):.3f}",
        )  # fmt: skip
    for name in names[1:]:
        pairs = ", ".join(f"{b / a:.3f}" for a, b in zip(medians["canonical"], medians[name], strict=True))
        report.say()
        report.say(
            f"canonical is {pair_ratio(medians['canonical'], medians[name]):.3f} × as fast as {name} (pairs: {pairs})"
        )
    report.say()


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--size", choices=SIZES, default="reference")
    parser.add_argument("--ranks", default="1", help="numbers of ranks, for example 1,2,4")
    parser.add_argument("--steps", type=int, default=2, help="steps a turn")
    parser.add_argument("--reductions", default="canonical,allreduce", help="compared on more than one rank")
    parser.add_argument("--peer", choices=["torch"], help="compare with PyTorch on one rank")
    parser.add_argument("--peer-python", default=harness.PEER_PYTHON)
    args = parser.parse_args()
    if args.worker:
        return work(json.loads(args.worker))
    report = Report("step" if args.ranks == "1" else "step-ranks", "Time of a training step", args)
    for ranks in map(int, args.ranks.split(",")):
        compare(args, SIZES[args.size], ranks, report)
        report.save()


if __name__ == "__main__":
    main()
