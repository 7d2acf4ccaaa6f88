"""Time of a training step: tokens/s, GFLOP/s, share of the sgemm peak, page faults, memory; against PyTorch.

    python benchmarks/step.py --peer torch --kernels off       # 1 rank: PyTorch, and NumPy in place of our kernels
    python benchmarks/step.py --products bf16 --peer torch --peers bf16   # bf16 products, bf16 autocast
    python benchmarks/step.py --model llama --peer torch       # the modern decoder
    python benchmarks/step.py --ranks 1,2 --peer torch         # 2 ranks: DDP over gloo; what a second rank gains
    python benchmarks/step.py --ranks 2,4 --reductions canonical,allreduce
    python benchmarks/step.py --size gpt2-124m --peer torch --peers eager,kept --pairs 3 --steps 1

The step is the trainer's own (`train.engine.Engine.step`): micro-batches, reduction, norm, clipping, AdamW.
Every rank runs one micro-batch, the tokens of every step are fresh, evaluation and saving are not included.
Every variant is a process, or a job, of its own: page faults and peak memory are its alone (the rank with most).
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import harness
import numpy as np
from harness import SIZES, Report, Worker, pair_ratio, start_ranks

from mlm_mpi import config
from mlm_mpi.backend import choice, registry
from mlm_mpi.backend.cpu import library
from mlm_mpi.comm import launch
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.config import rules
from mlm_mpi.data.batch import Batch
from mlm_mpi.layers.base import Sizes
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks import language_model
from mlm_mpi.train.build import build

MIB = 2**20

PEERS = {  # name: (in the table, what torch_peer.py does for it)
    "eager": ("PyTorch eager", {}),
    "kept": ("PyTorch eager, freed memory kept", {"keep_freed_memory": True}),
    "compile": ("torch.compile", {"compile": True}),
    "bf16": ("PyTorch bf16 autocast", {"bf16": True}),
}


MODELS = {  # name: what is set beside the size
    "gpt": ["model.kind=gpt"],
    "llama": ["model.kind=llama"],
    "recipe": [
        "model.kind=llama",
        "model.activation=relu2",
        "model.qk_norm=true",
        "model.embedding_norm=true",
        "model.logit_cap=15",
    ],
}


def configuration(
    size: dict[str, Any], ranks: int, threads: int, settings: list[str], kind: str = "gpt"
) -> config.Config:
    """M = 1 a rank, one lane each, and everything else as a user gets it."""
    model = MODELS[kind] + [f"model.{key}={size[key]}" for key in ("layers", "width", "heads", "context")]
    return config.load(
        None,
        [*model, f"train.rows={size['rows']}", f"train.micro_batches={ranks}", f"train.lanes={ranks}"]
        + [f"numerics.threads={threads}", "train.steps=100000", *settings],
    )


# ---- a rank


def work(job: dict[str, Any]) -> None:
    """A rank: measures the roof, or holds an engine and runs steps, on request."""
    choice.keep_freed_memory()
    group = launch.start()
    if job["settings"] is None:

        def roof() -> dict[str, Any]:
            group.barrier("the roof")
            return {"flops": float(group.allgather_array(np.array([harness.peak_flops()]), "the roof").mean())}

        harness.serve(group, roof, {})
        return launch.finish()

    size = job["size"]
    c = configuration(size, group.size, job["threads"], job["settings"], job.get("model", "gpt"))
    place, plugins = choice.place_of(c, c.numerics.level), Plugins()
    parts = language_model.parts(c, plugins, Sizes(size["vocabulary"], rules.shares(c)))
    engine = build(c, plugins, parts, Mesh(group), place)
    engine.machine.store.initialise(0)
    random = np.random.default_rng(group.rank)
    done = 0

    def batch() -> Batch:
        rows = random.integers(0, size["vocabulary"], (size["rows"], size["context"] + 1)).astype(np.int32)
        ids, targets = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
        return Batch(done, group.rank, {"ids": ids}, {"ids": targets}, targets.size)

    def answer(steps: int) -> dict[str, Any]:
        nonlocal done
        table = []
        for _ in range(steps):
            made = iter([batch()])
            group.barrier("a step")
            faults, start = harness.page_faults(), time.perf_counter()
            result = engine.step(done, partial(next, made))
            seconds = time.perf_counter() - start
            table.append([seconds, harness.page_faults() - faults, result.exposed_s, harness.peak_bytes()])
            done += 1
        most = group.allgather_array(np.array(table).ravel(), "costs").max(axis=0).reshape(steps, -1)
        seconds, faults, exposed, peak = most.T.tolist()
        return {"seconds": seconds, "faults": faults, "exposed": exposed, "peak_bytes": max(peak)}

    harness.serve(group, answer, {"about": registry.summary(), "parameters": engine.machine.store.count})
    launch.finish()


# ---- the parent


@dataclass
class Variant:
    """A worker and what it has measured, turn by turn."""

    name: str
    ranks: int
    worker: Worker
    turns: list[dict[str, Any]] = field(default_factory=list)

    def turn(self, steps: int) -> None:
        """That many steps."""
        self.turns.append(self.worker.ask(steps=steps))

    @property
    def medians(self) -> list[float]:
        """Seconds a step, by turn."""
        return [statistics.median(turn["seconds"]) for turn in self.turns]

    def median(self, what: str) -> float:
        """Over all steps."""
        return statistics.median(value for turn in self.turns for value in turn[what])


def start_ours(args: argparse.Namespace, ranks: int, report: Report) -> list[Variant]:
    """The first one is what the others are compared with."""
    reductions = args.reductions.split(",")[: None if ranks > 1 else 1]
    wanted = {name: [f"comm.reduction={name}"] for name in reductions}
    if args.kernels == "off":
        wanted[f"{reductions[0]}, kernels off"] = [*wanted[reductions[0]], "numerics.reference=all"]
    if args.recompute:
        wanted[f"{reductions[0]}, recompute"] = [*wanted[reductions[0]], "train.recompute=true"]
    if args.products == "bf16" and not library.runs(library.BF16_LEVEL):
        report.say(f"{reductions[0]}, bf16 products is left out: this CPU has no AVX512-BF16")
    elif args.products == "bf16":
        wanted[f"{reductions[0]}, bf16 products"] = [*wanted[reductions[0]], "numerics.products=bf16"]
    job = {"size": SIZES[args.size], "threads": args.threads, "model": args.model}
    return [
        Variant(name, ranks, start_ranks("step.py", job | {"settings": settings}, ranks, args.threads))
        for name, settings in wanted.items()
    ]


def start_peers(args: argparse.Namespace, ranks: int, report: Report) -> list[Variant]:
    """PyTorch on the same model: glibc's allocator as it comes or keeping freed memory as ours does, and so on."""
    size, found = SIZES[args.size], []
    c = configuration(size, ranks, args.threads, [], args.model)
    job = {
        "task": "step", "model": asdict(c.model), "optim": asdict(c.optim),
        "rows": size["rows"], "vocabulary": size["vocabulary"], "threads": args.threads, "ranks": ranks,
        "keep_freed_memory": False, "compile": False, "bf16": False,
    }  # fmt: skip
    for key in args.peers.split(",") if args.peer else []:
        title, settings = PEERS[key]
        name = title + ", DDP gloo" * (ranks > 1)
        if key == "bf16" and not harness.cpu_has("avx512_bf16"):
            report.say(f"{name} is left out: this CPU has no AVX512-BF16")
            continue
        peer = [args.peer_python, str(harness.HERE / "torch_peer.py"), json.dumps(job | settings)]
        worker = Worker(peer, args.threads)
        if "skip" in worker.hello:
            report.say(f"{name} is left out: {worker.hello['skip']}")
            worker.close()
        else:
            found.append(Variant(name, ranks, worker))
    return found


