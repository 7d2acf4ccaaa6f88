"""A training step of this checkout beside that of another one: did a change cost time?

    git worktree add /tmp/before COMMIT && (cd /tmp/before && make install)
    python benchmarks/against.py /tmp/before --python /tmp/before/.venv/bin/python --pairs 30
    python benchmarks/against.py . --set-other numerics.shares=1        # the price of a setting

Both run the `step.py` of their own checkout, in turn, in processes that stay; a pair is a turn of each, one after the
other. The interval is that of Student's t over the logarithms of the pairs' ratios.
"""

import argparse
import json
import math
import statistics
import sys

import harness
from harness import HERE, SIZES, Report, Worker

# 97.5 % point of Student's t by degrees of freedom, the next smaller row where there is none
T = {4: 2.776, 9: 2.262, 14: 2.145, 19: 2.093, 29: 2.045, 39: 2.023, 59: 2.001, 99: 1.984}


def _job(args: argparse.Namespace, settings: list[str]) -> str:
    return json.dumps({"size": SIZES[args.size], "threads": args.threads, "settings": settings})


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("other", metavar="CHECKOUT", help="of the commit to compare with")
    parser.add_argument("--python", default=sys.executable, help="its Python")
    parser.add_argument("--size", choices=SIZES, default="reference")
    parser.add_argument("--steps", type=int, default=1, help="steps a turn")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for both")
    parser.add_argument("--set-other", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for the other")
    args = parser.parse_args()
    report = Report(f"against-{args.size}", "A step against another commit", args)
    programs = {
        "this": [sys.executable, str(HERE / "step.py"), "--worker", _job(args, args.set)],
        "other": [args.python, f"{args.other}/benchmarks/step.py", "--worker", _job(args, args.set + args.set_other)],
    }
    workers = {name: Worker(program, args.threads) for name, program in programs.items()}
    for worker in workers.values():
        worker.ask(steps=2)  # page faults, first touches
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(args.pairs):
        for name in workers if number % 2 == 0 else reversed(workers):
            seconds[name].append(statistics.median(workers[name].ask(steps=args.steps)["seconds"]))
    for worker in workers.values():
        worker.close()
    logs = [math.log(a / b) for a, b in zip(seconds["this"], seconds["other"], strict=True)]
    spread = T[max(n for n in T if n < len(logs))] * statistics.stdev(logs) / math.sqrt(len(logs))
    low, middle, high = (math.exp(statistics.mean(logs) + sign * spread) for sign in (-1, 0, 1))
    report.say()
    if args.set_other:
        report.say(f"The other with {', '.join(args.set_other)}.")
    report.say(f"{args.size}, {args.pairs} pairs of {args.steps} steps, one rank, {args.threads} thread(s).")
    report.say(f"Seconds a step, median: {statistics.median(seconds['this']):.4f}, ")
    report.say(f"of the other checkout {statistics.median(seconds['other']):.4f}.")
    report.say(f"This takes {middle:.4f} × the time of the other (95 %: {low:.4f} to {high:.4f}),")
    report.say(f"median of pairs {math.exp(statistics.median(logs)):.4f}.")
    report.save()


if __name__ == "__main__":
    main()
