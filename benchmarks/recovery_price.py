"""What it costs to be ready for a fault: a training in which nothing goes wrong, with everything on and with nothing.

    python benchmarks/recovery_price.py --pairs 30 --record

On: ULFM and its agreement before each update (comm.recover), the watchdog (comm.stall_s), replicas compared every 10
steps, an audit every 100 (which a run of so few steps does not reach: a micro-batch more on one rank, of one step in
100). Off: none of them. Runs take turns, and which of a pair is first alternates; a run's time is the median of its
steps but for the first three. The interval of the median ratio is by bootstrap.
"""

import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import Report, arguments, pair_ratio

from mlm_mpi.monitor.metrics import read_metrics

REFERENCE = (  # benchmarks/step.py's
    "model.kind=gpt", "model.layers=8", "model.width=384", "model.heads=8", "model.feed_forward=1536",
    "model.context=256", "model.dropout=0.0", "train.micro_batches=8", "train.rows=1", "train.lanes=8",
    "optim.name=adamw", "optim.warmup_steps=2",
)  # fmt: skip
OFF = ("comm.recover=false", "comm.stall_s=0", "guard.compare_every=0", "guard.audit_every=0", "guard.spike=0")
FIRST = 3


def step_s(config: str, settings: tuple[str, ...], ranks: int, steps: int) -> float:
    """The median time of a step."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        every = (*settings, f"train.steps={steps}", "eval.every=0", "eval.windows=8", "checkpoint.every=0")
        words = [word for text in every for word in ("--set", text)]
        command = ["-P", "-m", "mlm_mpi", "run", "-n", str(ranks), "--", "train", config, "--run", str(run)]
        subprocess.run([sys.executable, *command, *words, "--quiet"], check=True, stdout=subprocess.DEVNULL)
        return statistics.median(line["step_s"] for line in list(read_metrics(run / "metrics.jsonl"))[FIRST:])


def interval(ratios: list[float], draws: int = 10_000) -> tuple[float, float]:
    """95 % of the medians of resampled pairs."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[draws // 40], medians[-draws // 40]


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(pairs=30)
    parser.add_argument("--config", default="jobs/configs/gpt2-tiny.toml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--reference", action="store_true", help="8 layers, C 384, T 256 instead of the config's model")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=11)
    args = parser.parse_args()
    settings = (*(REFERENCE if args.reference else ()), *args.set)
    report = Report("recovery-price", "The price of being ready for a fault", args)
    on, off = [], []
    report.head("pair", "on, s a step", "off", "ratio")
    for pair in range(args.pairs):
        for wanted in ((on, off), (off, on))[pair % 2]:
            more = OFF if wanted is off else ()
            wanted.append(step_s(args.config, (*settings, *more), args.ranks, args.steps))
        report.row(pair + 1, f"{on[-1]:.4f}", f"{off[-1]:.4f}", f"{on[-1] / off[-1]:.3f}")
    low, high = interval([a / b for a, b in zip(on, off, strict=True)])
    report.say()
    report.say(f"{pair_ratio(off, on):.4f} × with everything on (95 %: {low:.4f} to {high:.4f})")
    report.save()


if __name__ == "__main__":
    main()
