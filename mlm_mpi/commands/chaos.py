"""`mlm-mpi chaos CONFIG`: lets things go wrong in a real training, again and again, and demands the bits of an
undisturbed one.

Every trial draws from the seed what happens to whom, after which step and how long after it, so that the same command
does the same again as far as a machine's clock lets it.
"""

import argparse
import math
import os
import shutil
import signal
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mlm_mpi import config as configuration
from mlm_mpi.chaos.faults import FAULTS, Plan, drawn
from mlm_mpi.chaos.trials import Outcome, Trials
from mlm_mpi.errors import ConfigError, MlmError, nearest
from mlm_mpi.monitor.live import live

_EXAMPLES = "\n".join([
    "examples:",
    "  mlm-mpi chaos jobs/configs/gpt2-tiny.toml --set train.steps=30 --trials 20",
    "  mlm-mpi chaos jobs/configs/tiny.toml -n 3 --faults kill,stop --seed 7 --out faults.md",
    "",
    "faults:",
    *(f"  {name:<14} {fault.says}" for name, fault in FAULTS.items()),
])  # fmt: skip
_LEAST_MICRO_BATCHES = 4  # of a step, one of which is chosen


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi chaos`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("config", metavar="CONFIG", help="TOML file, for example jobs/configs/gpt2-tiny.toml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")
    parser.add_argument("-n", "--ranks", type=int, default=4, metavar="N", help="ranks of each run (default 4)")
    parser.add_argument("--trials", type=int, default=10, metavar="N", help="of each fault (default 10)")
    parser.add_argument("--faults", default=",".join(FAULTS), metavar="NAME,…", help="which (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of what happens when, and to whom")
    parser.add_argument("--out", metavar="FILE", help="also write the table there")


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each fault. Milliseconds: from the fault until the others have said that they go on."""
    heads = "fault", "trials", "passed", "started again", "going on, median ms", "95 %", "most"
    rows = [f"| {' | '.join(heads)} |", "|---|" + (len(heads) - 1) * "---:|"]
    for fault in dict.fromkeys(outcome.plan.fault for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.plan.fault == fault]
        passed = sum(not outcome.wrong for outcome in mine)
        times = sorted(1000 * max(outcome.went_on_s) for outcome in mine if outcome.went_on_s)
        cells = ["–"] * 3
        if times:
            late = times[math.ceil(0.95 * len(times)) - 1]
            cells = [f"{number:.0f}" for number in (statistics.median(times), late, times[-1])]
        again = sum(outcome.again for outcome in mine)
        rows.append(f"| {fault} | {len(mine)} | {passed} | {again} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _checked(args: argparse.Namespace) -> tuple[list[str], int]:
    """(faults, steps of a run). Raises ConfigError."""
    faults = args.faults.split(",")
    if unknown := [name for name in faults if name not in FAULTS]:
        raise ConfigError(f"--faults names {unknown[0]!r}{nearest(unknown[0], FAULTS)}")
    if args.ranks < 2:
        raise ConfigError(f"-n {args.ranks} must be at least 2: somebody has to be left")
    if args.trials < 1:
        raise ConfigError(f"--trials {args.trials} must be at least 1")
    config = configuration.load(args.config, args.set)
    configuration.check_ranks(config, args.ranks)
    if not configuration.is_plain(config):
        there, remedy = configuration.parted(config)
        raise ConfigError(f"{there}: faults are for ranks that hold all, so that others can go on: set {remedy}")
    if config.train.micro_batches < _LEAST_MICRO_BATCHES:
        raise ConfigError(f"train.micro_batches = {config.train.micro_batches} must be at least {_LEAST_MICRO_BATCHES}")
    if config.train.steps < 2:
        raise ConfigError(f"train.steps = {config.train.steps} must be at least 2: something has to follow a fault")
    return faults, config.train.steps


def _run(trials: Trials, plans: Sequence[Plan]) -> list[Outcome]:
    """The trials, told one by one where they fail; Ctrl-C ends them early."""
    bar, outcomes = live("chaos"), list[Outcome]()
    try:
        bar.update(0, len(plans), "an undisturbed run")
        trials.undisturbed()
        print(f"undisturbed: {trials.took_s:.1f} s, weights {trials.weights[:12]}", flush=True)
        for plan in plans:
            bar.update(len(outcomes), len(plans), f"{plan.fault} after step {plan.step}")
            outcomes.append(trials.trial(plan))
            if outcomes[-1].wrong:
                print(f"FAILED {plan}: {outcomes[-1].wrong}", flush=True)
    except KeyboardInterrupt:
        trials.stop()
        print(f"interrupted after {len(outcomes)} of {len(plans)} trials", flush=True)
    finally:
        bar.close()
    return outcomes


def _writable(path: str) -> None:
    """Finds out before the trials what would lose their table. Raises ConfigError."""
    try:
        with open(path, "a"):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out {path} cannot be written: {error.strerror}: give a file in a folder that is there"
        ) from None


def main(args: argparse.Namespace) -> int:
    """Runs the trials; exit code 1 if one has failed, 130 after Ctrl-C. Raises ConfigError, MlmError."""
    faults, steps = _checked(args)
    if args.out:
        _writable(args.out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="mlm-mpi-chaos-"))
    trials = Trials(args.config, args.set, args.ranks, steps, folder)
    plans = [drawn(fault, trial, args.seed, args.ranks, steps) for trial in range(args.trials) for fault in faults]
    try:
        outcomes = _run(trials, plans)
    except MlmError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    text = table(sorted(outcomes, key=lambda outcome: faults.index(outcome.plan.fault)))
    if outcomes:
        print(text, flush=True)
    if args.out:
        overrides = "".join(f" --set {text}" for text in args.set)
        head = f"`mlm-mpi chaos {args.config}{overrides} -n {args.ranks} --trials {args.trials} --faults {args.faults} "
        head += f"--seed {args.seed}`"
        Path(args.out).write_text(f"{head}, {os.uname().nodename}, undisturbed {trials.took_s:.1f} s\n\n{text}\n")
    failed = sum(bool(outcome.wrong) for outcome in outcomes)
    if failed:
        print(f"{failed} of {len(outcomes)} failed; their run folders are in {folder}", flush=True)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    if len(outcomes) < len(plans):
        return 130
    print(f"all {len(outcomes)} passed", flush=True)
    return 0