def tell(args: argparse.Namespace, variants: list[Variant], roofs: dict[int, list[float]], report: Report) -> None:
    """The table and the ratios."""
    size, first = SIZES[args.size], {v.ranks: v for v in reversed(variants)}
    tokens = size["rows"] * size["context"]
    settings = configuration(size, 1, args.threads, [], args.model).model
    flops = Plugins().find("models", settings.kind, "model.kind").flops(settings, Sizes(size["vocabulary"]), tokens)
    report.say()
    parameters = f"{variants[0].worker.hello['parameters']:,} parameters"
    report.say(f"{args.model}, {args.size}: {parameters}, {tokens} tokens a rank and step,")
    report.say(f"{args.threads} thread{'s' * (args.threads > 1)} a rank, {args.pairs} turns of {args.steps} steps.")
    for ranks, rates in roofs.items():
        rate = f"{statistics.median(rates) / 1e9:.1f} GFLOP/s a rank"
        report.say(f"sgemm on {ranks} rank{'s' * (ranks > 1)}, measured in the same turns: {rate}.")
    report.say()
    names: dict[str, list[str]] = {}
    for v in variants:
        names.setdefault(v.worker.hello["about"], []).append(f"{v.ranks} × {v.name}")
    for about, those in names.items():
        report.say(f"* {'; '.join(those)}: {about}")
    report.say()
    report.head(
        "ranks", "variant", "s/step", "tokens/s", "GFLOP/s a rank", "of sgemm", "exposed ms", "page faults a step",
        "peak MiB a rank", "speed", "memory",
    )  # fmt: skip
    for v in variants:
        base, seconds = first[v.ranks], v.median("seconds")
        share = statistics.median(flops / s / roof for s, roof in zip(v.medians, roofs[v.ranks], strict=True))
        peak, least = v.turns[-1]["peak_bytes"], base.turns[-1]["peak_bytes"]
        report.row(
            v.ranks, v.name, f"{seconds:.4f}", f"{v.ranks * tokens / seconds:.0f}", f"{flops / seconds / 1e9:.1f}",
            f"{100 * share:.0f} %", f"{1e3 * v.median('exposed'):.1f}" if "exposed" in v.turns[0] else "",
            f"{v.median('faults'):.0f}", f"{peak / MIB:.0f}", f"{1 / pair_ratio(base.medians, v.medians):.3f}",
            f"{peak / least:.2f}",
        )  # fmt: skip
    report.say()
    report.say(f"Speed and memory: {variants[0].name} on as many ranks = 1.")
    for v in variants:
        if v is not (base := first[v.ranks]):
            by_pair = ", ".join(f"{b / a:.3f}" for a, b in zip(base.medians, v.medians, strict=True))
            ratio = f"{pair_ratio(base.medians, v.medians):.3f} × as fast as {v.name} (pairs: {by_pair})"
            report.say(f"* on {v.ranks}: {base.name} is {ratio}")
        for one in variants:
            if one.ranks == 1 < v.ranks and v.name.removesuffix(", DDP gloo") == one.name:
                gains = [v.ranks * a / b for a, b in zip(one.medians, v.medians, strict=True)]
                by_pair = ", ".join(f"{gain:.3f}" for gain in gains)
                gain = f"{statistics.median(gains):.3f} × the tokens/s of 1 (pairs: {by_pair})"
                report.say(f"* {v.name}: {v.ranks} ranks have {gain}")


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--size", choices=SIZES, default="reference")
    parser.add_argument("--model", choices=MODELS, default="gpt")
    parser.add_argument("--ranks", default="1", help="numbers of ranks, for example 1,2,4")
    parser.add_argument("--steps", type=int, default=2, help="steps a turn")
    parser.add_argument("--reductions", default="canonical", help="compared on more than one rank: canonical,allreduce")
    parser.add_argument("--kernels", choices=["off"], help="also ours with NumPy in place of the kernels")
    parser.add_argument("--products", choices=["bf16"], help="also ours with numerics.products=bf16")
    parser.add_argument("--recompute", action="store_true", help="also ours with train.recompute")
    parser.add_argument("--peer", choices=["torch"], help="compare with PyTorch; DDP over gloo on several ranks")
    parser.add_argument("--peers", default=",".join(PEERS), help="of PyTorch (default: %(default)s)")
    parser.add_argument("--peer-python", default=harness.PEER_PYTHON)
    args = parser.parse_args()
    if args.worker:
        return work(json.loads(args.worker))
    counts = [int(word) for word in args.ranks.split(",")]
    theme = (
        f"step-{args.size}"
        + (f"-{args.model}" if args.model != "gpt" else "")
        + "".join(f"-{ranks}" for ranks in counts)
        + "r"
    )
    report = Report(theme, "Time of a training step", args)
    job = {"settings": None}
    roofs = {ranks: start_ranks("step.py", job, ranks, args.threads) for ranks in counts}
    rates: dict[int, list[float]] = {ranks: [] for ranks in counts}
    variants = [v for ranks in counts for v in [*start_ours(args, ranks, report), *start_peers(args, ranks, report)]]
    for v in variants:
        v.worker.ask(steps=2)  # page faults, first touches
    for number in range(args.pairs):
        for ranks, roof in roofs.items():
            rates[ranks].append(roof.ask()["flops"])
        for v in variants if number % 2 == 0 else reversed(variants):
            v.turn(args.steps)
    for worker in [*roofs.values(), *(v.worker for v in variants)]:
        worker.close()
    tell(args, variants, rates, report)
    report.save()


if __name__ == "__main__":
    main()
