"""How much of the time of a run in which ranks are killed goes into steps that count: its goodput.

    python benchmarks/goodput.py --every 15 --ranks 8 --record

A rank is killed every so many seconds until one is left, or the time is over. Steps that count take what a step without
a kill takes on average with as many ranks as live (the live-rank ideal); everything else, a step begun in vain,
recovery, a new rank 0, is lost: goodput is the ideal's share of the time from the first of those steps to the last.
"""

import itertools
import random
import statistics
import tempfile
import time
from pathlib import Path

from harness import Report, arguments

from mlm_mpi.chaos.job import Job
from mlm_mpi.monitor.metrics import read_metrics


def storm(job: Job, every_s: float, total_s: float, ranks: int) -> list[float]:
    """Kills a rank every so many seconds; returns when, by the clock of metrics.jsonl."""
    draw, kills, left = random.Random(0), [], list(range(ranks))
    end = time.monotonic() + total_s
    while time.monotonic() + every_s < end and len(left) > 1 and job.process.poll() is None:
        time.sleep(every_s)
        victim = draw.choice(left)
        left.remove(victim)
        kills.append(time.time())
        job.signal([victim], 9)
    time.sleep(max(0.0, end - time.monotonic()))
    return kills


def goodput(ends: list[float], kills: list[float]) -> tuple[float, list[float]]:
    """(share of the time that the ideal needs, seconds lost by each kill). `ends`: when each step was done."""
    gaps = list(itertools.pairwise(ends))
    ideal, lost = 0.0, []
    for first, stop in zip([0.0, *kills], [*kills, float("inf")], strict=True):
        usual = statistics.fmean(b - a for a, b in gaps if a >= first and b < stop)
        ideal += usual * sum(first <= b < stop for _, b in gaps)
        hit = [b - a - usual for a, b in gaps if a < first <= b]
        lost += hit
    return ideal / (ends[-1] - ends[0]), lost


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--config", default="jobs/configs/gpt2-tiny.toml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--every", type=float, default=15.0, metavar="S")
    parser.add_argument("--seconds", type=float, default=0.0, help="default: until one rank is left, and --every more")
    args = parser.parse_args()
    report = Report(f"goodput-{args.every:g}s", "Goodput under kills", args)
    total_s = args.seconds or args.every * (args.ranks + 0.5)
    with tempfile.TemporaryDirectory() as folder:
        settings = ("train.steps=100000", "eval.every=0", "checkpoint.every=0", "log.every=1000", *args.set)
        words = [word for text in settings for word in ("--set", text)]
        job = Job(args.ranks, ["train", args.config, "--run", f"{folder}/run", *words])
        while len(lines(folder)) < 5:
            time.sleep(0.1)
        kills = storm(job, args.every, total_s, args.ranks)
        ends = [line["time"] for line in lines(folder)][3:]
        job.process.terminate()
        job.wait(60.0)
    share, lost = goodput(ends, kills)
    report.say(
        f"{args.ranks} ranks, a kill every {args.every:g} s, {len(kills)} kills in {ends[-1] - ends[0]:.0f} s: goodput "
        f"{share:.1%} of the live-rank ideal; lost by a kill: median {statistics.median(lost):.2f} s, at most "
        f"{max(lost):.2f} s; {len(ends)} steps"
    )
    report.save()


def lines(folder: str) -> list[dict]:
    path = Path(folder, "run", "metrics.jsonl")
    return list(read_metrics(path)) if path.exists() else []


if __name__ == "__main__":
    main()
